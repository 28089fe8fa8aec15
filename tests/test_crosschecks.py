"Other libraries, side by side, on the same model and images."

import pytest
import torch

from genrobust.attacks import apgd, carlini_wagner, deepfool, fgsm, log_odds, pgd, zoo
from genrobust.data import Images
from genrobust.models import load_pretrained

fb = pytest.importorskip('foolbox')

BALLS = pytest.mark.parametrize('p, eps', [(torch.inf, 0.03), (2, 0.5)], ids=['inf', '2'])


@pytest.fixture(scope='session')
def cnn():
    return load_pretrained('cnn', device='cpu')


@pytest.fixture(scope='session')
def images(cnn, fashion):
    "48 test images that the network gets right"
    x, y = fashion.test.first(80)
    right = cnn(x).argmax(1) == y
    return Images(x[right][:48], y[right][:48])


def by_foolbox(attack, model, images, eps):
    "Their attacked images"
    torch.manual_seed(0)
    model = fb.PyTorchModel(model, bounds=(0, 1), device='cpu')
    return attack(model, images.x, fb.criteria.Misclassification(images.y), epsilons=eps)[1]


def fooled(model, x, images):
    return (model(x).argmax(1) != images.y).sum().item()


@BALLS
def test_fgsm_is_foolboxs(cnn, images, p, eps):
    "In float64, on images whose cross-entropy, which Foolbox climbs, is not lost in rounding"
    model = load_pretrained('cnn', device='cpu').double()
    images = Images(images.x.double(), images.y)
    near = log_odds(model(images.x), images.y) < 15
    images = Images(images.x[near], images.y[near])
    name = 'LinfFastGradientAttack' if p == torch.inf else 'L2FastGradientAttack'
    theirs = by_foolbox(getattr(fb.attacks, name)(), model, images, eps)
    ours = fgsm(model, *images, eps=eps, p=p)
    assert len(images.y) > 30 and (ours.x_adv - theirs).abs().max() <= 1e-6
    assert 0 < ours.success.sum() < len(images.y)
    assert ours.success.sum() == fooled(model, theirs, images)


@BALLS
def test_pgd_reaches_foolboxs_success(cnn, images, p, eps):
    "With a hundred steps, by which both have arrived; after twenty an image more or less is a matter of the start"
    make = fb.attacks.LinfPGD if p == torch.inf else fb.attacks.L2PGD
    theirs = by_foolbox(make(abs_stepsize=eps / 8, steps=100), cnn, images, eps)
    ours = pgd(cnn, *images, eps=eps, p=p, step_size=eps / 8, steps=100).success.sum()
    assert 48 > ours >= fooled(cnn, theirs, images) > 0


@BALLS
@pytest.mark.parametrize('loss', ['ce', 'dlr'])
def test_apgd_reaches_torchattacks_success(cnn, images, p, eps, loss):
    "With four random starts and a hundred steps each; fewer are a matter of luck"
    APGD = pytest.importorskip('torchattacks').APGD
    norm = 'Linf' if p == torch.inf else 'L2'
    theirs = APGD(cnn, norm=norm, eps=eps, steps=100, n_restarts=4, loss=loss)(*images)
    ours = apgd(cnn, *images, eps=eps, p=p, steps=100, restarts=4, loss=loss).success.sum()
    assert 48 > ours >= fooled(cnn, theirs, images) > 0


def mean_l2(x_adv, x):
    return (x_adv - x).flatten(1).norm(dim=1).mean()


def test_deepfool_on_gfz_is_no_farther_than_foolboxs(fashion):
    "With two samples of z, so that theirs takes seconds; the ten of the real model are in the chapter on DeepFool"
    model = load_pretrained('gfz', device='cpu').fixed(0, n_samples=2)
    x, y = fashion.test.first(8)
    right = model(x).argmax(1) == y
    images = Images(x[right][:4], y[right][:4])
    theirs = by_foolbox(fb.attacks.L2DeepFoolAttack(), model, images, None)
    ours = deepfool(model, *images)
    assert len(images.y) == 4 and ours.success.all() and fooled(model, theirs, images) == 4
    assert ours.l2.mean() <= 1.01 * mean_l2(theirs, images.x)


def test_carlini_wagner_is_no_farther_than_foolboxs(cnn, images):
    images = images.first(10)
    theirs = by_foolbox(
        fb.attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=150), cnn, images, None
    )
    ours = carlini_wagner(cnn, *images)
    assert ours.success.all() and fooled(cnn, theirs, images) == 10
    assert ours.l2.mean() <= mean_l2(theirs, images.x)
    assert ours.l2.mean() <= 0.95 * deepfool(cnn, *images).l2.mean()
    assert ours.backwards.double().mean() < 750 / 2


def test_zoo_comes_near_carlini_wagner(cnn, images):
    images = images.first(4)
    ours, white = zoo(cnn, *images, max_queries=12_000), carlini_wagner(cnn, *images)
    assert ours.success.all() and ours.forwards.max() <= 12_002 and not ours.backwards.any()
    assert white.l2.mean() <= ours.l2.mean() <= 1.5 * white.l2.mean()
