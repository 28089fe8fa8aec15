"Other libraries, side by side, on the same model and images."
import pytest
import torch

from genrobust.attacks import apgd, fgsm, pgd
from genrobust.data import Images
from genrobust.models import CNN
from genrobust.training import fit

fb = pytest.importorskip('foolbox')

BALLS = pytest.mark.parametrize('p, eps', [(torch.inf, .03), (2, .7)], ids=['inf', '2'])

@pytest.fixture(scope='session')
def cnn(drawn):
    "A small network after a few seconds of training"
    model = CNN(hidden=50)
    fit(model, Images(*[v[:2500] for v in drawn.train]), Images(*[v[:200] for v in drawn.valid]), epochs=4, device='cpu', progress=False)
    return model.requires_grad_(False)

@pytest.fixture(scope='session')
def images(cnn, drawn):
    "48 test images that the network gets right"
    x, y = (v[:200] for v in drawn.test)
    right = cnn(x).argmax(1)==y
    return Images(x[right][:48], y[right][:48])

def by_foolbox(attack, model, images, eps):
    "Their attacked images"
    torch.manual_seed(0)
    return attack(fb.PyTorchModel(model, bounds=(0, 1), device='cpu'), images.x, fb.criteria.Misclassification(images.y), epsilons=eps)[1]

def fooled(model, x, images): return (model(x).argmax(1)!=images.y).sum().item()

@BALLS
def test_fgsm_is_foolboxs(cnn, images, p, eps):
    "In float64, where the cross-entropy that Foolbox climbs is not rounded to 0"
    model, images = CNN(hidden=50).double().eval(), Images(images.x.double(), images.y)
    model.load_state_dict(cnn.state_dict())
    theirs = by_foolbox(fb.attacks.LinfFastGradientAttack() if p==torch.inf else fb.attacks.L2FastGradientAttack(), model, images, eps)
    ours = fgsm(model, *images, eps=eps, p=p)
    assert len(images.y)==48 and (ours.x_adv-theirs).abs().max()<=1e-6
    assert 0<ours.success.sum()<48 and ours.success.sum()==fooled(model, theirs, images)

@BALLS
def test_pgd_reaches_foolboxs_success(cnn, images, p, eps):
    make = fb.attacks.LinfPGD if p==torch.inf else fb.attacks.L2PGD
    theirs = fooled(cnn, by_foolbox(make(abs_stepsize=eps/8, steps=20), cnn, images, eps), images)
    ours = pgd(cnn, *images, eps=eps, p=p, step_size=eps/8, steps=20).success.sum()
    assert 48>ours>=theirs>0

@BALLS
@pytest.mark.parametrize('loss', ['ce', 'dlr'])
def test_apgd_reaches_torchattacks_success(cnn, images, p, eps, loss):
    APGD = pytest.importorskip('torchattacks').APGD
    theirs = fooled(cnn, APGD(cnn, norm='Linf' if p==torch.inf else 'L2', eps=eps, steps=20, loss=loss)(*images), images)
    ours = apgd(cnn, *images, eps=eps, p=p, steps=20, loss=loss).success.sum()
    assert 48>ours>=theirs>0
