"Random numbers of attacks: statistics, and what they may depend on."

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from genrobust.attacks.engine import AttackState, Batch, Start
from genrobust.attacks.random_numbers import Keys, normal, signs, uniform
from genrobust.attacks.score_based import random_directions

DRAWS = [uniform, normal, signs]
each_draw = pytest.mark.parametrize('draw', DRAWS, ids=lambda f: f.__name__)


def keys(seed=0, positions=2000, uses=10):
    return Keys(seed, torch.arange(positions)[:, None], torch.arange(uses))


@each_draw
def test_numbers_depend_on_seed_position_and_use_alone(draw):
    whole = draw(keys(), 3, 5)
    some = Keys(0, torch.tensor([[1999], [7]]), torch.tensor([9, 0, 4]))
    assert torch.equal(draw(some, 3, 5), whole[[[1999], [7]], [9, 0, 4]])
    one = draw(Keys(0, torch.tensor(7), torch.tensor(4)), 3, 5)
    assert torch.equal(one, whole[7, 4]) and one.shape == (3, 5)
    assert draw(keys(positions=0), 4).shape == (0, 10, 4)
    far = Keys(-(2**63), torch.tensor([-1, 2**63 - 1]), torch.tensor([0, 0]))
    assert not torch.equal(*draw(far, 1000))


@pytest.mark.parametrize('n', [1, 2, 3, 63, 64, 65, 784])
@each_draw
def test_numbers_do_not_depend_on_the_shape(draw, n):
    found = draw(keys(3, 5, 2), n)
    assert found.shape == (5, 2, n) and found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(draw(keys(3, 5, 2), 1, n, 1).flatten(2), found)


def shares(x, draw):
    cdf = dict(uniform=stats.uniform.cdf, normal=stats.norm.cdf)[draw.__name__]
    return cdf(x.double().flatten().numpy())


@pytest.mark.parametrize('draw', [uniform, normal], ids=['uniform', 'normal'])
@pytest.mark.parametrize('seed', [0, 1, 2**62 + 3])
def test_each_part_has_the_distribution(draw, seed):
    "Of all, and of one image, one use and one place alone"
    x = draw(keys(seed), 50)
    for part in (x, x[3], x[:, 2], x[:, :, 9]):
        found = shares(part, draw)
        assert stats.kstest(found, 'uniform').pvalue > 1e-4
        counts = np.bincount((found * 50).astype(int), minlength=50)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_bounds_tails_and_signs():
    x, z, s = (draw(keys(5, 5000), 100).double() for draw in DRAWS)
    assert x.min() >= 0 and x.max() < 1
    assert (z.abs() > 4).double().mean().item() == pytest.approx(2 * stats.norm.sf(4), rel=0.25)
    assert z.abs().max() < (2 * 24 * math.log(2) + 2) ** 0.5
    assert (s.abs() == 1).all() and abs(s.mean()) < 5 * s.numel() ** -0.5


def correlations(a, b):
    "In standard errors: of the numbers, and of their squares"
    for f in (lambda v: v, torch.square):
        u, v = (f(w.double()).flatten() for w in (a, b))
        if u.std() > 0:
            yield abs(torch.corrcoef(torch.stack([u, v]))[0, 1].item()) * u.numel() ** 0.5


@each_draw
def test_neighbours_are_independent(draw):
    x = draw(keys(), 64)
    pairs = [(x[:-1], x[1:]), (x[:, :-1], x[:, 1:]), (x[:, :, :-1], x[:, :, 1:])]
    pairs += [(x[:, :, :32], x[:, :, 32:]), (x[:-1, :-1], x[1:, 1:]), (x[1:, :-1], x[:-1, 1:])]
    pairs += [(x, draw(keys(seed), 64)) for seed in (1, -1, 2, 2**32, 0x9E3779B97F4A7C15 - 2**64)]
    for a, b in pairs:
        assert a.isfinite().all() and b.isfinite().all()
        assert all(z < 4.5 for z in correlations(a, b))


def state_of(n=6, numbers=None):
    x = torch.full((n, 1, 8, 8), 0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    batch = Batch(x, torch.zeros(n, dtype=torch.long), None, torch.arange(n), numbers=numbers)
    return AttackState(model, Start(model(x).detach()), batch, seed=4)


def test_a_state_counts_the_uses_of_each_image():
    whole, left = state_of(), state_of()
    first, second = (whole.random(uniform, whole.all) for _ in range(2))
    assert torch.equal(left.random(uniform, torch.tensor([4, 1])), first[[4, 1]])
    mixed = left.random(uniform, left.all)
    assert torch.equal(mixed[[1, 4]], second[[1, 4]])
    assert torch.equal(mixed[[0, 2, 3, 5]], first[[0, 2, 3, 5]])
    assert whole.random(normal, whole.all, 2, 5).shape == (6, 2, 5)
    other = state_of(2, numbers=torch.tensor([5, 3]))
    assert torch.equal(other.random(uniform, other.all), first[[5, 3]])


def test_directions_in_parts_are_those_of_an_image_alone():
    together, alone = state_of(70), state_of(70)
    found = torch.zeros(70, 45, 1, 8, 8)
    seen = torch.zeros(70, dtype=torch.long)
    for rows, v in random_directions(together, normal, 45, together.all):
        assert v.shape[0] <= 32 and v.shape[1] <= 32
        for n, row in enumerate(range(70)[rows]):
            found[row, seen[row] : seen[row] + v.shape[1]] = v[n]
        seen[rows] += v.shape[1]
    assert (seen == 45).all()
    of_one = torch.cat([v for _, v in random_directions(alone, normal, 45, torch.tensor([66]))], 1)
    assert torch.equal(of_one[0], found[66])
