"The referee: optimality is an area, no credit for what is no adversarial example, runs that go on."

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import trapezoid
from torch import nn

from genrobust import referee
from genrobust.attacks import deepfool, fgsm, pgd
from genrobust.bench import PassCounter
from genrobust.files import read_folder
from genrobust.models import CNN, save_model
from genrobust.referee import (
    CONTESTANTS,
    Contestant,
    measure_optimality,
    measured_sizes,
    one_radius,
    optimality,
    optimality_table,
    robustness_curve,
    run_contestant,
    smallest_eps,
)


class Plane(nn.Module):
    "Two classes; an image whose first pixel is below a half is of class 0"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, x):
        far = self.weight * (x.flatten(1)[:, 0] - 0.5)
        return torch.stack([-far, far], 1)


@pytest.fixture
def plane():
    x = torch.full((4, 1, 2, 2), 0.2)
    x[:, 0, 0, 0] = torch.tensor([0.1, 0.2, 0.4, 0.7])
    return Plane().eval(), x, torch.zeros(4, dtype=torch.long)  # the last one is misclassified


def test_optimality_counts_images_that_were_misclassified_before():
    "They lower all areas alike, by nothing: clean accuracy is where every curve begins"
    assert optimality([0, 2, 2, 3], [0, 1, 2, 3]) == pytest.approx(optimality([2, 2, 3], [1, 2, 3]))


def test_optimality_is_the_integral_of_the_curves():
    rng = np.random.default_rng(0)
    found = rng.exponential(size=(3, 50))
    envelope, eps = found.min(0), np.linspace(0, found.min(0).max(), 200_001)
    areas = [trapezoid(robustness_curve(sizes, eps), eps) for sizes in (found[0], envelope)]
    expected = 1 - (areas[0] - areas[1]) / (eps[-1] - areas[1])
    assert optimality(found[0], envelope) == pytest.approx(expected, abs=1e-4)


def test_logits_that_are_no_numbers_are_no_success(plane):
    model, x, y = plane
    moved = x.clone()
    moved[:, 0, 0, 0] = 0.9
    assert measured_sizes(model, x, y, moved, 2)[:3].isfinite().all()
    undefined = lambda v: model(v).masked_fill(model(v) > 0.3, math.nan)
    assert measured_sizes(undefined, x, y, moved, 2).tolist() == [math.inf] * 3 + [0]


def test_only_successes_within_the_bounds_count(plane):
    "Not the image itself, a point beyond the bounds, or what is no number; rounding is forgiven"
    model, x, y = plane
    claims = x.clone()
    claims[1, 0, 0, 0], claims[2] = 1.001, math.nan
    assert measured_sizes(model, x, y, claims, 2).tolist() == [math.inf] * 3 + [0]
    claims = x.clone()
    claims[:, 0, 0, 0] = 1 + 1e-7
    sizes = measured_sizes(model, x, y, claims, 2)
    assert torch.allclose(sizes[:3], torch.tensor([0.9, 0.8, 0.6]).double())


@pytest.mark.parametrize('p', [2, math.inf])
def test_sizes_are_of_double_precision(plane, p):
    model, x, y = plane
    moved = x.clone()
    moved[:, 0, 0, 0] = 0.6
    expected = (moved.double() - x.double())[:3, 0, 0, 0]
    sizes = measured_sizes(model, x, y, moved, p)
    assert sizes.dtype == torch.float64 and torch.equal(sizes[:3], expected)


def test_bisection_finds_the_radius(plane):
    model, x, y = plane
    x, y = x[:3], y[:3]

    def within(i, eps):
        result = pgd(model, x[i], y[i], eps=eps, p=2, steps=3, random_start=False, loss='ce')
        return result.x_adv, result.success

    found = smallest_eps(one_radius(within), x, 2, start=0.05, rounds=16)
    sizes = measured_sizes(model, x, y, found, 2)
    assert torch.allclose(sizes, torch.tensor([0.4, 0.3, 0.1]).double(), atol=1e-3)


def test_bisection_of_an_attack_that_never_succeeds(plane):
    _, x, _ = plane
    found = smallest_eps(lambda eps: (x, eps > math.inf), x, 2, 1, 3)
    assert torch.equal(found, x)


def test_passes_of_other_libraries_are_counted_and_ours_are_those_of_the_result(plane, monkeypatch):
    model, x, y = plane

    def other(model, x, y, p, passes):
        x = x.requires_grad_()
        for _ in range(passes // 2):
            torch.autograd.grad(model(x)[:, 1].sum(), x)
        return x.detach() + torch.eye(4)[0].view(1, 2, 2)

    monkeypatch.setitem(CONTESTANTS, 'pandas.other', Contestant(other))
    found = run_contestant('pandas.other', model, x, y, 2, 10)
    assert found['forwards'].tolist() == found['backwards'].tolist() == [5, 5, 5, 0]
    assert found['size'].tolist() == [math.inf] * 3 + [0]  # pixels above 1
    ours = run_contestant('genrobust.deepfool', model, x, y, 2.0, 100)
    result = deepfool(model, x[:3], y[:3])
    assert ours['forwards'].tolist() == [*result.forwards.tolist(), 0]
    assert ours['size'][:3] == pytest.approx(result.l2.double().numpy())


def test_a_vectorised_backward_pass_is_not_counted_as_one(plane):
    model, x, _ = plane
    logits = PassCounter(model)(x.requires_grad_())
    with pytest.raises(RuntimeError, match='cannot be counted'):
        torch.autograd.grad(logits, x, torch.ones(2, 4, 2), is_grads_batched=True)


@pytest.fixture
def contestants(monkeypatch):
    "Two of our attacks, one that breaks, one that is not installed"

    def broken(model, x, y, p, passes):
        raise ZeroDivisionError('no luck')

    some = {
        'genrobust.deepfool': CONTESTANTS['genrobust.deepfool'],
        'genrobust.fgsm': Contestant(lambda model, x, y, p, n: fgsm(model, x, y), ('linf',)),
        'pandas.broken': Contestant(broken),
        'no_such_library.ddn': Contestant(broken),
    }
    monkeypatch.setattr(referee, 'CONTESTANTS', some)
    return some


def test_a_run_that_was_ended_goes_on(contestants, tmp_path):
    save_model(CNN(hidden=8), tmp_path / 'small.safetensors')
    models, told = [str(tmp_path / 'small.safetensors')], []
    how = dict(out=str(tmp_path / 'results'), say=told.append, norms=['linf'])
    folder = measure_optimality(models, images=6, attacks=['genrobust.fgsm'], **how)
    file = next(folder.glob('*fgsm*.csv'))
    before = file.read_text()
    measure_optimality(models, images=10, **how)
    assert file.read_text().startswith(before) and len(pd.read_csv(file)) == 10
    assert any('no_such_library.ddn is left out' in line for line in told)
    assert any('pandas.broken failed' in line and 'no luck' in line for line in told)
    told.clear()
    measure_optimality(models, images=10, attacks=['genrobust.fgsm', 'genrobust.deepfool'], **how)
    assert not [line for line in told if 'of 10 images' in line]  # nothing was left to do
    frame = read_folder(folder)
    assert set(frame.attack) == {'fgsm', 'deepfool'} and len(frame) == 20
    table = optimality_table(frame)
    assert table.optimality[0] <= 1 and table.best.max() > 0 and len(table) == 2


def test_an_error_that_is_not_of_another_library_ends_the_run(contestants, tmp_path):
    "A bug of ours, or a table that cannot be read, is not told as a failed attack"
    path, how = tmp_path / 'small.safetensors', dict(out=str(tmp_path), say=str, norms=['linf'])
    save_model(CNN(hidden=8), path)
    (tmp_path / 'small-linf-pandas.broken-1000.csv').write_text('image\n"')
    with pytest.raises(ValueError, match='EOF'):
        measure_optimality([str(path)], attacks=['pandas.broken'], images=2, **how)
    contestants['genrobust.broken'] = contestants['pandas.broken']
    with pytest.raises(ZeroDivisionError, match='no luck'):
        measure_optimality([str(path)], attacks=['genrobust.broken'], images=2, **how)


def test_results_of_other_weights_are_not_mixed(contestants, tmp_path):
    path, how = tmp_path / 'small.safetensors', dict(out=str(tmp_path / 'results'), say=str)
    how |= dict(images=2, attacks=['genrobust.fgsm'], norms=['linf'])
    save_model(CNN(hidden=8), path)
    measure_optimality([str(path)], **how)
    save_model(CNN(hidden=9), path)
    with pytest.raises(ValueError, match='other weights'):
        measure_optimality([str(path)], **how)


@pytest.mark.parametrize(
    'given, text',
    [
        (dict(norms=['l3']), "no norm 'l3'"),
        (dict(attacks=['tennis']), 'no contestant'),
        (dict(images=0), 'images must be'),
        (dict(passes=0), 'passes must be'),
        (dict(images=10_001), 'images must be'),
    ],
)
def test_bad_input_is_one_error_and_leaves_no_folder(given, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        measure_optimality(out=str(tmp_path / 'new'), **given)
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('name', [n for n in CONTESTANTS if not n.startswith('genrobust.')])
def test_other_libraries_find_adversarial_examples(name, plane):
    "Of a small network, where they are installed"
    if referee._version(name) is None:
        pytest.skip(f'{name} is not installed')
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10)).eval().requires_grad_(False)
    x = torch.rand(5, 1, 4, 4)
    y = model(x).argmax(1)
    for norm_name in CONTESTANTS[name].norms:
        found = run_contestant(name, model, x, y, referee.NORMS[norm_name], 200)
        assert np.isfinite(found['size']).mean() >= 0.6, (name, norm_name, found)
        assert 0 < found['forwards'].mean() + found['backwards'].mean() < 600
