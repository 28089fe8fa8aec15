"What is claimed of the shipped weights, measured again on real images."

import json

import pandas as pd
import pytest
import torch
from notebooks import ROOT

from genrobust.attacks import deepfool, fgsm
from genrobust.detection import fit_detectors
from genrobust.models import accuracy, digest, load_pretrained, pretrained_names
from genrobust.results import PRESETS, wilson

both = pytest.mark.parametrize('name', ['gfz', 'dfz'])


LEAST = dict(  # test accuracy
    cnn=0.91,
    cnn_at=0.88,
    cnn_at_l2=0.865,
    cnn_at_mnist=0.99,
    cnn_mnist=0.99,
    cnn_noise25=0.88,
    cnn_noise50=0.86,
    dbx=0.89,
    dfx=0.905,
    dfz=0.905,
    dfz_mnist=0.985,
    gby=0.845,
    gbz=0.79,
    gbz_mnist=0.94,
    gfy=0.85,
    gfz=0.85,
    gfz_at=0.8,
    gfz_mnist=0.975,
    gfz_noise25=0.85,
    gfz_noise50=0.845,
)


@pytest.mark.parametrize('name', pretrained_names())
def test_accuracy_is_what_the_metadata_says(name, request):
    clf, n = load_pretrained(name, device='cpu'), 120
    said = clf.info['test_accuracy']
    splits = 'fashion' if clf.info['data'] == 'fashion_mnist' else 'mnist'
    x, y = request.getfixturevalue(splits).test.first(n)
    assert said >= LEAST[name]
    low, high = wilson(n * said, n)
    three_deviations = (high - low) / 2 * 1.5
    assert abs(accuracy(clf.fixed(0), x, y) - said) < max(three_deviations, 2.5 / n)


def test_deepfool_wins_on_every_image_on_its_own_noise(fashion):
    clf = load_pretrained('gfz', device='cpu').fixed(0)
    x, y = fashion.test.first(90)
    with torch.no_grad():
        right = (clf(x).argmax(1) == y).nonzero().squeeze(1)[:64]
    result = deepfool(clf, x[right], y[right], batch_size=16)
    assert len(right) == 64 and result.success.all()


@pytest.mark.parametrize('p', [2, torch.inf])
def test_deepfool_is_not_stopped_by_the_box(p, fashion):
    "Foolbox's wins on one image in fifteen of this network"
    result = deepfool(load_pretrained('cnn_at', device='cpu'), *fashion.test.first(100), p=p)
    assert result.success.sum() > 0.85 * result.attacked.sum()


@pytest.mark.parametrize(
    'study', sorted(p.parent.name for p in ROOT.glob('results/*/settings.json'))
)
def test_published_studies_are_of_the_shipped_weights(study):
    for name, expected in json.loads((ROOT / 'results' / study / 'settings.json').read_text())[
        'weights'
    ].items():
        assert expected == digest(load_pretrained(name, device='cpu').state_dict()), (
            f'the weights of {name} have changed: measure results/{study} again'
        )


@both
@pytest.mark.parametrize(
    'label, attack, n',
    [
        ('FGS', fgsm, PRESETS['standard'].attacked // PRESETS['standard'].seeds),
        ('DeepFool', deepfool, 6),
    ],
    ids=['fgs', 'deepfool'],
)
def test_the_published_table_is_measured_again(label, attack, n, name, fashion):
    "The first images under two attacks, from weights and images"
    rows = pd.read_csv(ROOT / 'results/standard/images.csv').query(
        'model==@name and attack==@label and image<@n'
    )
    x, y = fashion.test.first(n)
    again = attack(load_pretrained(name, device='cpu'), x, y, seed=0).to_frame()
    assert len(rows) == n and (rows.seed == 0).all()
    assert again.y.tolist() == rows.label.tolist()
    for column in ('y_adv', 'success', 'initially_wrong'):
        assert again[column].tolist() == rows[column].tolist()
    assert again.l2.to_numpy() == pytest.approx(
        rows.l2.to_numpy(), rel=1e-3 if label == 'FGS' else 0.02
    )


def test_a_published_threshold_is_measured_again(fashion):
    "Of a network that draws no random numbers"
    preset, rows = PRESETS['standard'], pd.read_csv(ROOT / 'results/standard/detectors.csv')
    expected = rows.query("model=='cnn' and detector=='kl'").threshold.item()
    parts = fashion.train.first(preset.train), fashion.valid.first(preset.valid)
    found = fit_detectors(load_pretrained('cnn', device='cpu'), *parts)['kl'].threshold
    assert found == pytest.approx(expected, rel=1e-3)
