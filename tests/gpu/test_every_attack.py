"Every attack, on a model on the GPU, with images on either device."

from functools import partial

import pytest
import torch
from small import MODELS, Prototypes, classifier, ready, some

from genrobust import attacks as package
from genrobust.adaptive import (
    AVERAGES,
    Averaged,
    FactorGradient,
    attack_with_detector,
    evasion_rate,
)
from genrobust.attacks import AttackResult, jacobian, list_attacks, one_vs_all, rescore
from genrobust.data import Splits
from genrobust.detection import DETECTORS, Detector, detect, fit_detectors, score_images
from genrobust.evaluation import worst_case
from genrobust.models import accuracy, predict

BOTH = [dict(p=p) for p in (2, torch.inf)]
WALKS = [dict(p=p, steps=4) for p in (1, 2, torch.inf)]
LOSSES = [dict(p=2, loss='margin', steps=3), dict(p=torch.inf, loss='dlr', early_stop=True)]
# Of each attack, the parameters of several short runs
SHORT = dict(
    random_noise=[{}],
    fgsm=[*BOTH, dict(loss='joint')],
    pgd=[dict(steps=3, restarts=2), *(dict(steps=3) | own for own in LOSSES)],
    mim=[dict(steps=3) | own for own in LOSSES],
    apgd=[dict(steps=6, restarts=2, p=2), *(dict(steps=5) | own for own in LOSSES)],
    deepfool=[dict(p=p, steps=4) for p in (1, 2, torch.inf)],
    truncated_deepfool=[dict(steps=8)],
    carlini_wagner=[
        dict(steps=5, binary_search_steps=2),
        dict(steps=4, binary_search_steps=2, kappa=1.0, c=1.0, lr=0.01),
    ],
    zoo=[
        dict(max_queries=200, coordinates=16),
        dict(max_queries=100, coordinates=8, importance=True, binary_search_steps=1),
    ],
    spsa=[dict(steps=2, samples=4, p=p) for p in (2, torch.inf)],
    square=[dict(max_queries=8, p=p) for p in (2, torch.inf)],
    hop_skip_jump=[dict(max_queries=90, init_queries=9, samples=9, p=p) for p in (2, torch.inf)],
    ddn=[dict(steps=5), dict(steps=3, random_start=True)],
    fmn=WALKS,
    alma=[dict(steps=5), dict(steps=3, random_start=True)],
    fab=[dict(steps=3, restarts=2), dict(steps=3, n_targets=2, p=torch.inf)],
    superdeepfool=[dict(steps=4, deepfool_steps=4)],
)


def test_no_attack_is_left_out():
    assert set(SHORT) == set(list_attacks())


def agree(one, other, is_real):
    """What an attack finds on this GPU is what it finds on the CPU, whose kernels a pretended one
    has; a real one rounds otherwise, which may move pixels of an untrained model by a level"""
    if is_real:
        is_near = (one.x_adv - other.x_adv).abs() < 1.5 / 255
        assert is_near.float().mean() > 0.9
        assert (one.success != other.success).sum() <= 1
        return
    assert (one.forwards - other.forwards <= 2).all()  # once more at the end, and for levels
    assert one.y_adv.equal(other.y_adv) and one.success.equal(other.success)
    assert one.backwards.equal(other.backwards)
    assert torch.allclose(one.x_adv, other.x_adv, atol=1e-5)


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('name', SHORT)
def test_attacks_find_on_the_gpu_what_they_find_on_the_cpu(name, kind, gpu):
    "Options in turn; images, labels, target, mask and bounds from either device"
    attack, (x, y) = getattr(package, name), some(4, 'cpu')
    options = SHORT[name] if kind == 'plain' else SHORT[name][-1:]
    for n, own in enumerate(options):
        model = MODELS[kind]()
        fixed = model.fixed(0) if hasattr(model, 'fixed') else model
        y = predict(fixed.eval(), x).argmax(1)
        given = [dict(batch_size=3, quantized=True)]
        given.append(dict(y=y, target=(y + 3) % 10, mask=torch.rand(28, 28) > 0.2))
        given.append(dict(y=y, bounds=(torch.zeros_like(x), torch.ones_like(x))))
        shared = given[n % 3]
        expected = attack(ready(model, 'cpu'), x, **own, **shared)
        gpu.rounded.clear()
        for home in ('cpu', 'cuda'):
            labels = {k: v.to(home) if k in ('y', 'target') else v for k, v in shared.items()}
            found = attack(ready(model), x.to(home), **own, **labels)
            assert {v.device.type for v in found.tensors().values()} == {home}
            found.summary(), found.to_frame(), repr(found)
            agree(found.to('cpu'), expected, gpu.is_real)
        assert not gpu.rounded, gpu.rounded


def test_traced_and_averaged(home):
    x, y = some(4, home)
    for name in ('pgd', 'deepfool', 'square'):
        own = dict(max_queries=5) if name == 'square' else dict(steps=3)
        found = getattr(package, name)(ready(classifier('GFZ')), x, trace=True, draws=2, **own)
        assert found.trace.to_frame().evaluation.max() > 0


def test_results_are_kept(tmp_path, home):
    result = package.fgsm(ready(classifier('GFZ')), *some(4, home))
    result.save(tmp_path / 'r')
    assert AttackResult.load(tmp_path / 'r').x_adv.equal(result.x_adv.cpu())
    assert len(AttackResult.cat([result, result]).y) == 8


def test_one_vs_all_and_worst_case(home):
    for make in (MODELS['gfz'], MODELS['plain']):
        model, (x, _y) = ready(make()), some(2, home)
        own = dict(n_targets=2, steps=2, eps=0.1, early_stop=True)
        one_vs_all(package.apgd, model, x, **own)
        several = [partial(package.pgd, steps=2), partial(package.ddn, steps=2)]
        found = worst_case(model, x, eps=3.0, attacks=several)
        assert found.found_by.device.type == home
        worst_case(model, x, attacks=several)


def test_rescore_puts_random_numbers_back(home):
    clf = ready(classifier('GFZ'))
    result = package.fgsm(clf, some(4, home)[0])
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    one, other = (rescore(result, clf, draws=3) for _ in range(2))
    assert one.share.equal(other.share) and one.share.device.type == home
    assert all(map(torch.equal, before, (torch.get_rng_state(), torch.cuda.get_rng_state())))


def test_jacobian_takes_images_from_anywhere(home, gpu):
    for make in MODELS.values():
        model, x = make(), some(3, 'cpu').x
        model = model.fixed(0) if hasattr(model, 'fixed') else model
        expected = jacobian(ready(model, 'cpu'), x)
        found = jacobian(ready(model), x.to(home))
        assert {v.device.type for v in found} == {home} and not gpu.rounded
        assert all(torch.allclose(a.cpu(), b, atol=1e-5) for a, b in zip(found, expected))


def test_views_are_attacked(home):
    clf, (x, _y) = ready(classifier('GFZ')), some(3, home)
    views = [Averaged(clf, 2, of) for of in AVERAGES]
    views += [FactorGradient(clf.fixed(0), factors) for factors in ('x', 'y', 'z', 'zq')]
    for view in views:
        assert predict(view, x).device.type == home
        package.apgd(view, x, steps=2, loss='joint')


@pytest.mark.parametrize('kind', DETECTORS)
def test_detectors_work_on_the_gpu(kind, home, tmp_path, gpu):
    model, (x, y) = ready(Prototypes()), some(8, home)
    detector = DETECTORS[kind](model).fit(some(120, home)).calibrate(some(80, home, 120))
    scores, logits = detector.score(x), model(x.to('cuda'))
    assert scores.device.type == home and detector.rejects(x).device.type == home
    assert detector.slack(logits).device.type == 'cuda' and not gpu.rounded
    detector(x), detector.alpha, repr(detector)
    detector.save(tmp_path / 'd')
    assert Detector.load(tmp_path / 'd', model).score(x).equal(scores)
    for attack in (package.apgd, package.deepfool):
        found = attack_with_detector(partial(attack, steps=2), model, detector, x, y)
        assert evasion_rate(found, detector, draws=2).device.type == home


def test_detectors_together(home):
    model = ready(Prototypes())
    parts = some(120, home), some(80, home, 120)
    assert len(score_images(fit_detectors(model, *parts), *some(9, home))) == 9
    results = dict(fgsm=package.fgsm(model, *some(9, home)))
    detect(model, results, Splits(*parts, some(200, home)), n_train=120, n_valid=80, n_clean=20)


def test_predict_and_accuracy_are_exact(home, gpu):
    for make in MODELS.values():
        model, (x, y) = make(), some(9, 'cpu')
        model = model.fixed(0) if hasattr(model, 'fixed') else model
        expected = predict(ready(model, 'cpu'), x)
        assert torch.allclose(predict(ready(model), x.to(home)).cpu(), expected, atol=1e-5)
        accuracy(model, x.to(home), y), accuracy(model, x.to(home), y.to('cuda'))
        assert not gpu.rounded, gpu.rounded
