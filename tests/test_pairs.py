"Margins and their gradients through the two classes that make them, of ten."

import math

import pytest
import torch
from under_attack import ByClass, each, elsewhere, images, make_net

from genrobust.attacks import (
    AttackState,
    Normalized,
    PairMargin,
    Start,
    alma,
    apgd,
    carlini_wagner,
    ddn,
    deepfool,
    fgsm,
    margin,
    mim,
    pgd,
)
from genrobust.attacks.engine import Batch
from genrobust.models import FACTORISATIONS, BayesClassifier, predict


def small_bayes(name='GFZ', n_samples=3):
    torch.manual_seed(0)
    return BayesClassifier(name, hidden=16, latent=4, n_samples=n_samples).double().eval()


def state_of(model, x, target=None):
    logits = model(x).detach()
    return AttackState(
        model, Start(logits), Batch(x, logits.argmax(1), target, torch.arange(len(x)))
    )


@pytest.mark.parametrize('name', list(FACTORISATIONS))
def test_two_classes_give_the_whole_margin_and_its_gradient(name):
    model, x = small_bayes(name).fixed(1), torch.rand(3, 1, 28, 28).double()
    state = state_of(model, x)
    pairs = PairMargin(state)
    logits, g = pairs.gradient(state.margin, x, state.all)
    whole, expected = state.gradient(state.margin, x, state.all)
    assert torch.allclose(
        state.margin(logits, state.all), state.margin(whole, state.all), atol=1e-10
    )
    assert torch.allclose(g, expected, atol=1e-10) and g.abs().max() > 0
    assert (logits.argmax(1) == whole.argmax(1)).all()
    other = torch.rand_like(x)
    pairs.choose_pairs(other, state.all)
    logits, g = pairs.gradient(state.margin, other, state.all)
    whole, expected = state.gradient(state.margin, other, state.all)
    assert torch.allclose(
        state.margin(logits, state.all), state.margin(whole, state.all), atol=1e-10
    )
    assert torch.allclose(g, expected, atol=1e-10)


@pytest.mark.parametrize('p', [1, 2, math.inf])
def test_deepfool_decodes_the_label_and_the_nearest_classes_alone(p):
    model, x = small_bayes().fixed(1), torch.rand(4, 1, 28, 28).double()
    every, near = deepfool(model, x, p=p), deepfool(model, x, p=p, nearest=3)
    assert near.success.all() and (predict(model, near.x_adv).argmax(1) == near.y_adv).all()
    steps = every.backwards - 1  # after the first, of four classes in ten
    assert (near.backwards == 1 + -(-4 * steps // 10)).all() and (steps > 1).any()
    assert torch.allclose(near.x_adv, every.x_adv)


@pytest.mark.parametrize('name', list(FACTORISATIONS))
def test_logits_of_some_classes_are_those_of_all(name):
    clf, x = small_bayes(name), torch.rand(3, 1, 28, 28).double()
    model, classes = clf.fixed(2), torch.tensor([[7, 0], [3, 9], [5, 5]])
    copies = x[:, None].expand(-1, 2, -1, -1, -1)
    assert torch.allclose(
        model.per_class_logits(copies, classes), model(x).gather(1, classes), atol=1e-10
    )
    averaged = clf.averaged(3, 1)
    assert torch.allclose(
        averaged.per_class_logits(copies, classes), averaged(x).gather(1, classes), atol=1e-10
    )


def test_a_third_class_that_wins_is_no_success_for_a_target():
    "Class 2 overtakes both of the pair (0, 1) on the straight way to the target"
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.3], [2.0, -2.0]])
    model = ByClass(weight, torch.tensor([0.0, -0.5, -0.7]))
    x, target = torch.tensor([[0.1, 0.1]]), torch.tensor([1])
    state = state_of(model, x, target)
    pairs, there = PairMargin(state), torch.tensor([[0.7, 0.1]])
    logits, _ = pairs.gradient(state.margin, there, state.all)
    assert model(there).argmax(1) == 2 and not state.is_adversarial(logits, state.all)
    assert torch.allclose(logits, model(there)) and pairs.classes.tolist() == [[2, 1]]
    result = ddn(model, x, target=1)
    assert result.success.all() and model(result.x_adv).argmax(1) == 1
    plain = ddn(lambda x: model(x), x, target=1)
    assert torch.allclose(result.l2, plain.l2, rtol=0.05)


def test_the_margin_of_a_pair_is_never_below_that_of_all():
    model, x = small_bayes().fixed(0), torch.rand(4, 1, 28, 28).double()
    state = state_of(model, x)
    pairs = PairMargin(state)
    for _ in range(5):
        there = torch.rand_like(x)
        logits, _ = pairs.gradient(state.margin, there, state.all)
        true = margin(model(there), state.y)
        assert (state.margin(logits, state.all) >= true - 1e-10).all()


def test_passes_through_pairs_are_counted_by_class():
    torch.manual_seed(0)
    model = ByClass(torch.randn(10, 6), torch.randn(10))
    x = torch.rand(5, 6)
    result = ddn(model, x, steps=30, refresh=10)
    assert model.classes == 5 * 30 * 2
    assert (result.backwards == 1 + 6).all()  # the Jacobian, and a fifth of 30
    looks = 3 + 1  # and the last point
    assert ((result.forwards - 1 - 6 - looks >= 0) & (result.forwards - 1 - 6 - looks <= 1)).all()
    assert model.whole == result.forwards.sum() - 5 * 6


def test_models_without_pairs_are_evaluated_whole():
    model, x = elsewhere()
    state = state_of(model, x)
    pairs = PairMargin(state)
    pairs.choose_pairs(x, state.all)
    assert not pairs.is_partial and not state.forwards.any()
    logits, g = pairs.gradient(state.margin, x, state.all)
    assert torch.equal(logits, model(x)) and (state.forwards == 1).all() and g.shape == x.shape


def test_pairs_of_a_normalised_classifier():
    clf = small_bayes().fixed(0)
    x = torch.rand(2, 1, 28, 28).double()
    state = state_of(Normalized(clf, 0.1, 0.9), x)
    pairs = PairMargin(state)
    assert pairs.is_partial
    whole, expected = state.gradient(state.margin, x, state.all)
    assert torch.allclose(pairs.gradient(state.margin, x, state.all)[1], expected, atol=1e-10)


@each([alma, ddn])
def test_pairs_and_all_classes_lead_to_the_same_distance(attack):
    clf, x = small_bayes().fixed(0), torch.rand(2, 1, 28, 28).double()
    fast, slow = (attack(model, x, steps=12) for model in (clf, lambda x: clf(x)))
    assert torch.equal(fast.success, slow.success)
    assert torch.allclose(fast.l2[fast.success], slow.l2[fast.success], rtol=0.05)
    assert (fast.backwards < slow.backwards).all()


# --- in attacks


def linear(classes):
    torch.manual_seed(1)
    return ByClass(torch.randn(classes, 64, dtype=torch.double))


@each([fgsm, pgd, mim, apgd])
@pytest.mark.parametrize('target', [None, 1], ids=['untargeted', 'targeted'])
@pytest.mark.parametrize('classes', [2, 4])
def test_the_margin_of_pairs_is_that_of_all_classes(attack, target, classes):
    model, x = linear(classes), images(20).double()
    y = model(x).argmax(1)
    x, y = (x[y != 1], y[y != 1]) if target else (x, y)
    few = {} if attack is fgsm else dict(steps=10)
    how = dict(eps=0.3, loss='margin', target=target, **few)
    pair, plain = attack(model, x, y, **how), attack(lambda x: model(x), x, y, **how)
    assert pair.success.sum() >= plain.success.sum() - 3 and pair.success.any()
    assert torch.equal(pair.y_adv, model(pair.x_adv).argmax(1))
    if classes == 2:
        assert torch.allclose(pair.x_adv, plain.x_adv, atol=1e-9)


def test_a_margin_of_pairs_costs_less():
    model, x = linear(10), images(20).double()
    for attack in (apgd, carlini_wagner):
        how = dict(steps=40, **(dict(loss='margin') if attack is apgd else {}))
        pair, plain = attack(model, x, **how), attack(lambda x: model(x), x, **how)
        assert pair.backwards.sum() < plain.backwards.sum() / 2
        assert torch.equal(pair.success, plain.success)


def test_of_two_classes_all_losses_find_the_same():
    two, x = make_net(classes=2).double(), images(8).double()
    for attack in (pgd, mim, apgd):
        one, other = (attack(two, x, eps=0.1, steps=10, **own) for own in ({}, dict(loss='margin')))
        assert torch.equal(one.success, other.success)
