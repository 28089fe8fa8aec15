"An attack's own fault must never look like a robust model: unusual models, types, bounds and labels give the results of ordinary ones, or one clear error."

import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from under_attack import (
    IN_A_BALL,
    MINIMUM_NORM,
    NEED_GRADIENT,
    NET,
    Counting,
    Noisy,
    each,
    every_attack,
    images,
    in_norm,
    make_net,
    same,
    small,
)

from genrobust.attacks import (
    alma,
    carlini_wagner,
    ddn,
    deepfool,
    fab,
    fgsm,
    fmn,
    hop_skip_jump,
    jacobian,
    one_vs_all,
    pgd,
    random_noise,
    rescore,
    spsa,
    square,
    superdeepfool,
    truncated_deepfool,
    zoo,
)
from genrobust.models import accuracy, predict

# --- gradients that are not numbers


class SafeSqrt(torch.autograd.Function):
    "A square root whose gradient is 0 where the plain one's is infinite"

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, g / (2 * x.clamp_min(1e-30).sqrt()), 0)


@each(NEED_GRADIENT)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('p', [2, torch.inf])
def test_undefined_gradients_count_as_zero(attack, dtype, p):
    net, x = make_net().to(dtype), images().to(dtype)
    x[:3, :, ::2] = 0
    own = in_norm(attack, p)
    with pytest.warns(RuntimeWarning, match=r'in \d+ pixels of [3-6] images') as caught:
        result = attack(lambda x: net(x.sqrt()), x, **own)
    assert len([w for w in caught if 'gradients' in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        expected = attack(lambda x: net(SafeSqrt.apply(x)), x, **own)
    same(result, expected)
    assert result.success[:3].any()


# --- models that change what they are given


@every_attack
def test_a_model_may_change_its_input(attack):
    x = images()
    before = x.clone()
    normalised = nn.Sequential(nn.Flatten(), *NET[1:]).eval()

    def in_place(x):
        return normalised(x.sub_(0.5).div_(0.25))

    def out_of_place(x):
        return normalised((x - 0.5) / 0.25)

    result, expected = (small(attack, model, x) for model in (in_place, out_of_place))
    same(result, expected)
    assert torch.equal(x, before) and torch.equal(result.x, before)


def test_scores_leave_the_images_alone():
    class InPlace(nn.Module):
        def forward(self, x):
            return NET(x.mul_(0))

    model, x = InPlace().eval(), images()
    result = random_noise(NET, x)
    found = result.x_adv.clone()
    rescore(result, model, draws=2)
    predict(model, result.x_adv)
    accuracy(model, result.x_adv, result.y)
    jacobian(model, result.x_adv)
    assert torch.equal(result.x_adv, found)


# --- switches of precision


@every_attack
def test_a_model_may_read_and_set_the_switches_of_cudnn(attack):
    class Switching(nn.Module):
        def forward(self, x):
            assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
            with torch.backends.cudnn.flags(enabled=False):
                return NET(x)

    same(small(attack, Switching().eval(), images()), small(attack, NET, images()))
    assert torch.backends.cudnn.allow_tf32  # PyTorch's default, which is set again


# --- other forms of the same network


def exported(net):
    batch = torch.export.Dim('batch')
    return torch.export.export(net, (images(),), dynamic_shapes=({0: batch},)).module()


FORMS = dict(
    compiled=lambda: torch.compile(NET, dynamic=True, backend='aot_eager'),
    compiled_in_a_function=lambda: (
        lambda x, net=torch.compile(NET, dynamic=True, backend='aot_eager'): net(x)
    ),
    reentrant=lambda: lambda x: checkpoint(NET, x, use_reentrant=True),
    checkpointed=lambda: lambda x: checkpoint(NET, x, use_reentrant=False),
    scripted=lambda: torch.jit.script(NET),
    frozen=lambda: torch.jit.freeze(torch.jit.script(NET)),
    traced_and_frozen=lambda: torch.jit.freeze(torch.jit.trace(NET, images())),
    exported=lambda: exported(NET),
    exported_inside=lambda: nn.Sequential(exported(NET)),
)


@pytest.fixture(scope='module', params=FORMS)
def form(request):
    model = FORMS[request.param]()
    if request.param == 'exported_inside':
        model.training = False  # `eval` would ask the exported part, which refuses
    return model


@every_attack
@pytest.mark.filterwarnings('ignore')
def test_the_form_of_a_network_does_not_matter(attack, form):
    x = images()
    result, expected = (small(attack, model, x) for model in (form, NET))
    assert torch.allclose(result.x_adv, expected.x_adv, atol=1e-4)
    assert torch.equal(result.success, expected.success)
    assert all(weight.grad is None for weight in NET.parameters())


def test_several_gradients_of_a_compiled_model_are_counted():
    model = Counting(torch.compile(NET, dynamic=True, backend='aot_eager'))
    result = deepfool(model, images())
    assert result.success.all() and result.forwards.sum() == model.forwards


# --- no gradient, no logits


class Inference(nn.Module):
    "A network whose weights were made in inference mode"

    def __init__(self):
        super().__init__()
        with torch.inference_mode():
            self.net = make_net()

    def forward(self, x):
        return self.net(x)


CUT_OFF = dict(
    detached=lambda x: NET(x.detach()),
    byte=lambda x: NET((255 * x).byte().to(x) / 255),
    long=lambda x: NET((9 * x).long().to(x)),
    no_grad=torch.no_grad()(lambda x: NET(x)),
    inference=torch.inference_mode()(lambda x: NET(x)),
    numpy=lambda x: torch.from_numpy(NET(x).detach().numpy()),
    inference_weights=Inference().eval(),
    frozen=lambda x, net=make_net().requires_grad_(False): net(x.detach()),
)


@pytest.mark.parametrize('name', CUT_OFF)
@each(NEED_GRADIENT)
def test_logits_cut_off_from_the_input_are_said_to_have_no_gradient(attack, name):
    with pytest.raises(ValueError, match='no gradient with respect to its input'):
        small(attack, CUT_OFF[name], images())


@every_attack
def test_one_error_for_what_is_no_logits(attack):
    for model, found in [
        (lambda x: dict(logits=NET(x)), 'a dict'),
        (lambda x: (NET(x), x), 'a tuple'),
        (lambda x: [NET(x)], 'a list'),
        (lambda x: None, 'a NoneType'),
        (lambda x: NET(x).detach().numpy(), 'a ndarray'),
        (lambda x: NET(x)[0], r'torch.float32 \[4\]'),
        (lambda x: NET(x).argmax(1), r'torch.int64 \[6\]'),
        (lambda x: NET(x)[:, :0], r'\[6, 0\]'),
        (lambda x: NET(x)[:3], r'\[3, 4\]'),
    ]:
        with pytest.raises(
            ValueError, match=f'must return float logits .* it returned (torch.float32 )?{found}'
        ):
            small(attack, model, images())


@every_attack
def test_a_batch_of_one_may_come_at_any_time(attack):
    "A model that drops axes of length 1 fails on the last image that is left, whenever that is; with one clear error"
    for model in (
        lambda x: NET(x).squeeze(),
        lambda x: NET(x.squeeze()[:, None]),
        lambda x: NET(x).squeeze().log_softmax(1),
    ):
        with pytest.raises(ValueError, match='logits|cannot take images'):
            small(attack, model, images(1))
        try:
            small(attack, model, images(7))
        except ValueError as e:
            assert re.search('logits|cannot take images', str(e))


# --- types


@every_attack
def test_images_and_labels_of_other_types(attack):
    class Picture(torch.Tensor):
        pass

    x = images()
    y = NET(x).argmax(1)
    expected = small(attack, NET, x, y)
    same(small(attack, NET, x.as_subclass(Picture), y.as_subclass(Picture)), expected)
    same(small(attack, NET, nn.Parameter(x), y.int()), expected)
    index = [7, 3, 5, 1, 0, 2]
    for labels in (
        pd.Series(y.numpy(), index=index),
        pd.Series(y.numpy(), index=list('abcdef'), dtype='Int64'),
        pd.Series(y.numpy(), dtype='category'),
        y.tolist(),
        y.numpy(),
        y.numpy().astype(np.uint8),
        list(y),
        tuple(y.tolist()),
    ):
        same(small(attack, NET, x, labels), expected)
    target = (y + 1) % 4
    same(
        small(attack, NET, x, y, target=pd.Series(target.numpy(), index=index)),
        small(attack, NET, x, y, target=target),
    )
    for labels in (
        pd.Series(list('abcdef')),
        pd.Series(y.numpy().astype(float)),
        'cat',
        [[1]] * 6,
        [1] * 5,
        [2**70] * 6,
        object(),
    ):
        with pytest.raises(ValueError, match='y must be integers'):
            small(attack, NET, x, labels)


@every_attack
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_results_of_every_type_make_a_table(attack, dtype):
    net = make_net().to(dtype)
    result = small(
        attack,
        net,
        images().to(dtype),
        **(dict(h=0.2) if attack in (zoo, spsa) and dtype != torch.float64 else {}),
    )
    assert result.x_adv.dtype == dtype and result.x_adv.isfinite().all()
    frame = result.to_frame()
    assert len(frame) == 6 and frame.l2.dtype.kind == 'f' and np.isfinite(frame.l2).all()
    assert np.isfinite(result.summary()['forwards']) and 'AttackResult' in repr(result)


@each(IN_A_BALL)
@pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize('eps', [0.1, 1 / 3, 8 / 255, 0.3])
def test_no_pixel_moves_by_more_than_eps(attack, dtype, eps):
    net, x = make_net().to(dtype), images(20).to(dtype)
    result = small(
        attack, net, x, eps=eps, **(dict(h=0.2, lr=eps, samples=64) if attack is spsa else {})
    )
    assert (result.linf <= eps).all() and result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    assert result.linf.max() > 0.9 * eps


# --- distances in coarse numbers


def answer_changes_at(model, result, n=401):
    "The share of each perturbation at which the model's answer first changes"
    t = torch.linspace(0, 1, n)[:, None, None, None].to(result.x)
    found = zip(
        result.x[result.success], result.perturbation[result.success], result.y[result.success]
    )
    return torch.tensor([t[model(x + t * d).argmax(1) != y].min().item() for x, d, y in found])


COARSE = dict(
    bfloat16=lambda net: lambda x, net=net.bfloat16(): net(x.bfloat16()),
    float16=lambda net: lambda x, net=net.half(): net(x.half()),
    autocast=lambda net: torch.autocast('cpu', torch.bfloat16)(lambda x: net(x)),
    constant=lambda net: lambda x: net(x) + 1e6,
    minus=lambda net: lambda x: net(x) - 3e5,
)


@pytest.mark.parametrize('name', COARSE)
@each(MINIMUM_NORM)
def test_distances_are_those_at_which_the_answer_changes(attack, name):
    model, x = COARSE[name](make_net(30.0)), images(20)
    own = {zoo: dict(max_queries=8000, coordinates=64, h=0.1)}
    result = attack(model, x, **own.get(attack, {}))
    assert result.success.double().mean() > 0.5
    assert torch.equal(result.success, model(result.x_adv).argmax(1) != result.y)
    assert answer_changes_at(model, result).median() > 0.9


def test_a_margin_that_was_asked_for_is_kept_in_coarse_numbers():
    model, x = COARSE['constant'](make_net(30.0)), images(20)
    result = carlini_wagner(model, x, kappa=5)
    logits = model(result.x_adv[result.success])
    others = logits.scatter(1, result.y[result.success][:, None], -torch.inf)
    ahead = others.amax(1) - logits.gather(1, result.y[result.success][:, None]).squeeze(1)
    assert result.success.any() and (ahead >= 5).all()


# --- bounds

# Of MNIST, CIFAR-10 (green), ImageNet (red), CLIP (red), Fashion-MNIST, and none's
PAIRS = [
    (0.1307, 0.3081),
    (0.4822, 0.1994),
    (0.485, 0.229),
    (0.48145466, 0.26862954),
    (0.286, 0.353),
    (0.5, 0.5),
]


@pytest.mark.parametrize('mean, std', PAIRS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_bounds_of_normalised_images_may_be_off_by_rounding(mean, std, dtype):
    x = images(8)
    x[0], x[1] = 0, 1
    x = (x.to(dtype) - mean) / std
    bounds, net = ((0 - mean) / std, (1 - mean) / std), make_net().to(dtype)
    for attack in (fgsm, square, deepfool):
        result = small(attack, net, x, bounds=bounds)
        low, high = (torch.tensor(bound).to(dtype) for bound in bounds)
        assert result.x.min() >= low
        assert result.x_adv.max() <= high
        assert torch.allclose(result.x, x, rtol=1e-2)


def test_bounds_that_are_wrong_are_told_with_both_numbers():
    with pytest.raises(ValueError, match=r'within bounds \[0, 1\], found \[0, 1.00001'):
        fgsm(NET, torch.tensor([0.0, 1.00001]).repeat(32).view(1, 1, 8, 8))
    with pytest.raises(ValueError, match='start must lie within bounds'):
        hop_skip_jump(NET, images(), start=images() + 1)


# --- many classes


@each([deepfool, truncated_deepfool])
def test_deepfool_of_many_classes_costs_what_its_candidates_cost(attack):
    net, x = make_net(classes=200), images()
    result = attack(net, x)
    assert result.success.all() and (result.backwards % 9 == 0).all()
    assert (attack(net, x, candidates=None).backwards % 199 == 0).all()
    assert (attack(net, x, candidates=3).backwards % 2 == 0).all()
    ten = make_net(classes=10)
    same(attack(ten, x), attack(ten, x, candidates=None))


@each([deepfool, truncated_deepfool])
def test_deepfool_may_leave_far_boundaries_after_its_first_step(attack):
    net, x = make_net(classes=10), images()
    every, near = attack(net, x), attack(net, x, nearest=3)
    assert near.success.all() and ((near.backwards - 9) % 3 == 0).all()
    assert (near.backwards < every.backwards).all()
    same(attack(net, x, nearest=9), every)
    target = (every.y + 1) % 10
    same(attack(net, x, target=target, nearest=3), attack(net, x, target=target))
    with pytest.raises(ValueError, match='nearest'):
        attack(NET, x, nearest=0)


def test_deepfool_takes_images_in_parts_where_gradients_are_many(monkeypatch):
    net, x = make_net(classes=200), images()
    expected = deepfool(net, x)
    monkeypatch.setattr('genrobust.attacks.boundary.LARGEST_JACOBIAN', 9 * 64 * 2)
    seen = []
    result = deepfool(lambda x: seen.append(len(x)) or net(x), x)
    assert torch.allclose(result.x_adv, expected.x_adv, atol=1e-6) and seen[1:4] == [2, 2, 2]


# --- zoo


@pytest.mark.parametrize('bound', [1, 10, 1000, 1e5])
def test_zoo_in_wide_bounds(bound):
    "A linear model, of which the distance is known, and data much smaller than the bounds"
    torch.manual_seed(0)
    linear, x = nn.Linear(20, 2).eval(), torch.rand(20, 20) - 0.5
    w, logits = linear.weight[1] - linear.weight[0], linear(x)
    exact = (logits[:, 1] - logits[:, 0]).abs() / w.norm()
    result = zoo(linear, x, bounds=(-bound, bound), h=0.2)
    assert result.success.all() and (result.l2 / exact.detach()).median() < 1.05


# --- random models and training mode


@every_attack
def test_seed_decides_the_noise_of_any_model(attack):
    x = images(20)
    torch.manual_seed(3)
    first = small(attack, Noisy(0.2), x, seed=1)
    state = torch.random.get_rng_state()
    torch.manual_seed(4)
    same(small(attack, Noisy(0.2), x, seed=1), first)
    net = make_net()
    dropout = nn.Sequential(net[0], nn.Dropout(0.5), *net[1:])
    dropout.train()
    same(*(small(attack, dropout, x, seed=2, allow_training=True) for _ in range(2)))
    torch.manual_seed(3)
    assert torch.equal(
        torch.random.get_rng_state(), state
    )  # the caller's random numbers are where they were
    other = small(attack, Noisy(0.2), x, seed=2)
    assert not torch.equal(other.x_adv, first.x_adv)


@every_attack
def test_no_perturbation_is_no_success(attack):
    x = images(60)
    result = small(attack, Noisy(1.0), x, NET(x).argmax(1), batch_size=20)
    assert (result.l2[result.success] > 0).all()
    if attack in IN_A_BALL:
        still = small(attack, Noisy(1.0), x, eps=0.0)
        assert not still.success.any() and torch.equal(still.y, still.y_adv)


@every_attack
def test_training_mode_keeps_the_statistics_of_batch_norm(attack):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        norm,
        nn.ReLU(),
        nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(144, 4)),
    ).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small(attack, model, images(8), allow_training=True)
    assert norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_vs_all_works_on_models_of_all_kinds():
    x = images()
    expected = one_vs_all(deepfool, NET, x)
    assert torch.allclose(
        one_vs_all(deepfool, torch.jit.freeze(torch.jit.script(NET)), x).x_adv,
        expected.x_adv,
        atol=1e-5,
    )
    same(*(one_vs_all(deepfool, Noisy(0.05), x, seed=1) for _ in range(2)))


# --- answers that are no numbers, and what rounding, masks and types made of others


def scattered_nan(x):
    "NaN at one point in a hundred"
    weights = torch.linspace(1, 2, 64, dtype=torch.double)
    is_nan = (x.double().flatten(1) @ weights * 1e5) % 1 < 0.01
    return torch.where(is_nan[:, None], torch.nan, NET(x))


@pytest.mark.parametrize(
    'attack, own',
    [
        (spsa, dict(eps=0.4, steps=60)),
        (zoo, dict(max_queries=6000, coordinates=64)),
        (alma, {}),
    ],
)
def test_one_answer_that_is_nan_spoils_no_attack(attack, own):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # gradients that are NaN
        found = attack(scattered_nan, images(), **own)
    expected = attack(NET, images(), **own)
    assert found.success.sum() >= expected.success.sum() - 1 > 3
    assert found.l2[found.success].mean() < 1.2 * expected.l2[expected.success].mean()


def test_a_nearer_point_whose_logits_are_not_finite_hides_no_success():
    def logits_of(x):
        total = x.flatten(1).sum(1)
        third = torch.where((total > 1) & (total < 1.3), -torch.inf, -9.0)
        return torch.stack([1 - total, total - 1, third], 1)

    x = images() * 0.01
    for attack in (deepfool, ddn, fmn, alma, carlini_wagner):
        assert attack(logits_of, x).success.all()


def test_bounds_of_float64_are_not_rounded_to_float32():
    high = torch.full((1, 8, 8), 2.8, dtype=torch.double)
    for low in (-1.7, -0.3, -0.4242):
        x = images().double()
        x[0] = low
        found = pgd(make_net().double(), x, bounds=(low, high), eps=3.0)
        assert found.x_adv.min() >= low


@pytest.mark.parametrize('p', [2, math.inf])
def test_levels_keep_to_the_ball(p):
    def logits_of(x):  # misclassified from 1.5 levels on
        return torch.stack([1.5 / 255 - (x - 0.2).flatten(1).amax(1), 0 * x.flatten(1)[:, 0]], 1)

    x, eps = torch.full((2, 1, 1, 1), 51 / 255), 0.00784  # 1.9992 levels
    found = pgd(logits_of, x, eps=eps, p=p, quantized=True)
    assert not found.success.any() and (found.linf <= eps).all()
    found = pgd(logits_of, x, eps=2 / 255, p=p, quantized=True)
    assert found.success.all()


def test_superdeepfool_where_the_default_is_float64():
    x = images()
    expected = superdeepfool(NET, x)
    torch.set_default_dtype(torch.float64)
    try:
        found = superdeepfool(NET, x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found.l2, expected.l2)


def test_jacobian_of_images_made_in_inference_mode():
    with torch.inference_mode():
        x = images()
        inside = jacobian(NET, x)
    for found in (inside, jacobian(NET, x)):
        torch.testing.assert_close(found[1], jacobian(NET, images())[1])


def test_a_mask_leaves_starts_uniform_in_the_ball():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 0, 0] = True
    x = torch.full((200, 1, 8, 8), 0.5)
    starts = []

    def logits_of(x):
        starts.append((x - 0.5).flatten(1).norm(dim=1))
        return torch.zeros(len(x), 2) + torch.tensor([1.0, 0.0]) + 0 * x.flatten(1).sum(1)[:, None]

    pgd(logits_of, x, eps=0.3, p=2, steps=1, mask=mask)
    first = next(size for size in starts if size.max() > 0)
    assert 0.12 < first.mean() < 0.18


def test_restarts_of_fab_begin_half_way_under_a_mask():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 0, 0] = True
    asked = []

    def logits_of(x):
        asked.append((x - 0.2).flatten(1).norm(dim=1).max().item())
        at = x[:, 0, 0, 0]
        return torch.stack([0.6 - at, at - 0.6], 1)

    x = torch.full((1, 1, 8, 8), 0.2)
    half = fab(logits_of, x, steps=5, mask=mask).l2.item() / 2
    asked.clear()
    fab(logits_of, x, steps=5, restarts=2, mask=mask)
    assert any(abs(size - half) < 0.05 * half for size in asked)


def test_accuracy_counts_no_nan_and_takes_logits_alone():
    x = images()
    y = NET(x).argmax(1)
    assert accuracy(NET, x, y) == 1
    assert accuracy(lambda x: NET(x) * torch.tensor([1, 1, 1, torch.nan]), x, y) == 0
    for answer in (lambda x: NET(x)[:, :, None, None], lambda x: (NET(x), x)):
        with pytest.raises(ValueError, match=r'logits \[B,C\]'):
            accuracy(answer, x, y)
