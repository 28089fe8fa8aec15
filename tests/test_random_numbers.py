"Random numbers of attacks: known answers, statistics, and what they may depend on."

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from genrobust.attacks import hop_skip_jump, pgd, spsa, square, zoo
from genrobust.attacks.engine import AttackState, Batch, Start
from genrobust.attacks.random_numbers import Keys, normal, signs, splitmix, uniform
from genrobust.attacks.score_based import random_directions

DRAWS = [uniform, normal, signs]
each_draw = pytest.mark.parametrize('draw', DRAWS, ids=lambda f: f.__name__)


def keys(seed=0, positions=2000, uses=10):
    return Keys(seed, torch.arange(positions)[:, None], torch.arange(uses))


def word(seed, n):
    "SplitMix64 in Python's integers (Steele, Lea and Flood, 2014; Vigna's splitmix64.c)"
    x = (seed + (n + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize(
    'seed, known',
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (
            1234567,
            [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431],
        ),
    ],
)
def test_known_answers(seed, known):
    found = splitmix(torch.tensor(seed), torch.arange(4))
    assert [w % 2**64 for w in found.tolist()] == known


def test_words_are_those_of_exact_integers():
    rng = np.random.default_rng(0)
    seeds, n = (torch.from_numpy(rng.integers(-(2**63), 2**63, 500)) for _ in range(2))
    n[:3] = torch.tensor([-1, 2**63 - 1, -(2**63)])
    found = splitmix(seeds, n).tolist()
    assert [w % 2**64 for w in found] == [word(s, k) for s, k in zip(seeds.tolist(), n.tolist())]


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
def test_any_shape(draw, n):
    found = draw(keys(3, 5, 2), n)
    assert found.shape == (5, 2, n) and found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(draw(keys(3, 5, 2), 1, n, 1).flatten(2), found)


def shares(x, draw):
    cdf = dict(uniform=stats.uniform.cdf, normal=stats.norm.cdf)[draw.__name__]
    return cdf(x.double().flatten().numpy())


@pytest.mark.parametrize('draw', [uniform, normal], ids=['uniform', 'normal'])
@pytest.mark.parametrize('seed', [0, 1, 2**62 + 3])
def test_distribution(draw, seed):
    "Of all, and of one image, one use and one place alone"
    x = draw(keys(seed), 50)
    for part in (x, x[3], x[:, 2], x[:, :, 9]):
        found = shares(part, draw)
        assert stats.kstest(found, 'uniform').pvalue > 1e-4
        counts = np.bincount((found * 50).astype(int), minlength=50)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_bounds_and_moments():
    x, z, s = (draw(keys(5, 5000), 100).double() for draw in DRAWS)
    assert x.min() >= 0 and x.max() < 1
    assert abs(x.mean() - 1 / 2) < 5 * (1 / 12 / x.numel()) ** 0.5
    for k, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], 1):
        assert abs(z.pow(k).mean() - mean) < 5 * (variance / z.numel()) ** 0.5
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


def test_bits_of_starts():
    "As many ones as zeros in each place, and no two places together; no start twice"
    start = keys(0, 4000, 50).start()
    assert len(start.unique()) == start.numel()
    bits = 2.0 * (start.flatten()[:, None] >> torch.arange(64) & 1) - 1
    pairs = bits.T @ bits / len(bits) ** 0.5 - len(bits) ** 0.5 * torch.eye(64)
    assert pairs.abs().max() < 4.8 and (bits.sum(0) / len(bits) ** 0.5).abs().max() < 4.5


def test_no_duplicates():
    "Of two million words none comes twice, in other images, uses or places"
    words = splitmix(keys(0, 1000, 20).start()[..., None], torch.arange(100))
    assert len(words.unique()) == words.numel()
    draws = normal(keys(0, 1000, 20), 4).flatten(0, 1)
    assert len(draws.unique(dim=0)) == len(draws)


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


ATTACKS = {
    'pgd': lambda *a, **k: pgd(*a, eps=0.02, steps=3, **k),
    'pgd l2': lambda *a, **k: pgd(*a, eps=0.2, p=2, steps=3, **k),
    'square': lambda *a, **k: square(*a, eps=0.02, max_queries=90, **k),
    'square l2': lambda *a, **k: square(*a, eps=0.2, p=2, max_queries=90, **k),
    'spsa': lambda *a, **k: spsa(*a, eps=0.02, steps=3, samples=35, **k),
    'zoo': lambda *a, **k: zoo(*a, max_queries=700, coordinates=20, **k),
    'hop_skip_jump': lambda *a, **k: hop_skip_jump(*a, max_queries=400, **k),
}


@pytest.mark.parametrize('name', ATTACKS)
def test_an_image_gets_its_numbers_in_any_batch(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    model, x = model.eval(), torch.rand(40, 1, 8, 8).double()
    whole = ATTACKS[name](model, x)
    parts = ATTACKS[name](model, x, batch_size=7)
    assert torch.allclose(parts.x_adv, whole.x_adv, atol=1e-9)
    assert torch.equal(parts.forwards, whole.forwards)
    i = torch.tensor([33, 5, 20])
    alone = ATTACKS[name](model, x[i], numbers=i)
    assert torch.allclose(alone.x_adv, whole.x_adv[i], atol=1e-9)
    assert not torch.equal(ATTACKS[name](model, x, seed=1).x_adv, whole.x_adv)
