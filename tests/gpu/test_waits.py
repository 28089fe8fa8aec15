"How often a step waits for the GPU: an `.item()` in a loop makes a test fail."

import re
from functools import partial
from inspect import signature

import pytest
import torch
from pretended_gpu import PretendedGPU
from small import MODELS, Plain, Stubborn, classifier, ready, some

from genrobust import attacks, cli
from genrobust.data import Images
from genrobust.training import make_optimiser, train_epoch

KINDS = dict(MODELS, normalised=lambda: attacks.Normalized(Plain(), 0.3, 0.5))
LONG = dict(binary_search_steps=1, c=1e-9, lr=0.01)
# Parameters for so many steps; and waits of one more of them
STEPS = dict(
    fmn=(lambda n: dict(steps=n), 0),
    ddn=(lambda n: dict(steps=n), 0),
    alma=(lambda n: dict(steps=n), 0),
    fab=(lambda n: dict(steps=n), 0),
    fab_to_two_targets=(lambda n: dict(steps=n, n_targets=2), 0),
    pgd=(lambda n: dict(steps=n, random_start=False), 0),
    pgd_that_stops=(lambda n: dict(steps=n, random_start=False, early_stop=True), 1),
    mim=(lambda n: dict(steps=n), 0),
    apgd=(lambda n: dict(steps=n), 0),
    deepfool=(lambda n: dict(steps=n), 1),
    deepfool_on_the_nearest=(lambda n: dict(steps=n, nearest=2), 1),
    truncated_deepfool=(lambda n: dict(steps=n), 1),
    superdeepfool=(lambda n: dict(steps=n, deepfool_steps=2), 1),
    carlini_wagner=(lambda n: dict(steps=n, **LONG), 1),
    zoo=(lambda n: dict(max_queries=9 * (n + 1) + 1, coordinates=4, **LONG), 1),
    spsa=(lambda n: dict(steps=n, samples=2), 1),
    square=(lambda n: dict(max_queries=n), 1),
    square_in_l2=(lambda n: dict(max_queries=n, p=2), 1),
)


# Parameters, and waits in all: for checks of what is given, and of what the model answers
WITHOUT_STEPS = dict(random_noise=({}, 6), fgsm=({}, 8), fgsm_in_l2=(dict(p=2), 8))


def attack_called(name):
    return getattr(attacks, re.sub('_that_stops|_in_l2|_to_two_targets|_on_the_nearest', '', name))


def test_every_attack_is_counted():
    counted = {attack_called(name) for name in (*STEPS, *WITHOUT_STEPS, 'hop_skip_jump')}
    assert counted == {getattr(attacks, name) for name in attacks.list_attacks()}


def count(name, kind, home='cuda', **given):
    "Waits of an attack that takes all its steps"
    model = KINDS[kind]().eval().requires_grad_(False)
    with PretendedGPU() as gpu:
        model = model.to('cuda')
        model = Stubborn(model.fixed(0) if kind == 'gfz' else model).to('cuda')
        x = some(3, home).x
        gpu.waits.clear()
        attack_called(name)(model, x, **given)
    return gpu.waits


def check_step(name, kind, more=0, **given):
    parameters, allowed = STEPS[name]
    few, many = (count(name, kind, **parameters(n), **given) for n in (1, 5))
    assert sum((many - few).values()) <= 4 * (allowed + more), many - few


@pytest.mark.parametrize('kind', ['plain', 'gfz'])
@pytest.mark.parametrize('name', STEPS)
def test_waits_of_a_step(name, kind):
    check_step(name, kind)


@pytest.mark.parametrize('name', ['pgd', 'apgd', 'ddn'])
def test_waits_of_a_step_on_normalised_images(name):
    check_step(name, 'normalised')


@pytest.mark.parametrize('name', STEPS)
def test_waits_of_a_step_to_a_target(name):
    "Who goes by two classes of GFZ's looks whether a third is ahead"
    check_step(name, 'gfz', more=name in ('fmn', 'ddn', 'alma'), target=3)


@pytest.mark.parametrize('name', STEPS)
def test_waits_of_a_step_on_record(name):
    "A trace stays on the GPU until the end"
    check_step(name, 'plain', trace=True)


WITH_RADII = [name for name in STEPS if 'eps' in signature(attack_called(name)).parameters]


@pytest.mark.parametrize('name', WITH_RADII)
def test_waits_of_a_step_within_radii(name):
    "Of each image, given on the CPU: they are moved once"
    check_step(name, 'plain', home='cpu', eps=torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize('name', WITHOUT_STEPS)
def test_waits_of_an_attack_without_steps(name):
    parameters, allowed = WITHOUT_STEPS[name]
    waits = count(name, 'plain', **parameters)
    assert sum(waits.values()) <= allowed, waits


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


# Adversaries, and waits of a step on a CNN
ADVERSARIES = dict(none=(None, 0), noise=(cli.noisy, 0), pgd=(partial(cli.pgd_start, steps=2), 2))


@pytest.mark.parametrize('adversary', ADVERSARIES)
@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('name', ['CNN', 'GFZ'])
def test_waits_of_a_step_of_training(name, amp, adversary):
    adversary, allowed = ADVERSARIES[adversary]
    allowed += bool(allowed) and name == 'GFZ'  # the latents of each step are drawn on the CPU
    counted = []
    for batches in (4, 8):
        model, images = classifier(name).to('cuda').train(), some(20 * batches, 'cuda')
        movers = make_optimiser(model, 1e-3)
        order = torch.arange(20 * batches, device='cuda').split(20)
        with PretendedGPU() as gpu:
            train_epoch(model, *movers, Images(*images), order, adversary, amp)
        counted.append(gpu.waits)
    more = counted[1] - counted[0]
    assert sum(more.values()) <= 4 * allowed, more
    assert sum(counted[0].values()) <= 3 + (4 * allowed + 7) * bool(allowed), counted[0]


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
