"The augmented Lagrangian attack: distances that are known, and input that makes no sense."

import math

import pytest
import torch
from torch import nn

from genrobust.attacks import alma, penalty_slope
from genrobust.models import BayesClassifier


def linear_model(classes=3, dtype=torch.float32, inside=True):
    torch.manual_seed(0)
    linear, x = nn.Linear(81, classes).to(dtype).eval(), torch.rand(16, 81)
    x = x * 0.2 + 0.4 if inside else x * (torch.rand(16, 81) < 0.5)
    return linear, x.to(dtype)


def exact_distances(linear, x, target=None):
    "l2 norm of the smallest perturbation within [0, 1] that closes the gap to a class, by bisection"
    w, x = linear.weight.detach().double(), x.double()
    logits, found = x @ w.T + linear.bias.detach(), []
    for n, y in enumerate(logits.argmax(1).tolist()):
        rivals = [k for k in range(len(w)) if k != y] if target is None else [target[n].item()]
        found.append(min(_distance(w[y] - w[k], logits[n, y] - logits[n, k], x[n]) for k in rivals))
    return torch.tensor(found)


def _distance(w, gap, x):
    room, a, low, high = torch.where(w > 0, x, 1 - x), w.abs(), 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        far = (a * torch.minimum(room, middle * a)).sum() < gap
        low, high = (middle, high) if far else (low, middle)
    return torch.minimum(room, high * a).norm().item()


@pytest.mark.parametrize('classes', [2, 10])
@pytest.mark.parametrize('inside', [True, False])
def test_the_distance_of_a_linear_model_within_bounds(classes, inside):
    linear, x = linear_model(classes, inside=inside)
    result = alma(linear, x)
    ratio = result.l2 / exact_distances(linear, x)
    assert result.success.all() and 0.999 < ratio.min()
    assert ratio.mean() < 1.01 and ratio.max() < 1.05, ratio


def test_a_target_of_a_linear_model():
    linear, x = linear_model(2)
    target = 1 - linear(x).argmax(1)
    result = alma(linear, x, target=target)
    ratio = result.l2 / exact_distances(linear, x, target)
    assert result.success.all() and 0.999 < ratio.min() and ratio.mean() < 1.01


def test_random_starts_differ_and_find_the_same_distance_on_a_linear_model():
    linear, x = linear_model(2)
    first, second = (alma(linear, x, random_start=True, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.x_adv, second.x_adv)
    for result in first, second:
        ratio = result.l2 / exact_distances(linear, x)
        assert result.success.all() and 0.999 < ratio.min() and ratio.mean() < 1.01
    one = alma(linear, x[3:4], random_start=True, numbers=torch.tensor([3]))
    assert torch.allclose(one.x_adv[0], first.x_adv[3], atol=1e-5)


@pytest.mark.parametrize('scale', [1e-4, 1e4])
def test_the_scale_of_logits_changes_little(scale):
    linear, x = linear_model()
    linear, x = linear.double(), x.double()
    result = alma(lambda x: scale * linear(x), x)
    assert torch.allclose(result.l2, alma(linear, x).l2, rtol=1e-3)


def test_coarse_numbers():
    linear, x = linear_model(dtype=torch.bfloat16)
    result = alma(linear, x)
    assert result.success.all() and result.x_adv.dtype == torch.bfloat16


@pytest.mark.parametrize('steps', [1, 400])
def test_no_gradient_no_success_and_no_overflow(steps):
    class Flat(nn.Module):
        def forward(self, x):
            assert x.isfinite().all()
            level = 0 * x.flatten(1).sum(1)
            return torch.stack([level + 1, level], 1)

    x = torch.rand(3, 1, 4, 4)
    result = alma(Flat().eval(), x, steps=steps)
    assert not result.success.any() and torch.equal(result.x_adv, x)


def test_an_image_on_the_boundary():
    torch.manual_seed(0)
    result = alma(nn.Linear(16, 3, bias=False).eval(), torch.zeros(3, 16))
    assert result.success.all() and result.linf.max() < 0.01


def test_bounds_and_masks_of_each_image():
    torch.manual_seed(0)
    linear, x = nn.Linear(20, 3).eval(), torch.rand(6, 20)
    mask, low, high = torch.rand(6, 20) < 0.7, -torch.arange(6.0), 1 + torch.arange(6.0)
    mask[0] = False
    for start in False, True:
        result = alma(linear, x, mask=mask, bounds=(low, high), random_start=start)
        assert torch.equal(result.x_adv[~mask], x[~mask]) and not result.success[0]
        assert (result.x_adv >= low[:, None]).all() and (result.x_adv <= high[:, None]).all()
        assert result.success[1:].any()


def test_the_slope_is_that_of_a_smooth_convex_penalty():
    g, mu = torch.linspace(-2, 2, 401).double(), torch.full((401,), 0.7).double()
    slope = penalty_slope(g, 1.5, mu)
    assert (slope > 0).all() and (slope.diff() > 0).all()
    assert torch.allclose(slope[200], mu[200])
    above, below = (slope[201] - slope[200]), (slope[200] - slope[199])
    assert abs(above / below - 1) < 0.05


def test_pairs_and_all_classes_lead_to_the_same_distance():
    torch.manual_seed(0)
    clf = BayesClassifier('GFZ', hidden=16, latent=4, n_samples=3).double().eval().fixed(0)
    x = torch.rand(2, 1, 28, 28).double()
    fast, slow = alma(clf, x, steps=12), alma(nn.Sequential(nn.Identity(), clf).eval(), x, steps=12)
    assert torch.equal(fast.success, slow.success)
    assert torch.allclose(fast.l2[fast.success], slow.l2[fast.success], rtol=0.05)
    assert (fast.backwards < slow.backwards).all()


def test_parameters_that_make_no_sense():
    def never(x):
        raise AssertionError('the model was asked')

    for own in [
        dict(steps=0),
        dict(step_size=0),
        dict(rho=0),
        dict(rho=math.nan),
        dict(alpha=1),
        dict(alpha=-0.1),
        dict(refresh=0),
    ]:
        with pytest.raises(ValueError, match=next(iter(own))):
            alma(never, torch.rand(2, 5), **own)
