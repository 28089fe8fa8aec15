"DDN, FMN and ALMA: distances that are known, and the slope of a penalty."

import math

import pytest
import torch
from torch import nn
from under_attack import NEVER

from genrobust.attacks import alma, ddn, fmn, norm, penalty_slope
from genrobust.attacks.gradient import project


def exact_distance(w, gap, x, p):
    "Smallest p-norm that lowers `w @ x` by `gap` within [0, 1], by bisection, or greedily for p = 1"
    room, a = torch.where(w > 0, x, 1 - x), w.abs()
    if p == 1:
        order = a.argsort(descending=True)
        a, room = a[order], room[order]
        gains = (a * room).cumsum(0)
        n = int((gains < gap).sum())
        return (room[:n].sum() + (gap - gains[n] + a[n] * room[n]) / a[n]).item()
    shape, low, high = a if p == 2 else torch.ones_like(a), 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        far = (a * torch.minimum(room, middle * shape)).sum() < gap
        low, high = (middle, high) if far else (low, middle)
    return torch.minimum(room, high * shape).norm(p).item()


def exact_distances(linear, result, p):
    w, x = linear.weight.detach().double(), result.x.double()
    logits, found = x @ w.T + linear.bias.detach(), []
    for n, y in enumerate(result.y.tolist()):
        rivals = [k for k in range(len(w)) if k != y]
        if result.target is not None:
            rivals = [result.target[n].item()]
        found.append(
            min(
                exact_distance(w[y] - w[k], (logits[n, y] - logits[n, k]).item(), x[n], p)
                for k in rivals
            )
        )
    return torch.tensor(found)


RUNS = dict(
    alma=(alma, 2, {}),
    alma_from_elsewhere=(alma, 2, dict(random_start=True)),
    ddn=(ddn, 2, {}),
    fmn1=(fmn, 1, dict(p=1)),
    fmn2=(fmn, 2, {}),
    fmninf=(fmn, math.inf, dict(p=math.inf)),
)
each_norm = pytest.mark.parametrize('attack, p, own', RUNS.values(), ids=RUNS)


@each_norm
@pytest.mark.parametrize('classes', [2, 10])
@pytest.mark.parametrize('dark', [False, True])
def test_the_distance_of_a_linear_model_within_bounds(attack, p, own, classes, dark):
    torch.manual_seed(0)
    linear, x = nn.Linear(81, classes).eval(), torch.rand(16, 81)
    x = x * (torch.rand(16, 81) < 0.5) if dark else x * 0.2 + 0.4
    result = attack(linear, x, **own)
    ratio = norm(result.perturbation.double(), p) / exact_distances(linear, result, p)
    assert result.success.all() and 0.999 < ratio.min()
    assert ratio.mean() < 1.01 and ratio.max() < (1.05 if attack is alma else 1.1), ratio


@each_norm
def test_a_target_of_a_linear_model(attack, p, own):
    torch.manual_seed(0)
    linear, x = nn.Linear(81, 2).eval(), torch.rand(8, 81) * 0.2 + 0.4
    result = attack(linear, x, target=1 - linear(x).argmax(1), **own)
    ratio = norm(result.perturbation.double(), p) / exact_distances(linear, result, p)
    assert result.success.all() and 0.999 < ratio.min() and ratio.mean() < 1.01


@each_norm
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_coarse_and_fine_numbers(attack, p, own, dtype):
    torch.manual_seed(0)
    linear, x = nn.Linear(81, 4).to(dtype).eval(), (torch.rand(16, 81) * 0.2 + 0.4).to(dtype)
    result = attack(linear, x, **own)
    assert result.success.all() and result.x_adv.dtype == dtype
    if dtype == torch.float64:
        ratio = norm(result.perturbation.double(), p) / exact_distances(linear, result, p)
        assert 0.999 < ratio.min() and ratio.mean() < 1.01


@each_norm
@pytest.mark.parametrize('steps', [1, 400])
def test_no_gradient_no_success_and_no_overflow(attack, p, own, steps):
    "The norm doubles every few steps where nothing is found, up to the farthest corner"

    class Flat(nn.Module):
        def forward(self, x):
            assert x.isfinite().all()
            level = 0 * x.flatten(1).sum(1)
            return torch.stack([level + 1, level], 1)

    x = torch.rand(3, 1, 4, 4)
    own = own if attack is alma else dict(own, gamma=0.9)
    result = attack(Flat().eval(), x, steps=steps, **own)
    assert not result.success.any() and torch.equal(result.x_adv, x)


@each_norm
def test_an_image_on_the_boundary(attack, p, own):
    torch.manual_seed(0)
    model = nn.Linear(16, 3, bias=False).eval()
    result = attack(model, torch.zeros(3, 16), **own)
    assert result.success.all() and result.linf.max() < 0.01


@each_norm
def test_bounds_and_masks_of_each_image(attack, p, own):
    torch.manual_seed(0)
    linear, x = nn.Linear(20, 3).eval(), torch.rand(6, 20)
    mask, low, high = torch.rand(6, 20) < 0.7, -torch.arange(6.0), 1 + torch.arange(6.0)
    mask[0] = False
    result = attack(linear, x, mask=mask, bounds=(low, high), **own)
    assert torch.equal(result.x_adv[~mask], x[~mask]) and not result.success[0]
    assert (result.x_adv >= low[:, None]).all() and (result.x_adv <= high[:, None]).all()
    assert result.success[1:].any()


@pytest.mark.parametrize('init_norm', [1e-3, 0.1, 1e6])
def test_any_first_norm_ends_at_the_same_distance(init_norm):
    torch.manual_seed(0)
    linear, x = nn.Linear(81, 2).eval(), torch.rand(8, 81) * 0.2 + 0.4
    result = ddn(linear, x, init_norm=init_norm)
    ratio = result.l2 / exact_distances(linear, result, 2)
    assert result.success.all() and 0.999 < ratio.min() and ratio.max() < 1.05


def test_parameters_that_make_no_sense():
    x = torch.rand(2, 5)
    shared = dict(steps=[0, 1.5], step_size=[0], refresh=[0])
    of_walks = shared | dict(gamma=[0, 1, math.nan])
    of_alma = shared | dict(rho=[0, math.nan], alpha=[1, -0.1])
    of_fmn = of_walks | dict(p=[0, 3, 'two', math.nan])
    for attack, own in ((ddn, of_walks | dict(init_norm=[0])), (fmn, of_fmn), (alma, of_alma)):
        for name, values in own.items():
            for value in values:
                with pytest.raises(ValueError, match=f'{name} must be'):
                    attack(NEVER, x, **{name: value})


@pytest.mark.parametrize('p', [1, 2, math.inf])
def test_projections_are_the_nearest_points(p):
    torch.manual_seed(0)
    delta, eps = torch.randn(50, 6).double(), torch.rand(50, 1).double() * 3
    near = project(delta, eps, p)
    assert (near.norm(p, dim=1) <= eps[:, 0] + 1e-12).all()
    inside = delta.norm(p, dim=1) <= eps[:, 0]
    assert inside.any() and torch.equal(near[inside], delta[inside])
    distance = (delta - near).norm(dim=1)
    for _ in range(200):
        other = torch.randn(50, 6).double()
        other = other / other.norm(p, dim=1, keepdim=True).maximum(torch.ones(50, 1)) * eps
        assert ((delta - other).norm(dim=1) >= distance - 1e-9).all()


# --- ALMA


def test_random_starts_differ_and_belong_to_their_image():
    torch.manual_seed(0)
    linear, x = nn.Linear(81, 2).eval(), torch.rand(16, 81) * 0.2 + 0.4
    first, second = (alma(linear, x, random_start=True, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.x_adv, second.x_adv)
    one = alma(linear, x[3:4], random_start=True, numbers=torch.tensor([3]))
    assert torch.allclose(one.x_adv[0], first.x_adv[3], atol=1e-5)


@pytest.mark.parametrize('scale', [1e-4, 1e4])
def test_the_scale_of_logits_changes_little(scale):
    torch.manual_seed(0)
    linear, x = nn.Linear(81, 3).double().eval(), torch.rand(16, 81).double() * 0.2 + 0.4
    result = alma(lambda x: scale * linear(x), x)
    assert torch.allclose(result.l2, alma(linear, x).l2, rtol=1e-3)


def test_the_slope_is_that_of_a_smooth_convex_penalty():
    g, mu = torch.linspace(-2, 2, 401).double(), torch.full((401,), 0.7).double()
    slope = penalty_slope(g, 1.5, mu)
    assert (slope > 0).all() and (slope.diff() > 0).all()
    assert torch.allclose(slope[200], mu[200])
    above, below = (slope[201] - slope[200]), (slope[200] - slope[199])
    assert abs(above / below - 1) < 0.05
