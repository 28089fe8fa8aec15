"Corruptions: what a file keeps, what is refused, and the correction for many tests against an oracle."

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from under_attack import Counting

from genrobust.corruptions import (
    compare,
    measure_corruptions,
    read_corruptions,
    shares_right,
    summarise,
)
from genrobust.data import Images, synthetic
from genrobust.models import BayesClassifier
from genrobust.statistics import holm

IMAGES = synthetic(12)
NAMES = ['stripe', 'fog']


def linear(seed=0):
    "A linear model that counts the images it is asked about"
    layer = nn.Linear(784, 10)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    return Counting(nn.Sequential(nn.Flatten(), layer))


def plain(frame):
    "Rows that can be compared, whether they were read from a file or not"
    return frame.round(4).sort_values(['model', 'latents', 'corruption', 'severity']).to_csv()


def test_measuring_goes_on_where_it_ended(tmp_path):
    model = linear()
    measure_corruptions(dict(m=model), IMAGES, tmp_path, corruptions=NAMES[:1], severities=[1, 4])
    assert model.forwards == 12 * (1 + 1 + 2)  # clean, for the detector and a row; two severities
    model.forwards = 0
    whole = measure_corruptions(dict(m=model), IMAGES, tmp_path, corruptions=NAMES)
    assert model.forwards == 12 * (1 + 3 + 5)
    model.forwards = 0
    again = measure_corruptions(dict(m=model), IMAGES, tmp_path, corruptions=NAMES, batch_size=5)
    assert model.forwards == 0 and plain(again) == plain(whole) == plain(read_corruptions(tmp_path))
    at_once = measure_corruptions(dict(m=model), IMAGES, corruptions=NAMES, batch_size=5)
    keep = ['corruption', 'severity', 'right', 'predictions']
    key = ['corruption', 'severity']
    assert at_once[keep].sort_values(key).to_csv(index=False) == whole[keep].sort_values(
        key
    ).to_csv(index=False)


def test_a_file_of_other_inputs_is_refused(tmp_path):
    model = linear()
    how = dict(corruptions=['fog'], severities=[1])
    measure_corruptions(dict(m=model), IMAGES, tmp_path, **how)
    written = (tmp_path / 'm.csv').read_bytes()
    model.forwards = 0
    for images, seed in ((Images(IMAGES.x[:4], IMAGES.y[:4]), 0), (IMAGES, 1)):
        with pytest.raises(ValueError, match='take another folder'):
            measure_corruptions(dict(m=model), images, tmp_path, seed=seed, **how)
    nn.init.zeros_(model.inner[1].bias)
    with pytest.raises(ValueError, match='inputs'):
        measure_corruptions(dict(m=model), IMAGES, tmp_path, **how)
    assert model.forwards == 0 and (tmp_path / 'm.csv').read_bytes() == written


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(corruptions=['fog', 'rain']), "no corruption 'rain'"),
        (dict(severities=[1, 7]), 'severity must be'),
        (dict(models={}), 'models holds none'),
        (dict(models='cnn'), 'expected a list of models'),
        (dict(models=dict(m=nn.Linear(784, 10))), 'training mode'),
        (dict(models={'a/b': None}), 'named as a file'),
        (dict(seed=-1), 'seed must be'),
        (dict(images=Images(IMAGES.x * 2, IMAGES.y)), 'pixels in'),
        (dict(images=Images(IMAGES.x, IMAGES.y[:3])), 'one label for each'),
    ],
)
def test_a_mistake_is_found_before_the_model_is_asked(given, message):
    model = linear()
    with pytest.raises(ValueError, match=message):
        measure_corruptions(**dict(models=dict(m=model), images=IMAGES) | given)
    assert model.forwards == 0


def test_a_missing_folder_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match='measure first'):
        read_corruptions(tmp_path)


def test_draws_of_latents_share_a_file_and_densities_a_detector(tmp_path):
    small = dict(latent=4, hidden=8, n_samples=2)
    models = {name: BayesClassifier(name, **small).eval() for name in ('GFZ', 'DFX')}
    how = dict(corruptions=['gaussian_noise'], severities=[5])
    first = measure_corruptions(models, IMAGES, tmp_path, **how)
    second = measure_corruptions(models, IMAGES, tmp_path, latent_seed=1, **how)
    assert len(first) == len(second) == 4 and set(second.latents) == {1}
    both = read_corruptions(tmp_path)
    assert len(both) == 8 and set(both.latents) == {0, 1}
    with pytest.raises(ValueError, match='one draw of latents'):
        summarise(both, IMAGES.y, 'GFZ')
    of_one = summarise(second, IMAGES.y, 'GFZ')
    assert of_one.low.between(0, 1).all() and of_one.high.between(0, 1).all()
    gfz = both[both.model == 'GFZ']
    assert gfz.log_px.nunique() == 4  # another draw, another estimate
    assert gfz.auroc[gfz.corruption == 'clean'].eq(0.5).all()
    assert both[both.model == 'DFX'][['log_px', 'auroc']].isna().all(axis=None)
    own = models['GFZ'].fixed(0)
    log_px = own.log_marginal(IMAGES.x).double().mean().item()
    assert abs(gfz.log_px.iloc[0] - log_px) < 1e-2


def test_the_mean_corruption_error_of_the_baseline_is_one():
    rows = measure_corruptions(dict(cnn=linear(), b=linear(1)), IMAGES, corruptions=NAMES)
    table = summarise(rows, IMAGES.y)
    assert table.mce['cnn'] == 1 and (table.low < table.corrupted).all()
    assert (table.corrupted < table.high).all()
    errors = 1 - rows[rows.severity > 0].groupby(['model', 'corruption']).accuracy.mean()
    assert np.isclose(table.mce['b'], (errors['b'] / errors['cnn']).mean())
    with pytest.raises(ValueError, match='no rows of the baseline'):
        summarise(rows, IMAGES.y, 'vit')
    difference = compare(rows, IMAGES.y, 'b', 'cnn').difference
    assert np.isclose(difference['all'], table.corrupted['b'] - table.corrupted['cnn'])
    partial = rows[(rows.model == 'cnn') | (rows.corruption != 'fog')]
    with pytest.raises(ValueError, match='the same corruptions'):
        compare(partial, IMAGES.y, 'b', 'cnn')
    with pytest.raises(ValueError, match='labels for 12 images'):
        shares_right(rows[rows.model == 'b'], IMAGES.y[:5])


def test_holm_is_the_closed_test_of_bonferroni():
    "A hypothesis is rejected where Bonferroni rejects every intersection that it is part of"
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(5) ** 3
        sets = [s for k in range(1, 6) for s in combinations(range(5), k)]
        worth = {s: min(1, len(s) * min(p[list(s)])) for s in sets}
        expected = [max(worth[s] for s in sets if i in s) for i in range(5)]
        assert np.allclose(holm(p), expected, rtol=1e-12)
    assert holm(pd.Series([0.2])) == [0.2]


def test_shares_are_of_one_model():
    rows = measure_corruptions(dict(a=linear(), b=linear(1)), IMAGES, corruptions=NAMES)
    with pytest.raises(ValueError, match='of one model'):
        shares_right(rows, IMAGES.y)


def test_a_random_model_is_measured_twice_alike():
    net = linear()
    noisy = Counting(lambda x: net(x + 0.5 * torch.randn_like(x)))
    how = dict(corruptions=NAMES, severities=[3])
    one, other = (measure_corruptions(dict(m=noisy), IMAGES, **how) for _ in range(2))
    assert plain(one) == plain(other)
