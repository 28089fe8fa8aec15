"Models that deceive are named for what they do, honest ones are not, and evidence is measured."

import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from genrobust.attacks import apgd, fgsm, random_noise
from genrobust.data import load_or_synthetic
from genrobust.deceivers import (
    EXPECTED,
    OF_TWO_CLASSES,
    BatchDetector,
    Linear,
    Rounded,
    deceivers,
    honest_models,
)
from genrobust.diagnosis import (
    ATTACK_CHECKS,
    MODEL_CHECKS,
    AttackCase,
    ModelCase,
    binary_problem,
    cross_check,
    inspect_model,
)
from genrobust.evaluation import worst_case
from genrobust.models import load_pretrained

EPS = 0.05
HONEST = 'linear two_classes one_logit mlp_float64 tiny_cnn tiny_resnet tiny_transformer'.split()
HONEST += ['two_logits_mlp', 'one_logit_mlp']


@pytest.fixture(scope='module')
def splits():
    return load_or_synthetic()[1]


@pytest.fixture(scope='module')
def dishonest(splits):
    return deceivers(splits.train.x[:3000], splits.train.y[:3000])


@pytest.fixture(scope='module')
def honest(splits):
    return honest_models(splits.train.x[:3000], splits.train.y[:3000])


def images(splits, name='', n=24):
    x, y = splits.test
    i = (y < 2).nonzero()[:n, 0] if name in OF_TWO_CLASSES else torch.arange(n)
    return (x[i].double() if 'float64' in name else x[i]), y[i]


def names(cautions):
    return [caution.name for caution in cautions]


def attacked(model, x, y, eps=EPS, p=math.inf):
    "The result of an evaluation that is quick; of chance where there is no gradient"
    how = dict(p=p, eps=eps, allow_training=True)
    try:
        return worst_case(model, x, y, size='quick', **how)
    except ValueError as e:
        assert 'no gradient' in str(e)
        return worst_case(model, x, y, attacks=[random_noise], **how)


def all_cautions(model, x, y, eps=EPS, p=math.inf):
    found = inspect_model(model, x, y, size='quick')
    return found + cross_check(model, x, y, p, eps, attacked(model, x, y, eps, p), size='quick')


# --- who deceives and who does not


@pytest.mark.parametrize('name', EXPECTED)
def test_each_deceiver_is_named_for_what_it_does(dishonest, splits, name):
    x, y = images(splits, name)
    found = inspect_model(dishonest[name], x, y, size='quick')
    assert EXPECTED[name] in names(found)
    assert all(math.isfinite(c.evidence) and c.evidence > 0 and c.advice for c in found)


@pytest.mark.parametrize('eps, p', [(EPS, math.inf), (1.0, 2)])
@pytest.mark.parametrize('name', HONEST)
def test_there_is_no_false_alarm_on_small_honest_models(honest, splits, name, eps, p):
    assert all_cautions(honest[name], *images(splits, name), eps, p) == []


@pytest.mark.parametrize('name', ['cnn', 'cnn_at'])
def test_there_is_no_false_alarm_on_trained_models(fashion, name):
    assert all_cautions(load_pretrained(name, device='cpu'), *images(fashion, n=12)) == []


@pytest.mark.parametrize('name', ['gfz', 'dfz'])
def test_deep_bayes_classifiers_are_random_and_nothing_else(fashion, name):
    model, (x, y) = load_pretrained(name, device='cpu'), images(fashion, n=3)
    assert names(all_cautions(model, x, y, eps=0.3)) == ['random_answers']


AROUND_LINEAR = [name for name in EXPECTED if not name.startswith(('expects', 'k_', 'one_'))]


@pytest.mark.parametrize('name', AROUND_LINEAR)
def test_a_robust_accuracy_that_is_wrong_never_comes_without_a_caution(
    dishonest, honest, splits, name
):
    x, y = images(splits)
    truth = honest['linear'].is_robust(x, y, EPS).sum().item()
    result = attacked(dishonest[name], x, y)
    standing = (result.attacked & ~result.success).sum().item()
    found = cross_check(dishonest[name], x, y, math.inf, EPS, result, size='quick')
    assert standing <= truth + 2 or found, (standing, truth)
