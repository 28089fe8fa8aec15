"How often a step waits for the GPU: an `.item()` in a loop makes a test fail."

import re

import pytest
import torch
from pretended_gpu import PretendedGPU
from small import MODELS, Plain, Stubborn, classifier, ready, some

from genrobust import attacks
from genrobust.data import Images
from genrobust.training import make_optimiser, train_epoch

LONG = dict(binary_search_steps=1, c=1e-9, lr=0.01)
# Parameters for so many steps; and waits of one more of them
STEPS = dict(
    fmn=(lambda n: dict(steps=n), 0),
    ddn=(lambda n: dict(steps=n), 0),
    alma=(lambda n: dict(steps=n), 0),
    fab=(lambda n: dict(steps=n), 0),
    pgd=(lambda n: dict(steps=n, random_start=False), 0),
    pgd_that_stops=(lambda n: dict(steps=n, random_start=False, early_stop=True), 1),
    mim=(lambda n: dict(steps=n), 0),
    apgd=(lambda n: dict(steps=n), 0),
    deepfool=(lambda n: dict(steps=n), 1),
    superdeepfool=(lambda n: dict(steps=n, deepfool_steps=2), 1),
    carlini_wagner=(lambda n: dict(steps=n, **LONG), 1),
    zoo=(lambda n: dict(max_queries=9 * (n + 1) + 1, coordinates=4, **LONG), 1),
    spsa=(lambda n: dict(steps=n, samples=2), 1),
    square=(lambda n: dict(max_queries=n), 1),
    square_in_l2=(lambda n: dict(max_queries=n, p=2), 1),
)


@pytest.mark.parametrize('kind', ['plain', 'gfz'])
@pytest.mark.parametrize('name', STEPS)
def test_waits_of_a_step(name, kind):
    parameters, allowed = STEPS[name]
    attack, counted = getattr(attacks, re.sub('_that_stops|_in_l2', '', name)), []
    for n in (5, 9):
        model = MODELS[kind]().eval().requires_grad_(False)
        with PretendedGPU() as gpu:
            model = model.to('cuda')
            model = Stubborn(model.fixed(0) if kind == 'gfz' else model)
            model.to('cuda')
            x = some(3, 'cuda').x
            gpu.waits.clear()
            attack(model, x, **parameters(n))
        counted.append(gpu.waits)
    more = counted[1] - counted[0]
    assert sum(more.values()) <= 4 * allowed, more


def test_waits_of_hop_skip_jump():
    "A round, of a normal, a jump and a bisection, waits three times, and once in each try to jump"
    counted = []
    for n in (100, 200):
        with PretendedGPU() as gpu:
            model, x = ready(Plain()), some(3, 'cuda').x
            gpu.waits.clear()
            found = attacks.hop_skip_jump(model, x, max_queries=n, samples=8, init_queries=5)
        counted.append(gpu.waits)
    assert found.success.all()
    more = counted[1] - counted[0]
    assert sum(more.values()) <= 30, more


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('name', ['CNN', 'GFZ'])
def test_waits_of_a_step_of_training(name, amp):
    counted = []
    for batches in (4, 8):
        model, images = classifier(name).to('cuda').train(), some(20 * batches, 'cuda')
        movers = make_optimiser(model, 1e-3)
        order = torch.arange(20 * batches, device='cuda').split(20)
        with PretendedGPU() as gpu:
            train_epoch(model, *movers, Images(*images), order, None, amp)
        counted.append(gpu.waits)
    assert not counted[1] - counted[0], counted[1] - counted[0]
    assert sum(counted[0].values()) <= 3, counted[0]


def test_detectors_hold_their_statistics_on_the_gpu(gpu):
    from small import Prototypes

    from genrobust.adaptive import DetectorAugmented
    from genrobust.detection import fit_detectors

    model = ready(Prototypes())
    for detector in fit_detectors(model, some(120, 'cpu'), some(80, 'cpu', 120)).values():
        view, x = DetectorAugmented(model, detector), some(3, 'cuda').x
        view(x)
        gpu.waits.clear()
        view(x)
        assert not gpu.waits, gpu.report()
