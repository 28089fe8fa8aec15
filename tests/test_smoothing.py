"Certificates: what they are counts of, and what a measurement leaves on disk."

import math

import pandas as pd
import pytest
import torch
from torch import nn

from genrobust.data import Splits, synthetic
from genrobust.files import read_folder
from genrobust.models import CNN, BayesClassifier, save_model
from genrobust.smoothing import (
    Certificate,
    Smoothed,
    certified_accuracy,
    certify,
    count_classes,
    measure_attacked,
    measure_smoothing,
    measure_split,
    predict_split,
)

SMALL = dict(latent=4, hidden=8, n_samples=2, n_classes=3)


class Recorder(nn.Module):
    "Two classes, by the mean of an image; keeps what it was given"

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, x):
        self.given.append(x.clone())
        mean = x.flatten(1).mean(1)
        return torch.stack([-mean, mean], 1)


def test_the_noise_is_gaussian_unclipped_and_of_the_size_asked_for():
    model, x = Recorder().eval(), torch.zeros(2, 1, 28, 28)
    count_classes(model, x, sigma=0.3, n=500)
    noise = torch.cat(model.given)
    assert noise.shape == (1000, 1, 28, 28) and noise.min() < -1
    assert abs(noise.std().item() / 0.3 - 1) < 0.01 and abs(noise.mean().item()) < 0.002
    assert noise.flatten(1).unique(dim=0).shape[0] == 1000  # no copy has the noise of another
    kurtosis = (noise / 0.3).pow(4).mean().item()
    assert abs(kurtosis - 3) < 0.05


def test_selection_and_bound_see_different_copies():
    model, x = Recorder().eval(), torch.zeros(1, 1, 28, 28)
    certify(model, x, sigma=1.0, n0=50, n=200, batch_size=25)
    rows = torch.cat(model.given).flatten(1)
    assert len(rows) == 250 == len(rows.unique(dim=0))


def test_counts_do_not_depend_on_the_batch_and_images_differ():
    model, x = Recorder().eval(), torch.zeros(3, 1, 8, 8)
    whole = count_classes(model, x, sigma=1.0, n=300)
    numbers = torch.tensor([2])
    assert torch.equal(whole[2:], count_classes(model, x[2:], sigma=1.0, n=300, numbers=numbers))
    assert torch.equal(whole, count_classes(model, x, sigma=1.0, n=300, batch_size=7))
    parts = [count_classes(model, x, sigma=1.0, n=k, first=f) for k, f in ((100, 0), (200, 100))]
    assert torch.equal(whole, sum(parts))
    assert len({tuple(row) for row in whole.tolist()}) > 1
    assert not torch.equal(whole, count_classes(model, x, sigma=1.0, n=300, seed=1))
    assert (whole.sum(1) == 300).all()


def test_a_stochastic_model_resamples_its_latents_for_every_copy():
    clf = BayesClassifier('GFZ', **SMALL, seed=0).eval()
    x = torch.rand(1, 1, 28, 28)
    seen = []
    clf.register_forward_hook(lambda module, given, logits: seen.append(logits))
    count_classes(clf, x, sigma=1e-9, n=40)  # noise too small to tell copies apart
    logits = torch.cat(seen)
    assert len(logits.unique(dim=0)) == 40
    first = count_classes(clf, x, sigma=0.5, n=60)
    torch.randn(5)
    assert torch.equal(first, count_classes(clf, x, sigma=0.5, n=60))


def test_a_certificate_abstains_unless_the_bound_is_above_a_half():
    counts = torch.tensor([[500, 500], [600, 400], [1000, 0], [400, 600], [0, 1000]])
    certificate = Certificate(torch.tensor([0, 0, 0, 0, 1]), counts, sigma=2.0)
    assert certificate.y.tolist() == [-1, 0, 0, -1, 1]
    assert certificate.radius[0] == certificate.radius[3] == 0
    largest = 2 * torch.special.ndtri(torch.tensor(0.001 ** (1 / 1000), dtype=torch.double))
    assert torch.allclose(certificate.radius[[2, 4]], largest)
    assert (Certificate(certificate.selected, counts, 2.0, 0.05).radius >= certificate.radius).all()
    labels, radii = [0, 0, 0, 1, 0], [0, largest - 0.01, 9]
    table = certified_accuracy(certificate, labels, radii)
    assert table.equals(certified_accuracy(certificate, torch.tensor(labels), radii))
    assert table.accuracy.tolist() == [0.4, 0.2, 0.0]
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()
    again = Certificate.from_frame(certificate.to_frame())
    assert torch.equal(again.counts, counts) and torch.equal(again.radius, certificate.radius)


def test_the_surrogate_is_the_mean_over_its_noise():
    model, x = Recorder().eval(), torch.rand(5, 1, 8, 8)
    surrogate = Smoothed(model, 0.5, draws=4, seed=3)
    log_p = surrogate(x)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(5), atol=1e-6)
    assert torch.allclose(log_p[3:4], surrogate(x[3:4]), atol=1e-6)
    assert not torch.allclose(log_p, Smoothed(model, 0.5, draws=4, seed=4)(x))
    narrow = Smoothed(model, 1e-9, draws=4)(x)
    assert torch.allclose(narrow, model(x).log_softmax(1), atol=1e-6)
    clf = BayesClassifier('GFZ', **SMALL).eval()
    images = torch.rand(2, 1, 28, 28)
    fixed = Smoothed(clf, 0.1, draws=3)
    assert torch.equal(fixed(images), fixed(images))


def test_noise_reaches_one_reader_of_the_image_only():
    clf = BayesClassifier('GFZ', **SMALL, seed=0).eval()
    x, other = torch.rand(2, 4, 1, 28, 28)
    noise = torch.randn(4, 3, 2, 4)
    clf._draw = lambda *shape: noise[: shape[0]]
    split = predict_split(clf, x, other)
    terms = {}
    for name, images in (('density', x), ('encoder', other)):
        terms[name] = clf._posterior(images[:, None], clf.labels[None])
    mean, log_sigma = terms['encoder']
    z = mean + log_sigma.exp() * noise
    labels = clf.labels[None]
    log_q = -0.5 * noise.square() - log_sigma - 0.5 * math.log(2 * math.pi)
    total = clf._log_px(x[:, None], labels, z) + clf._log_py(x[:, None], labels, z)
    total = total + clf._log_pz(x[:, None], labels, z) - log_q.sum(-1)
    assert torch.allclose(split, total.logsumexp(-1) - math.log(2), atol=1e-3)
    assert not torch.allclose(split, clf(x), atol=1e-3)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    "Two small models; and a data set that is small too"
    few = Splits(*[synthetic(60)] * 3)
    monkeypatch.setattr('genrobust.smoothing.load', lambda name, root: few)
    paths = dict(net=tmp_path / 'net.safetensors', bayes=tmp_path / 'bayes.safetensors')
    save_model(CNN(hidden=8), paths['net'])
    save_model(BayesClassifier('GFZ', latent=4, hidden=8, n_samples=1), paths['bayes'])
    return paths


def test_a_measurement_goes_on_where_it_ended(weights, tmp_path):
    how = dict(n0=5, n=20, data='synthetic', device='cpu', say=lambda text: None)
    once, twice = tmp_path / 'once', tmp_path / 'twice'
    measure_smoothing([weights['net']], [0.5], 45, folder=once, **how)
    for images, parts in ((18, 4), (40, 5), (45, 1)):
        said = []
        how['say'] = said.append
        measure_smoothing([weights['net']], [0.5], images, folder=twice, **how)
        assert len(said) == parts
    pd.testing.assert_frame_equal(read_folder(once), read_folder(twice))
    rows = read_folder(once)
    assert rows.image.tolist() == list(range(45))
    assert (rows.filter(regex='^c[0-9]').sum(axis=1) == 20).all()
    before = (once / 'net-0.5.csv').read_bytes()
    for other in (dict(n=21), dict(seed=1), dict(n0=6)):
        with pytest.raises(ValueError, match='another folder'):
            measure_smoothing([weights['net']], [0.5], 60, folder=once, **how | other)
    save_model(CNN(hidden=8, seed=1), weights['net'])
    with pytest.raises(ValueError, match='weights'):
        measure_smoothing([weights['net']], [0.5], 60, folder=once, **how)
    assert (once / 'net-0.5.csv').read_bytes() == before


@pytest.mark.parametrize('measure', [measure_smoothing, measure_attacked, measure_split])
def test_more_images_than_there_are_are_refused_before_any_work(measure, weights, tmp_path):
    how = dict(folder=tmp_path / 'new', data='synthetic', device='cpu', say=lambda text: None)
    with pytest.raises(ValueError, match='images must be a finite number from 1 to 60, found 61'):
        measure([weights['bayes']], [0.5], 61, **how)
    assert not (tmp_path / 'new').exists()


def test_a_sigma_of_any_length_is_found_again(weights, tmp_path):
    how = dict(folder=tmp_path, data='synthetic', n0=2, n=4, say=lambda text: None, device='cpu')
    for images in (2, 3):
        measure_smoothing([weights['net']], sigmas=[1 / 3], images=images, **how)
    (file,) = tmp_path.glob('*-*.csv')
    assert pd.read_csv(file).sigma.eq(1 / 3).all()


def test_all_measurements_take_a_bayes_classifier(weights, tmp_path):
    how = dict(data='synthetic', device='cpu', say=lambda text: None)
    folders = [tmp_path / name for name in ('attacked', 'split')]
    small = dict(n0=5, n=30, draws=2, steps=2)
    measure_attacked([weights['bayes']], [0.5], 3, folder=folders[0], **small, **how)
    rows = read_folder(folders[0])
    assert len(rows) == 3 and (rows.l2[rows.certified != rows.y] == 0).all()
    assert (rows.l2 > rows.radius)[rows.certified == rows.y].all()
    measure_split([weights['bayes']], [0.5], 6, folder=folders[1], **how)
    table = read_folder(folders[1])
    kinds = list(zip(table.sigma, table.encoder, table.densities))
    assert kinds == [
        (0, 'clean', 'clean'),
        (0.5, 'noisy', 'clean'),
        (0.5, 'clean', 'noisy'),
        (0.5, 'noisy', 'noisy'),
    ]
    assert (table.images == 6).all() and table.correct.between(0, 6).all()
    measure_split([weights['bayes']], [0.25], 6, folder=folders[1], **how)
    longer = read_folder(folders[1])
    pd.testing.assert_frame_equal(longer[:4], table)
    assert longer.sigma[4:].tolist() == [0.25] * 3
    with pytest.raises(ValueError, match='holds rows of seed'):
        measure_split([weights['bayes']], [0.5], 6, folder=folders[1], seed=1, **how)


def test_one_logit_is_smoothed_as_two():
    one = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).eval()
    x = torch.randn(40, 1, 4, 4)
    answers = Smoothed(one, 1e-6, draws=4)(x).argmax(1)
    assert torch.equal(answers, (one(x)[:, 0] > 0).long()) and 0 < answers.sum() < 40
