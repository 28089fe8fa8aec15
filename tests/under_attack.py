"Attacks by their kind, small models, few images, and parameters with which an attack on them is quick."

from inspect import signature

import pytest
import torch
from torch import nn

from genrobust import attacks
from genrobust.attacks import (
    alma,
    apgd,
    carlini_wagner,
    ddn,
    deepfool,
    fab,
    fmn,
    hop_skip_jump,
    list_attacks,
    mim,
    pgd,
    random_noise,
    spsa,
    square,
    superdeepfool,
    truncated_deepfool,
    zoo,
)
from genrobust.detection import KLDetector
from genrobust.models import Classifier


def listed(**kind):
    return [getattr(attacks, name) for name in list_attacks(**kind)]


ATTACKS = listed()
MINIMUM_NORM, IN_A_BALL = listed(minimum_norm=True), listed(minimum_norm=False)
NEED_GRADIENT, NEED_NO_GRADIENT = listed(black_box=False), listed(black_box=True)
QUERIES = [attack for attack in NEED_NO_GRADIENT if attack is not random_noise]
SMALL = {
    alma: dict(steps=20),
    ddn: dict(steps=20),
    fmn: dict(steps=20),
    pgd: dict(steps=5, restarts=2),
    mim: dict(steps=5),
    apgd: dict(steps=5),
    carlini_wagner: dict(steps=20, binary_search_steps=3),
    superdeepfool: dict(steps=20),
    fab: dict(steps=20),
    zoo: dict(max_queries=7000, coordinates=450),
    spsa: dict(steps=3, samples=4),
    square: dict(max_queries=20),
    hop_skip_jump: dict(max_queries=60, init_queries=10, samples=10),
}
FEW = {
    alma: dict(steps=5, refresh=2),
    ddn: dict(steps=5, refresh=2),
    fmn: dict(steps=5, refresh=2),
    zoo: dict(max_queries=70, coordinates=10),
    carlini_wagner: dict(steps=5, binary_search_steps=2),
    superdeepfool: dict(steps=5, deepfool_steps=5),
    fab: dict(steps=5),
    deepfool: dict(steps=5),
    truncated_deepfool: dict(steps=10),
}  # where the model is slow and attacks need not succeed


def each(some):
    "A test of each of these attacks"
    return pytest.mark.parametrize('attack', some, ids=lambda f: f.__name__)


every_attack = each(ATTACKS)


def in_norm(attack, p):
    "The norm as a parameter, where the attack has a choice"
    return dict(p=p) if 'p' in signature(attack).parameters else {}


def attack_small(attack, *args, **kw):
    return attack(*args, **{**SMALL.get(attack, {}), **kw})


def small(attack, *args, **kw):
    return attack_small(attack, *args, **{**FEW.get(attack, {}), **kw})


def same(result, expected):
    for name in ('x', 'x_adv', 'y', 'y_adv', 'success'):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name


def elsewhere():
    "A model and images of another shape: 3 x 20 x 30 pixels in (-1, 1), five classes"
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6 * 9, 5)
    ).eval()
    return model, torch.rand(7, 3, 20, 30) * 2 - 1


def make_net(scale=3.0, classes=4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes)).eval()
    with torch.no_grad():
        net[3].weight *= scale
    return net


NET = make_net()


def images(n=6):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(5))


class Never(nn.Module):
    "A model that must not be asked"

    def forward(self, x):
        raise AssertionError('the model was asked')


NEVER = Never().eval()


class Counting(nn.Module):
    "Counts the images that go in, and those that a gradient comes back through"

    def __init__(self, inner):
        super().__init__()
        self.inner, self.forwards, self.backwards = inner, 0, 0
        self.eval()

    def forward(self, x):
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(lambda g: setattr(self, 'backwards', self.backwards + len(x)))
        return self.inner(x)


class AtMost(nn.Module):
    "Takes so many images at once"

    def __init__(self, inner, n):
        super().__init__()
        self.inner, self.images_at_once = inner, n
        self.eval()

    def forward(self, x):
        assert len(x) <= self.images_at_once
        return self.inner(x)


class Noisy(nn.Module):
    "Noise on the image: random smoothing's base classifier"

    def __init__(self, scale, net=NET):
        super().__init__()
        self.scale, self.net = scale, net
        self.eval()

    def forward(self, x):
        return self.net(x + self.scale * torch.randn_like(x))


class ByClass(nn.Module):
    "A linear model whose classes can be asked for one by one; what was evaluated is counted"

    def __init__(self, weight, bias=None):
        super().__init__()
        bias = torch.zeros(len(weight)).to(weight) if bias is None else bias
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.n_classes, self.whole, self.classes = len(weight), 0, 0
        self.eval()

    def forward(self, x):
        self.whole += len(x)
        return x.flatten(1) @ self.weight.T + self.bias

    def per_class_logits(self, xc, classes=None):
        if classes is None:
            classes = torch.arange(self.n_classes).expand(len(xc), -1)
            self.whole += len(xc)
        else:
            self.classes += classes.numel()
        return (xc.flatten(2) * self.weight[classes]).sum(-1) + self.bias[classes]


class Prototypes(Classifier):
    "A Gaussian around the mean image of each class, stochastic where `noise` is not 0"

    has_density = True

    def __init__(self, images, noise=0.0):
        super().__init__('prototypes', 10)
        means = [images.x[images.y == c].mean(0) for c in range(10)]
        self.means, self.noise = nn.Parameter(torch.stack(means), requires_grad=False), noise
        self.eval()

    def forward(self, x):
        logits = -(x[:, None] - self.means).square().flatten(2).sum(2)
        return logits + self.noise * torch.randn_like(logits)


def made_up(clf, threshold=None):
    "A KL detector to which all classes are usually alike"
    detector = KLDetector(clf)
    detector.statistics = dict(
        usual=torch.full((10, 10), 0.1), mean=torch.zeros(10), std=torch.ones(10)
    )
    detector.threshold = threshold
    return detector
