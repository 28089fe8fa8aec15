"Models that deceive are named for what they do, honest ones are not, and evidence is measured."

import math
import warnings
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import nn
from torch.autograd import grad as grad_of  # before any check could watch it
from torchvision.models import resnet18
from under_attack import NEVER

from genrobust.attacks import apgd, fgsm, random_noise
from genrobust.deceivers import EXPECTED, OF_TWO_CLASSES, Linear, deceiving_models, honest_models
from genrobust.diagnosis import (
    ATTACK_CHECKS,
    EFFORTS,
    MODEL_CHECKS,
    AttackCase,
    Caution,
    Effort,
    ModelCase,
    answers_differ,
    binarisation,
    binary_problem,
    chance_accuracy,
    cross_check,
    gradient_mismatch,
    inner_optimisation,
    inspect_model,
    saturation,
    small_radius,
    solved_problems,
    surrogate,
)
from genrobust.evaluation import evaluate, worst_case
from genrobust.models import load_pretrained

EPS, N = 0.05, 8
HONEST = 'linear two_classes one_logit mlp_float64 tiny_cnn tiny_resnet tiny_transformer'.split()
HONEST += ['two_logits_mlp', 'one_logit_mlp']
AROUND_LINEAR = [name for name in EXPECTED if not name.startswith(('expects', 'k_', 'one_'))]


@pytest.fixture(scope='module')
def splits(loaded):
    return loaded[1]


@pytest.fixture(scope='module')
def dishonest(splits):
    return deceiving_models(splits.train.x[:2000], splits.train.y[:2000])


@pytest.fixture(scope='module')
def honest(splits):
    return honest_models(splits.train.x[:2000], splits.train.y[:2000])


@pytest.fixture(autouse=True)
def little(monkeypatch):
    "Little effort, the same checks"
    monkeypatch.setitem(EFFORTS, 'quick', Effort(N, 15, 150, 40))


def images(splits, name='', n=N):
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
    return found + cross_check(model, attacked(model, x, y, eps, p), p, eps, size='quick')


# --- who deceives and who does not


@pytest.fixture(scope='module')
def evaluated(dishonest, honest, splits):
    "Reports by the name of the model, each made once"

    @cache
    def report(name):
        model = (dishonest | honest)[name]
        own = dict(eps=EPS, size='quick', progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter('error')  # nothing but the report speaks
            return evaluate(model, *images(splits, name, 24), **own)

    return report


@pytest.mark.parametrize('name', EXPECTED)
def test_each_deceiver_is_named_for_what_it_does(evaluated, name):
    found = evaluated(name).warnings
    assert EXPECTED[name] in names(found)
    assert all(math.isfinite(c.evidence) and c.evidence > 0 and c.advice for c in found)


@pytest.mark.parametrize('name', HONEST)
def test_there_is_no_false_alarm_on_small_honest_models(evaluated, name):
    report = evaluated(name)
    assert report.warnings == []
    assert sum(isinstance(of, float) for of in report.evidence.values()) >= 20, report.evidence


@pytest.mark.parametrize('name', AROUND_LINEAR)
def test_the_rate_is_the_exact_one_or_said_to_deserve_no_belief(evaluated, honest, splits, name):
    "That of the linear model behind a deception, but for one image"
    x, y = images(splits, name, 24)
    exact = honest['linear'].is_robust(x, y, EPS).double().mean().item()
    report = evaluated(name)
    assert abs(report.robust.rate[0] - exact) < 1.5 / len(x) or report.warnings, report


@pytest.mark.parametrize('p, eps', [(2, 1.0), (1, 5.0)])
@pytest.mark.parametrize('name', ['linear', 'mlp_float64', 'one_logit_mlp'])
def test_there_is_no_false_alarm_in_other_norms(honest, splits, name, p, eps):
    assert all_cautions(honest[name], *images(splits, name), eps, p) == []


def test_there_is_no_false_alarm_on_an_adversarially_trained_model(fashion):
    assert all_cautions(load_pretrained('cnn_at', device='cpu'), *images(fashion, n=4)) == []


@pytest.mark.parametrize('name', ['gfz', 'dfz'])
def test_deep_bayes_classifiers_are_random_and_nothing_else(fashion, name, monkeypatch):
    monkeypatch.setitem(EFFORTS, 'quick', Effort(2, 10, 10, 10))
    model, (x, y) = load_pretrained(name, device='cpu'), images(fashion, n=2)
    assert names(inspect_model(model, x, y, size='quick')) == ['random_answers']
    if name == 'gfz':
        result = apgd(model, x, y, eps=0.3, steps=10, loss='margin', early_stop=True)
        assert cross_check(model, result, math.inf, 0.3, size='quick') == []


# --- what each check sees


@pytest.fixture(scope='module')
def linear(honest):
    return honest['linear']


@pytest.mark.parametrize('name', ['rounded', 'detached'])
def test_attacks_that_need_no_gradient_see_more_than_those_that_do(dishonest, splits, name):
    x, y = images(splits)
    result = attacked(dishonest[name], x, y, 0.1)
    found = cross_check(dishonest[name], result, math.inf, 0.1, size='quick')
    wanted = {'black_box_beats_white_box', 'transfer_beats_white_box'}
    if name == 'rounded':  # of a model without a gradient attacks by gradients find nothing
        wanted |= {'unbounded_attack_fails', 'binarisation'}
    assert wanted == set(names(found))


def test_an_attack_that_was_too_short_is_noticed(linear, splits):
    x, y = images(splits)
    for result in (fgsm(linear, x, y, eps=0.002), random_noise(linear, x, y, eps=0.1)):
        found = cross_check(linear, result, math.inf, 0.1, size='quick')
        assert 'more_steps_help' in names(found)
    evidence = {c.name: c.evidence for c in found}['more_steps_help']
    left = (result.attacked & ~result.success).sum() - linear.is_robust(x, y, 0.1).sum()
    assert evidence == pytest.approx((left / result.attacked.sum()).item(), abs=1e-6)


def test_one_image_may_be_luck(linear, splits):
    x, y = images(splits)
    result = worst_case(linear, x, y, p=math.inf, eps=0.1, size='quick')
    fallen = result.success.nonzero()[:, 0]
    result.success[fallen[:1]] = False
    assert cross_check(linear, result, math.inf, 0.1, size='quick') == []
    result.success[fallen[:2]] = False
    assert 'more_steps_help' in names(cross_check(linear, result, math.inf, 0.1, size='quick'))


def test_one_step_must_not_beat_many(linear, splits):
    "A gradient that is right at images of 8 bits, and points backwards everywhere else"
    x, y = images(splits)

    def two_faced(z):
        off = ((255 * z - (255 * z).round()).abs().flatten(1).amax(1) > 1e-3)[:, None, None, None]
        return linear(torch.where(off, 2 * z.detach() - z, z))

    result = worst_case(two_faced, x, y, p=math.inf, eps=0.1, size='quick')
    found = cross_check(two_faced, result, math.inf, 0.1, size='quick')
    assert {'fgsm_beats_pgd', 'black_box_beats_white_box'} <= set(names(found))


def test_bounds_that_are_not_those_of_the_images(linear, splits):
    x, y = images(splits)
    found = inspect_model(linear, x, y, bounds=(0, 255), size='quick')
    assert names(found) == ['image_bounds'] and found[0].evidence == pytest.approx(255, rel=0.05)
    with pytest.raises(ValueError, match='within bounds'):
        inspect_model(linear, 255 * x, y, size='quick')
    assert inspect_model(lambda z: linear(z / 255), 255 * x, y, bounds=(0, 255), size='quick') == []


def test_no_check_leaves_bounds_of_pixels(linear, splits):
    x, y = images(splits)
    high = torch.ones_like(x[:1])
    high[..., :14, :] = 0.5
    x = x * high

    def undefined(z):
        "Whose logits are NaN at images outside the bounds"
        is_outside = (z > high + 1e-6).flatten(1).any(1)
        return linear(z / high).masked_fill(is_outside[:, None], math.nan)

    bounds = 0, high
    assert inspect_model(undefined, x, y, bounds=bounds, size='quick') == []
    result = worst_case(undefined, x, y, p=math.inf, eps=EPS, bounds=bounds, size='quick')
    assert cross_check(undefined, result, math.inf, EPS, bounds=bounds, size='quick') == []


def test_a_binary_problem_is_solved_within_the_bounds_of_its_image(linear, splits):
    "Nine tenths of the pixels may move by 0.005: a point of the whole ball is out of reach"
    x, y = images(splits)
    is_wide = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    room = torch.where(is_wide, 1.0, 0.005)
    bounds = (x - room).clamp_min(0), (x + room).clamp_max(1)
    result = worst_case(linear, x, y, p=math.inf, eps=0.1, bounds=bounds, size='quick')
    case = AttackCase(linear, result, math.inf, 0.1, bounds, size='quick')
    assert len(solved_problems(case)) and solved_problems(case).all()


@pytest.mark.parametrize('sigma', [0, 1e-3])
def test_logits_that_are_no_numbers_fool_nobody(linear, splits, sigma):
    x, y = images(splits)

    def undefined(z):
        "Whose logits are NaN at a bright pixel, and noisy"
        logits = linear(z) + sigma * torch.randn(len(z), 10)
        return logits.masked_fill((z > 1.5).flatten(1).any(1)[:, None], math.nan)

    result = random_noise(undefined, x, y, eps=1e-3, bounds=(0, 2))
    case = AttackCase(undefined, result, math.inf, 0.1, (0, 2), size='quick')
    bright = case.x.clone()
    bright[..., 0, 0] = 2
    assert case.draws == (15 if sigma else 1) and not case.is_fooled(bright).any()


def test_an_accuracy_of_guessing_is_told_on_whatever_labels(linear, splits):
    x, y = images(splits, n=2 * N)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    answers = dict(
        roll=lambda z: linear(z).roll(1, 1), dark=lambda z: linear(0 * z) + 0 * linear(z)
    )
    for model, labels in [(linear, y[order])] + [(model, y) for model in answers.values()]:
        assert 'chance_accuracy' in names(inspect_model(model, x, labels, size='quick'))
    mostly = torch.cat([(y == 3).nonzero()[:, 0]] * 6 + [(y == 4).nonzero()[:1, 0]])[:N]
    for i in (mostly, mostly[:-1]):  # of two classes, of one
        wrong = (linear(x[i]).argmax(1) + 1) % 10
        assert 'chance_accuracy' in names(inspect_model(linear, x[i], wrong, size='quick'))


def test_few_images_or_one_class_or_a_weak_model_raise_no_alarm(linear, splits):
    x, y = splits.test
    right = linear(x[:600]).argmax(1) == y[:600]
    for c in range(10):
        i = (y[:600] == c).nonzero()[: 2 * N, 0]
        assert chance_accuracy(ModelCase(linear, x[i], y[i], size='quick')) is None
    half = torch.cat([right.nonzero()[:N, 0], (~right).nonzero()[:N, 0]])
    for i in [torch.arange(n, n + m) for n in range(20) for m in (1, 2, 3, N)] + [half]:
        assert chance_accuracy(ModelCase(linear, x[i], y[i], size='quick')) is None
    one = (~right).nonzero()[:3, 0]
    assert math.isnan(chance_accuracy.measure(ModelCase(linear, x[one], y[one])))


@pytest.mark.parametrize('p, eps', [(1, 12), (2, 0.5), (math.inf, 8 / 255)])
def test_a_radius_that_is_not_to_scale_is_told(linear, splits, p, eps):
    x, y = images(splits)

    def caution(model, x, eps, bounds=(0, 1)):
        result = random_noise(model, x, y, eps=1e-3, bounds=bounds)
        return small_radius(AttackCase(model, result, p, eps, bounds, size='quick'))

    bounds = torch.zeros_like(x), torch.full_like(x, 255.0)
    found = caution(lambda z: linear(z / 255), 255 * x, eps, bounds)
    assert found.evidence == pytest.approx(255 * 784 ** (1 / p) / eps, rel=1e-6)
    assert caution(lambda z: linear(z / 255), 255 * x, 255 * eps, bounds) is None
    assert caution(linear, x, eps / 4) is None


def test_gradients_are_counted_however_they_are_asked_for(linear, splits):
    x, y = images(splits)

    def by_backward(z):
        inner = z.detach().clone().requires_grad_()
        with torch.enable_grad():
            linear(inner).sum().backward()
        return linear(z) + 0 * inner.grad.sum()

    def by_function(z):
        torch.func.grad(lambda v: linear(v).sum())(z.detach())
        return linear(z)

    def by_name(z):
        inner = z.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = grad_of(linear(inner).sum(), inner)
        return linear(z) + 0 * g.sum()

    def by_inference(z):
        with torch.inference_mode():
            hidden = linear(z)
        return weight * hidden  # "Inference tensors cannot be saved for backward"

    weight = nn.Parameter(torch.ones(10))
    assert names(inspect_model(by_inference, x, y, size='quick')) == ['no_gradient']
    before = torch.autograd.grad, torch.autograd.backward
    for model in (by_backward, by_function, by_name):
        assert names(inspect_model(model, x, y, size='quick')) == ['inner_optimisation']
    case = ModelCase(linear, x, y, size='quick')
    case.view = nn.Linear(3, 3)
    with pytest.raises(ValueError, match='cannot take images'):
        inner_optimisation(case)
    assert (torch.autograd.grad, torch.autograd.backward) == before


@pytest.mark.parametrize('share', [0.05, 0.5])
def test_pixels_cut_off_from_the_gradient_are_noticed(linear, splits, share):
    x, y = images(splits)
    is_cut = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0)) < share

    def model(z):
        return linear(torch.where(is_cut, z.detach(), z))

    assert names(inspect_model(model, x, y, size='quick')) == ['gradient_mismatch']
    unused = torch.where(is_cut, 0, 1.0)  # no gradient there, and rightly so
    assert inspect_model(lambda z: linear(z * unused), x, y, size='quick') == []


def test_a_step_is_not_too_wide_for_images_of_many_pixels():
    torch.manual_seed(0)
    net = resnet18(num_classes=10).eval()
    x = nn.functional.interpolate(torch.rand(4, 3, 8, 8), size=(128, 128), mode='bilinear')
    assert inspect_model(net, x, None, size='quick') == []


@pytest.mark.parametrize('seed', range(20))
def test_one_coin_for_all_images_is_random(linear, splits, seed):
    x, y = images(splits)

    def coin(z):
        return linear(z) if torch.rand(()) < 0.5 else -linear(z)

    assert 'random_answers' in names(inspect_model(coin, x, y, seed=seed, size='quick'))


def test_what_all_classes_share_hides_no_randomness_and_is_none(linear, splits):
    x, y = images(splits)
    noisy = inspect_model(lambda z: linear(z) - 20000 + torch.randn(len(z), 10), x, y, size='quick')
    assert 'random_answers' in names(noisy)
    for offset in (0, -20000):
        found = inspect_model(
            lambda z, c=offset: linear(z) + c + torch.randn(()), x, y, size='quick'
        )
        assert 'random_answers' not in names(found)
        assert inspect_model(lambda z, c=offset: linear(z) + c, x, y, size='quick') == []


def test_half_precision_and_steep_models_raise_no_alarm(linear, splits):
    x, y = images(splits)
    assert inspect_model(Linear().to(torch.bfloat16).eval(), x.bfloat16(), None, size='quick') == []
    for scale in (1e-6, 20.0):
        assert inspect_model(lambda z, s=scale: s * linear(z), x, y, size='quick') == []
    for dtype in (torch.bfloat16, torch.float16):  # as by autocast
        layer = deepcopy(linear).to(dtype)
        assert (
            inspect_model(lambda z, f=layer: f(z.to(f.layer.weight)).float(), x, y, size='quick')
            == []
        )
    shifted = ModelCase(lambda z: linear(z) - 1000, x, y, size='quick')
    assert gradient_mismatch(shifted) is None and saturation(shifted) is None


# --- what checks leave as it was, and what they may be given


def test_checks_change_neither_model_nor_images_nor_random_numbers(dishonest, splits):
    model, (x, y) = dishonest['dropout_on'], images(splits)
    weights = [w.clone() for w in model.parameters()]
    before, state = x.clone(), torch.get_rng_state()
    modes = [part.training for part in model.modules()]
    inspect_model(model, x, y, size='quick')
    assert torch.equal(x, before) and modes == [part.training for part in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    assert torch.equal(state, torch.get_rng_state())
    again = inspect_model(model, x, y, size='quick')
    assert again == inspect_model(model, x, y, size='quick')


def test_running_statistics_stay_what_they_are(honest, splits):
    model, (x, y) = honest['tiny_resnet'], images(splits)
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        found = names(inspect_model(model.train(), x, y, size='quick'))
    finally:
        model.eval()
    assert {'training_mode', 'batch_dependence'} <= set(found)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers()))


def test_the_same_seed_gives_the_same_evidence(dishonest, splits):
    x, y = images(splits, n=3)
    result = attacked(dishonest['rounded'], x, y, 0.1)
    how = dict(size='quick', seed=3)
    one, two = [cross_check(dishonest['rounded'], result, math.inf, 0.1, **how) for _ in range(2)]
    assert one == two and all(isinstance(caution, Caution) for caution in one)


def test_a_binary_problem_has_a_solution_on_the_sphere_and_none_inside(linear, splits):
    x, y = images(splits)
    for p, eps in ((math.inf, 0.1), (2, 1.0)):
        case = AttackCase(linear, attacked(linear, x, y, eps, p), p, eps, size='quick')
        readout = binary_problem(case, 0)
        assert readout(case.x[:1]).argmax(1) == 0
        generator = torch.Generator().manual_seed(5)
        noise = 2 * torch.rand(50, *x.shape[1:], generator=generator) - 1
        if p == math.inf:
            inside = (case.x[0] + 0.9 * eps * noise).clamp(0, 1)
            assert (readout(inside).argmax(1) == 0).double().mean() > 0.8
        found = apgd(readout, case.x[:1], torch.zeros(1).long(), p=p, eps=eps, steps=20)
        assert found.success.all()
        assert binarisation.measure(case) == 0


def test_nothing_is_checked_where_nothing_was_attacked(linear, splits):
    x, _ = images(splits)
    y = (linear(x).argmax(1) + 1) % 10
    result = attacked(linear, x, y)
    assert cross_check(linear, result, math.inf, EPS, size='quick') == []


@pytest.mark.parametrize('check', MODEL_CHECKS + ATTACK_CHECKS, ids=lambda c: c.__name__)
def test_a_check_says_what_it_measures_and_what_to_do(check):
    assert check.__doc__ and check.advice
    assert callable(check.limit) or check.limit >= 0


def test_bad_input_is_one_clear_error(linear, splits):
    x, y = images(splits)
    result = attacked(linear, x, y)
    for own, text in [
        (dict(size='huge'), 'size must be'),
        (dict(bounds=(1, 0)), 'bounds must be'),
        (dict(x=x[:0]), 'no image'),
        (dict(x=x * math.nan), 'NaN'),
    ]:
        with pytest.raises(ValueError, match=text):
            inspect_model(**dict(model=NEVER, x=x, y=y) | own)
    for own, text in [
        (dict(p=3), 'p must be'),
        (dict(eps=-1), 'eps must be'),
        (dict(result=None), 'result must be'),
        (dict(size=1), 'size must be'),
    ]:
        with pytest.raises(ValueError, match=text):
            cross_check(**dict(model=NEVER, result=result, p=2, eps=1.0) | own)
    for own, text in [(dict(y=y + 10), 'y must lie'), (dict(y=y[:2]), 'y must be')]:
        with pytest.raises(ValueError, match=text):
            inspect_model(**dict(model=linear, x=x, y=y) | own)


class Masked(nn.Module):
    "A network with a class that never wins"

    def __init__(self, net, logit, noise=0.0):
        super().__init__()
        self.net, self.logit, self.noise = net, logit, noise
        self.eval()

    def forward(self, x):
        logits = self.net(x + self.noise * torch.randn_like(x))
        return torch.cat([logits, torch.full_like(logits[:, :1], self.logit)], 1)


def test_a_masked_class_hides_no_randomness_and_no_gradient(linear, splits):
    x, y = splits.test.first(N)
    differ = [answers_differ(Masked(linear, logit, 0.3), x) for logit in (-10.0, -1e4, -1e9)]
    assert min(differ) > 0.01 and max(differ) < 2 * min(differ)
    assert answers_differ(Masked(linear, -1e9), x) == 0
    result = worst_case(linear, x, y, p=math.inf, eps=EPS)
    case = AttackCase(Masked(linear, -1e9), result, math.inf, EPS, size='quick')
    net = surrogate(case)
    assert (net(x).argmax(1) == linear(x).argmax(1)).float().mean() > 0.6


def test_what_succeeds_outside_the_ball_is_no_success_within(linear, splits):
    x, y = splits.test.first(N)
    far = worst_case(linear, x, y, p=2)
    eps = far.l2[far.success].median().item()
    case = AttackCase(linear, far, 2, eps, size='quick')
    assert 0 < len(case.standing) == (far.l2[far.attacked] > eps).sum() < len(case)
    assert case.left is not None
    noisy = AttackCase(Masked(linear, -10.0, 0.01), far, 2, eps, size='quick')
    assert noisy.draws > 1 and 0 < len(noisy.standing) < len(noisy)
