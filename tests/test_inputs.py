"What users ask for in every attack: masks, bounds and radii of each image, random models, other answers, 256 levels, a trace."

import json
import pickle
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from under_attack import (
    IN_A_BALL,
    NET,
    NEVER,
    QUERIES,
    Counting,
    Noisy,
    each,
    every_attack,
    images,
    in_norm,
    listed,
    make_net,
    same,
    small,
)

from genrobust.attacks import (
    EOT,
    AttackResult,
    Normalized,
    alma,
    carlini_wagner,
    ddn,
    deepfool,
    fgsm,
    fmn,
    hop_skip_jump,
    list_attacks,
    one_vs_all,
    pgd,
    random_noise,
    rescore,
    spsa,
    square,
    truncated_deepfool,
    zoo,
)
from genrobust.attacks.inputs import Wrapped
from genrobust.models import BayesClassifier, list_models, pretrained_names
from genrobust.numerics import can_be_fixed, is_trusted, trusted

ENOUGH = {
    alma: dict(steps=30),
    ddn: dict(steps=30),
    fmn: dict(steps=30),
    deepfool: dict(steps=50),
    truncated_deepfool: dict(steps=100),
    carlini_wagner: dict(steps=20, binary_search_steps=3),
    zoo: dict(max_queries=2000, coordinates=32),
}  # for attacks to succeed


def enough(attack, *args, **kw):
    return small(attack, *args, **{**ENOUGH.get(attack, {}), **kw})


def refuses(attack, message, **kw):
    with pytest.raises(ValueError, match=message):
        small(attack, NEVER, images(), **kw)


# --- masks


def half():
    "The left half of an image"
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    return mask


@every_attack
def test_masked_pixels_stay_as_they_are(attack):
    x, mask = images(20), half()
    result = enough(attack, make_net(30.0), x, mask=mask)
    still = ~mask.expand_as(x)
    assert torch.equal(result.x_adv[still], x[still]) and torch.equal(result.x, x)
    assert result.success.any() and result.l2[result.success].min() > 0
    assert 'mask' in json.loads(json.dumps(result.settings))
    for other in (mask.float(), mask[0], mask.expand_as(x), mask.long().numpy()):
        same(enough(attack, make_net(30.0), x, mask=other), result)


@every_attack
def test_a_mask_may_differ_from_image_to_image(attack):
    x = images(6)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0], mask[1] = False, True
    result = enough(attack, make_net(30.0), x, mask=mask)
    assert torch.equal(result.x_adv[~mask], x[~mask])
    assert not result.success[0] and torch.equal(result.x_adv[0], x[0])
    plain = enough(attack, make_net(30.0), x)
    assert torch.equal(plain.x_adv[1], result.x_adv[1])
    nothing = enough(attack, NET, x, mask=torch.zeros(1, 8, 8))
    assert not nothing.success.any() and torch.equal(nothing.x_adv, x)


@every_attack
def test_all_pixels_free_is_no_mask(attack):
    x = images()
    same(small(attack, NET, x, mask=torch.ones(1, 8, 8)), small(attack, NET, x))


@pytest.mark.parametrize('p', [2, torch.inf])
def test_deepfool_under_a_mask_finds_the_distance_of_a_linear_model(p):
    torch.manual_seed(0)
    linear, x = nn.Linear(20, 2).eval(), torch.rand(50, 20) * 0.2 + 0.4
    mask = torch.arange(20) < 10
    w, logits = (linear.weight[1] - linear.weight[0]) * mask, linear(x)
    exact = ((logits[:, 1] - logits[:, 0]).abs() / w.norm(2 if p == 2 else 1)).detach()
    result = deepfool(linear, x, p=p, mask=mask, overshoot=1e-4, bounds=(-10, 10))
    size = result.l2 if p == 2 else result.linf
    assert result.success.all() and torch.allclose(size, exact, rtol=1e-3)
    if p == 2:
        result = carlini_wagner(linear, x, mask=mask, bounds=(-10, 10))
        assert result.success.all() and torch.allclose(result.l2, exact, rtol=1e-2)


@each(QUERIES)
def test_queries_are_not_wasted_on_masked_pixels(attack):
    "One row of eight may change: a black box that knew nothing of it would hardly ever touch it"
    x, mask = images(20), torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 4] = True
    moved = []

    def model(x_):
        if len(x_) and x_.shape[1:] == x.shape[1:]:
            moved.append((x_[:, None] != x[None]).flatten(2).any(2).all(1))
        return make_net(30.0)(x_)

    enough(attack, model, x, mask=mask)
    assert torch.cat(moved[1:]).double().mean() > 0.6


def test_masks_that_are_none():
    for mask in (torch.full((1, 8, 8), 0.5), torch.ones(3, 8, 8), torch.ones(8), 'left', [1, 2]):
        refuses(pgd, 'mask must be', mask=mask)


# --- bounds of each image, channel or pixel


def of_each(n=6):
    "Bounds around the images, of each image"
    spread = torch.arange(n) / 10
    return -spread, 1 + spread


@every_attack
def test_bounds_of_each_image(attack):
    x, (low, high) = images(), of_each()
    together = small(attack, NET, x, bounds=(low, high))
    for n in range(len(x)):
        alone = small(attack, NET, x, bounds=(low[n].item(), high[n].item()))
        for name in ('x_adv', 'y_adv', 'success', 'forwards', 'backwards'):
            assert torch.equal(getattr(together, name)[n], getattr(alone, name)[n]), (n, name)
    assert together.settings['bounds'] == [low.tolist(), high.tolist()]


@every_attack
def test_bounds_of_each_channel_or_pixel(attack):
    x = images() / 2
    wide = torch.ones(1, 8, 8)
    same(enough(attack, NET, x, bounds=(0, wide)), enough(attack, NET, x))
    high = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(2)) / 2 + 0.5
    result = enough(attack, make_net(30.0), x, bounds=(torch.zeros(1, 1, 1), high))
    assert (result.x_adv <= high).all() and (result.x_adv >= 0).all() and result.success.any()


def test_bounds_that_are_none():
    equal, wrong = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    wrong[0, 3, 3] = torch.nan
    for bounds in ((0, equal), (0, wrong), (torch.zeros(6), torch.zeros(6)), (0, torch.ones(5))):
        refuses(deepfool, 'bounds must be', bounds=bounds)
    refuses(pgd, r'must lie within bounds; it does not', bounds=(torch.full((6,), 0.5), 1))


# --- a radius for each image


@pytest.mark.parametrize(
    'attack, p',
    [(attack, p) for p in (2, torch.inf) for attack in listed(p=p, minimum_norm=False)],
    ids=lambda v: getattr(v, '__name__', str(v)),
)
def test_a_radius_for_each_image(attack, p):
    x, own = images(), in_norm(attack, p)
    own |= dict(restarts=1) if attack is pgd else {}  # batches of the same size
    eps = torch.tensor([0.0, 0.01, 0.1, 1 / 3, 0.5, 1])
    together = small(attack, NET, x, eps=eps, **own)
    for n in range(len(x)):
        alone = small(attack, NET, x, eps=eps.double()[n].item(), **own)
        for name in ('x_adv', 'y_adv', 'success', 'forwards', 'backwards'):
            assert torch.equal(getattr(together, name)[n], getattr(alone, name)[n]), (n, name)
    assert together.settings['eps'] == eps.double().tolist()
    same(small(attack, NET, x, eps=eps[:, None, None, None], **own), together)
    in_parts = small(attack, NET, x, eps=eps.tolist(), batch_size=4, **own)
    assert torch.allclose(in_parts.x_adv, together.x_adv, atol=1e-5)


@each(IN_A_BALL)
def test_a_radius_for_each_pixel(attack):
    x, own = images(), in_norm(attack, torch.inf)
    eps = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(3)) / 3
    eps[:, 0] = 0
    result = small(attack, NET, x, eps=eps, **own)
    assert (result.perturbation.abs() <= eps).all()
    assert torch.equal(result.x_adv[..., 0, :], x[..., 0, :])
    assert (result.perturbation.abs() > eps / 3)[..., 1:, :].any()
    same(
        small(attack, NET, x, eps=torch.full((1, 8, 8), 0.1), **own),
        small(attack, NET, x, eps=0.1, **own),
    )


@each(IN_A_BALL)
def test_radii_that_are_none(attack):
    for eps in ([0.1] * 5, torch.ones(5), torch.tensor([0.1] * 5 + [-1]), [0.1] * 5 + [torch.nan]):
        refuses(attack, 'eps must be', eps=eps)
    refuses(attack, 'eps must be', eps='wide')
    if in_norm(attack, 2):
        refuses(attack, 'eps must be one number an image', eps=torch.ones(1, 8, 8), p=2)


# --- random models


@every_attack
def test_draws_are_counted(attack):
    model, x = Counting(Noisy(0.05)), images()
    result = small(attack, model, x, draws=3, batch_size=6)
    assert result.forwards.sum() == model.forwards and result.settings['draws'] == 3
    same(small(attack, Noisy(0.05), x, draws=3), result)
    once = small(attack, NET, x, draws=1)
    assert 'draws' not in once.settings


def test_more_draws_less_variance():
    x, model = images(20), Noisy(0.5)
    y = NET(x).argmax(1)

    def spread(draws):
        found = [
            fgsm(model, x, y, eps=0.05, seed=s, draws=draws, p=2).perturbation for s in range(6)
        ]
        return torch.stack(found).var(0).sum().item()

    assert spread(30) < spread(1) / 2
    rates = [pgd(model, x, y, eps=0.1, draws=n, seed=1, steps=10) for n in (1, 20)]
    shares = [rescore(r, model, draws=50).share.nanmean().item() for r in rates]
    assert shares[1] >= shares[0]


def test_draws_of_a_bayes_classifier_are_its_average():
    torch.manual_seed(0)
    clf, x = BayesClassifier('GFZ', n_samples=2).eval(), torch.rand(2, 1, 28, 28)
    found = pgd(clf, x, eps=0.05, steps=3, draws=4, seed=7)
    same(found, pgd(clf.averaged(4, seed=7), x, eps=0.05, steps=3, seed=7))
    assert found.forwards.tolist() == [4 * 5] * 2 and found.settings['noise_seed'] == 7
    fixed = clf.fixed(3)
    same(pgd(fixed, x, eps=0.05, steps=3, draws=4), pgd(fixed, x, eps=0.05, steps=3))


def test_eot_answers_with_means():
    x, model = images(), Noisy(0.5)
    for of in ('losses', 'probabilities'):
        torch.manual_seed(0)
        draws = torch.stack([model(x).log_softmax(1) for _ in range(5)])
        expected = draws.mean(0) if of == 'losses' else draws.exp().mean(0).log()
        torch.manual_seed(0)
        assert torch.allclose(EOT(model, 5, of=of)(x), expected, atol=1e-6)
    result = fgsm(EOT(model, 5), x)
    assert result.forwards.tolist() == [10] * 6
    same(fgsm(model, x, draws=5), result)
    for behind in (Normalized(EOT(model, 5), 0.0, 1.0), EOT(EOT(model, 5), 1)):
        assert fgsm(behind, x).forwards.tolist() == [10] * 6
    with pytest.raises(ValueError, match='of must be one of'):
        EOT(model, 5, of='logits')


@every_attack
def test_draws_that_are_none(attack):
    for draws in (0, 2.5, None, True):
        refuses(attack, 'draws must be', draws=draws)


# --- other answers


Answer = namedtuple('Answer', 'loss logits')
ANSWERS = {
    'dict': (
        lambda x: dict(loss=0, logits=NET(x)),
        lambda out: out['logits'],
        r"'logits'.*out\['logits'\]",
    ),
    'tuple': (lambda x: (NET(x), x), lambda out: out[0], r'out\[0\]'),
    'namedtuple': (lambda x: Answer(0, NET(x)), lambda out: out.logits, r'out\.logits'),
    'object': (lambda x: SimpleNamespace(logits=NET(x)), lambda out: out.logits, r'out\.logits'),
}


@every_attack
@pytest.mark.parametrize('kind', ANSWERS)
def test_answers_that_hold_logits(attack, kind):
    model, logits_of, advice = ANSWERS[kind]
    x = images()
    same(small(attack, model, x, logits_of=logits_of), small(attack, NET, x))
    with pytest.raises(ValueError, match=advice):
        small(attack, model, x)


@every_attack
def test_one_logit_is_a_binary_model(attack):
    net = make_net(classes=2)

    def one(x):
        logits = net(x)
        return logits[:, 1] - logits[:, 0]

    def two(x):
        return torch.stack([torch.zeros(len(x)), one(x)], 1)

    x = images()
    expected = small(attack, two, x)
    same(small(attack, one, x), expected)
    same(small(attack, lambda x: one(x)[:, None], x), expected)
    result = small(attack, lambda x: one(x).sigmoid(), x, logits_of=torch.logit)
    assert torch.equal(result.success, expected.success)
    assert torch.allclose(result.x_adv, expected.x_adv, atol=0.05) or attack in QUERIES


def test_logits_of_that_is_none():
    for attack in (pgd, square, deepfool):
        refuses(attack, 'logits_of must be a function', logits_of='logits')
        with pytest.raises(
            ValueError, match='logits_of cannot take logits out of a dict: KeyError'
        ):
            small(attack, lambda x: dict(a=NET(x)), images(), logits_of=lambda out: out['b'])


# --- normalised images


def test_a_model_of_normalised_images():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 4)).eval()
    mean, std, x = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), torch.rand(4, 3, 8, 8)
    model = Normalized(conv, mean, std)
    m, s = (torch.tensor(v)[:, None, None] for v in (mean, std))
    assert torch.equal(model(x), conv((x - m) / s)) and not model.training
    result, y = deepfool(model, x), model(x).argmax(1)
    bounds = ((0 - m) / s, (1 - m) / s)
    other = deepfool(conv, (x - m) / s, y, bounds=bounds)
    assert result.success.all() and torch.equal(result.success, other.success)
    assert not hasattr(model, 'fixed') and not hasattr(model, 'per_class_logits')
    for bad in (dict(mean=0, std=0), dict(mean='a', std=1), dict(mean=[torch.nan], std=1)):
        with pytest.raises(ValueError, match='mean|std'):
            Normalized(conv, **bad)
    with pytest.raises(ValueError, match='channels'):
        fgsm(Normalized(conv, (0.5, 0.5), 1), x)


@pytest.mark.parametrize('mean, std', [(0.4, 0.2), (0.4, (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), 0.5)])
def test_a_normalised_model_can_be_traced_and_stored(mean, std):
    model, x = Normalized(nn.Flatten(), mean, std), torch.rand(2, 3, 4, 4)
    expected = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.func.jacrev(model)(x[:1])
    for again in (torch.jit.trace(model, x), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(again(x), expected.flatten(1))


def test_a_normalised_bayes_classifier_keeps_its_protocol():
    torch.manual_seed(0)
    clf, x = BayesClassifier('GFZ', n_samples=2).eval(), torch.rand(2, 1, 28, 28)
    model = Normalized(clf, 0.0, 1.0)
    assert model.n_classes == 10 and model.images_at_once == clf.images_at_once
    same(deepfool(model, x, seed=3, steps=3), deepfool(clf, x, seed=3, steps=3))
    shifted = Normalized(clf, 0.1, 0.9)
    fixed = shifted.fixed(3)
    assert torch.allclose(fixed(x), clf.fixed(3)((x - 0.1) / 0.9)) and fixed.fixed(0) is fixed
    assert deepfool(shifted, x, steps=2).backwards.max() <= 3  # the Jacobian in one pass


def test_a_function_becomes_a_module_and_a_wrapped_model_keeps_its_protocol():
    torch.manual_seed(0)
    clf, x = BayesClassifier('GFZ', n_samples=2).eval(), torch.rand(2, 1, 28, 28)
    function = Wrapped(lambda x: x.flatten(1))
    assert not can_be_fixed(function) and torch.equal(function(x), x.flatten(1))
    model = Wrapped(clf)
    assert type(model.fixed(3)) is Wrapped and torch.equal(model.fixed(3)(x), clf.fixed(3)(x))
    assert torch.equal(model.averaged(2, seed=3)(x), clf.averaged(2, seed=3)(x))


# --- 256 levels


def on_levels(n=20):
    return (255 * images(n)).round() / 255


@every_attack
@pytest.mark.parametrize('p', [2, torch.inf])
def test_quantized_survives_a_file(attack, p):
    x, net = on_levels(), make_net()
    own = in_norm(attack, p)
    if attack in IN_A_BALL:
        own['eps'] = 20 / 255 if p == torch.inf else 0.7
    result, plain = (enough(attack, net, x, quantized=q, **own) for q in (True, False))
    file = (255 * result.x_adv).round().to(torch.uint8)
    assert torch.equal(file.to(torch.float32) / 255, result.x_adv)
    assert torch.equal(result.success, net(file / 255).argmax(1) != result.y)
    assert result.success.sum() >= 0.7 * plain.success.sum() and result.settings['quantized']
    if attack in IN_A_BALL:
        size = result.linf if p == torch.inf or attack is random_noise else result.l2
        assert (size <= own['eps'] * (1 + 1e-5)).all()
    elif attack is not hop_skip_jump:
        assert result.l2[result.success].mean() < 1.3 * plain.l2[plain.success].mean()
    else:
        assert torch.equal(result.x_adv[~result.success], x[~result.success])


@every_attack
def test_quantized_with_other_bounds_and_a_mask(attack):
    x, net = on_levels(), make_net(30.0)
    own = dict(eps=30) if attack in IN_A_BALL else {}
    own |= {zoo: dict(h=2.0), spsa: dict(h=2.0, lr=2.0)}.get(attack, {})
    own |= dict(bounds=(0, 255), quantized=True)
    result = enough(attack, lambda x: net(x / 255), 255 * x, **own)
    assert torch.equal(result.x_adv, result.x_adv.round()) and result.success.any()
    result = enough(attack, net, x, mask=half(), quantized=True)
    still = ~half().expand_as(x)
    assert torch.equal(result.x_adv[still], x[still])
    assert torch.equal((255 * result.x_adv).round() / 255, result.x_adv)


def test_quantized_where_nothing_can_survive():
    "The boundary lies a hundredth of a level away, but only one pixel counts, and it is at its bound"

    def model(x):
        return torch.stack([torch.zeros(len(x)), x.flatten(1)[:, 0] - 0.001 / 255], 1)

    x = torch.zeros(1, 1, 2, 2)
    result = pgd(model, x, eps=0.5 / 255, quantized=True)
    assert not result.success.any() and torch.equal(result.x_adv, x)
    assert pgd(model, x, eps=0.5 / 255).success.all()
    refuses(pgd, 'quantized needs images on 256 levels', quantized=True)


# --- a trace


@every_attack
def test_a_trace_holds_every_evaluation(attack, tmp_path):
    x, net = images(), make_net()
    own = in_norm(attack, torch.inf)
    result = small(attack, net, x, trace=True, batch_size=4, **own)
    same(result, small(attack, net, x, batch_size=4, **own))
    trace = result.trace
    assert torch.equal(trace.norm.isfinite().sum(1), result.forwards)
    assert torch.equal(trace.norm.isfinite(), trace.margin.isfinite())
    assert (trace.norm[:, 0] == 0).all() and (trace.margin[:, 0] > 0).all()
    assert trace.gradient.isfinite().sum(1).gt(0).eq(result.backwards > 0).all()
    assert ((trace.margin < 0).any(1) == result.success).all()
    frame = trace.to_frame()
    assert list(frame) == ['image', 'evaluation', 'margin', 'norm', 'gradient']
    assert len(frame) == result.forwards.sum() and 'trace' not in result.to_frame()
    result.save(tmp_path / 'a.safetensors')
    again = AttackResult.load(tmp_path / 'a.safetensors')
    for values, others in zip(again.trace, trace):
        assert torch.equal(values.nan_to_num(9), others.nan_to_num(9))
    for key in ('seed', 'only_here'):
        other = replace(result, settings=result.settings | {key: 7})
        for pair in ([result, other], [other, result]):
            with pytest.raises(ValueError, match=f'they differ in {key}'):
                AttackResult.cat(pair)
    both = AttackResult.cat([result, again.to('cpu')]).trace
    assert both.norm.shape == (12, trace.norm.shape[1])
    assert result.l2.isfinite().all() and small(attack, net, x, **own).trace is None


def test_a_trace_of_fgsm_is_what_it_says():
    x, net = images(), make_net()
    result = fgsm(net, x, eps=0.1, trace=True)
    trace, y = result.trace, result.y[:, None]
    for n, points in enumerate((x, result.x_adv)):
        logits = net(points).detach()
        others = logits.scatter(1, y, -torch.inf).amax(1)
        assert torch.allclose(trace.margin[:, n], logits.gather(1, y)[:, 0] - others, atol=1e-5)
    assert torch.allclose(trace.norm[:, 1], result.linf) and trace.gradient[:, 1].isnan().all()
    result = one_vs_all(pgd, net, x, steps=3, trace=True)
    assert torch.equal(result.trace.norm.isfinite().sum(1), result.forwards)


# --- lists


def test_attacks_and_models_are_listed():
    names = list_attacks()
    in_a_ball = 'random_noise fgsm pgd mim apgd spsa square'.split()
    assert sorted(list_attacks(minimum_norm=False)) == sorted(in_a_ball)
    assert set(list_attacks(minimum_norm=True)) == set(names) - set(in_a_ball)
    black_box = 'random_noise zoo spsa square hop_skip_jump'.split()
    assert sorted(list_attacks(black_box=True)) == sorted(black_box)
    assert 'carlini_wagner' in list_attacks(p=2)
    assert 'carlini_wagner' not in list_attacks(p=torch.inf)
    assert 'square' in list_attacks(p=2) and 'random_noise' not in list_attacks(p=2)
    assert list(list_models()) == pretrained_names()


NOT_A_NUMBER = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
NOT_A_NUMBER[1].bias.data.fill_(torch.nan)
LOOKED_AT = dict(
    images=(dict(x=torch.rand(3, 1, 8, 8) + 1), 'within bounds'),
    infinite=(dict(x=torch.full((3, 1, 8, 8), torch.inf)), 'NaN or infinity'),
    bounds=(dict(x=torch.rand(3, 1, 8, 8) + 1, bounds=(torch.zeros(3), 1)), 'within bounds'),
    labels=(dict(y=torch.tensor([0, 1, 9])), r'y must lie in 0..3, found 0..9'),
    target=(dict(y=torch.arange(3), target=torch.arange(3)), 'differ from the label'),
    logits=(dict(model=NOT_A_NUMBER), 'NaN or infinite logits'),
)


@pytest.mark.parametrize('name', LOOKED_AT)
def test_trusted_values_are_not_looked_at(name):
    given, said = LOOKED_AT[name]
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    given = dict(model=net, x=torch.rand(3, 1, 8, 8)) | given
    with pytest.raises(ValueError, match=said):
        random_noise(**given)
    with trusted():
        found = random_noise(**given)
        with trusted(False), pytest.raises(ValueError, match=said):
            random_noise(**given)
    assert not is_trusted() and (found.x_adv <= 1).all()
