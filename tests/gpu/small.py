"Small models and few images."

import torch
from torch import nn

from genrobust.data import Images, synthetic
from genrobust.models import CNN, BayesClassifier

DRAWN = synthetic(200)
DRAWN = DRAWN._replace(x=(DRAWN.x * 255).round() / 255)  # as a file has them


class Plain(nn.Module):
    "Anyone's model: no method of this package's"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.Tanh(), nn.Linear(20, 10))

    def forward(self, x):
        return self.layers(x)


class Prototypes(nn.Module):
    "Densities around the mean of each class"

    name, noise_settings = 'prototypes', {}

    def __init__(self):
        super().__init__()
        means = [DRAWN.x[DRAWN.y == c].mean(0) for c in range(10)]
        self.means = nn.Parameter(torch.stack(means), requires_grad=False)

    def forward(self, x):
        return -(x[:, None] - self.means).square().flatten(2).sum(2)

    def need_density(self):
        pass


class Stubborn(nn.Module):
    "Never misled: its first class is far ahead, so that an attack takes all its steps"

    def __init__(self, model):
        super().__init__()
        self.model, self.n_classes, self.training = model, 10, False
        self.register_buffer('lead', torch.tensor([1e4] + [0.0] * 9))
        if hasattr(model, 'per_class_logits'):
            self.per_class_logits = self.all_alone

    def fixed(self, seed=0):
        return self

    def forward(self, x):
        return self.model(x) + self.lead

    def all_alone(self, xc, classes=None):
        lead = self.lead if classes is None else self.lead[classes]
        return self.model.per_class_logits(xc, classes) + lead


def classifier(name, **config):
    "A small one of the package's, untrained"
    how = dict(hidden=20, seed=1) | config
    if name == 'CNN':
        return CNN(**how)
    return BayesClassifier(name, **dict(latent=4, n_samples=2) | how)


def ready(model, device='cuda'):
    return model.eval().requires_grad_(False).to(device)


MODELS = dict(cnn=lambda: classifier('CNN'), gfz=lambda: classifier('GFZ'), plain=Plain)


def some(n, device, start=0):
    "Images and labels on a device"
    return Images(*[v[start : start + n].to(device) for v in DRAWN])
