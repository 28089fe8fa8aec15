"On a GPU that refuses float64, as MPS does."

import math
from functools import partial

import pytest
import torch
from small import Plain, classifier, ready, some

from genrobust import numerics
from genrobust.attacks import ddn, pgd
from genrobust.corruptions import corrupt, measure_corruptions
from genrobust.data import Images
from genrobust.deceivers import Linear
from genrobust.diagnosis import EFFORTS, Effort
from genrobust.evaluation import evaluate, worst_case
from genrobust.evidence import BUDGETS, CHECKS, Trial, nearest_of_others
from genrobust.models import predict
from genrobust.referee import measured_sizes, smallest_eps
from genrobust.smoothing import certify


@pytest.fixture(autouse=True)
def without_float64(gpu, monkeypatch):
    if gpu.is_real:
        pytest.skip('this GPU has float64')
    gpu.has_float64 = False
    monkeypatch.setattr(numerics, '_WITHOUT_FLOAT64', {'cuda'})


def own_labels(model, x):
    return predict(model, x).argmax(1)


@pytest.mark.parametrize('eps', [None, 3.0, [1.0, 2.0, 3.0]])
def test_worst_case(home, eps):
    model, (x, _y) = ready(Plain()), some(3, home)
    eps = torch.tensor(eps, dtype=torch.float64) if isinstance(eps, list) else eps
    several = [partial(pgd, p=2, steps=2), partial(ddn, steps=20)]
    several = several[eps is None :]  # the first is within a ball
    found = worst_case(model, x, eps=eps, attacks=several)
    assert found.success.any() and found.x_adv.device.type == home


@pytest.mark.parametrize('name, p', [('GFZ', math.inf), ('CNN', 2)])
def test_evaluate(name, p, monkeypatch):
    monkeypatch.setitem(EFFORTS, 'quick', Effort(2, 5, 20, 20))
    model, (x, _y) = ready(classifier(name)), some(2, 'cpu')
    fixed = model.fixed(0) if name == 'GFZ' else model
    report = evaluate(model, x, own_labels(fixed, x), p=p, eps=0.5, size='quick', progress=False)
    assert report.distance.isfinite().all() and len(report.robust)


def test_evaluate_takes_images_in_float64():
    model, (x, _y) = ready(Plain()), some(4, 'cpu')
    how = dict(p=2, eps=0.5, size='quick', checks=False, progress=False)
    one, other = (evaluate(model, v, own_labels(model, x), **how) for v in (x, x.double().numpy()))
    assert one.distance.equal(other.distance) and one.distance.isfinite().all()


@pytest.mark.parametrize('name', ['GFZ', 'CNN'])
def test_checks_of_a_study(name, monkeypatch):
    few = dict(images=2, steps=2, scored=2, queries=20, climbs=2, problems=1, inner=20)
    few |= dict(draws=(1, 2), noisy=2, more=2, goals=1)
    monkeypatch.setitem(BUDGETS, 'quick', BUDGETS['quick']._replace(**few))
    model, (x, _y) = ready(classifier(name)), some(2, 'cpu')
    fixed = model.fixed(0) if name == 'GFZ' else model
    trial = Trial(model, x, own_labels(fixed, x), eps=0.1, size='quick')
    assert all(check(trial).verdict for check in CHECKS)


def test_measures(home):
    model, (x, y) = ready(Plain()), some(8, home)
    y = own_labels(model, x)
    assert corrupt(x, 'fog', 3).device.type == home
    few = dict(corruptions=['fog'], severities=(3,))
    assert len(measure_corruptions(dict(plain=model), Images(x, y), **few)) == 2
    assert certify(model, x[:1], sigma=0.25, n0=5, n=20).radius.dtype == torch.float64


def test_sizes_and_neighbours():
    model, (x, _y) = ready(Plain()), some(8, 'cuda')
    y = own_labels(model, x)
    found = smallest_eps(lambda eps: (x, eps > 1), x, 2, start=0.5, rounds=3)
    assert measured_sizes(model, x, y, found, 2).isinf().all()
    assert nearest_of_others(x, torch.arange(8, device='cuda') // 4).shape == (8, 1)
    linear = ready(Linear())
    assert linear.is_robust(x, own_labels(linear, x), 1e-6).any()
