"Properties that every attack has, whatever its idea; and faults known from other libraries."

import inspect
import json
import math

import pytest
import safetensors.torch
import torch
from torch import nn
from under_attack import (
    ATTACKS,
    MINIMUM_NORM,
    QUERIES,
    AtMost,
    Counting,
    attack_small,
    each,
    elsewhere,
    every_attack,
    small,
)

from genrobust import attacks
from genrobust.attacks import (
    AttackResult,
    apgd,
    carlini_wagner,
    deepfool,
    fgsm,
    hop_skip_jump,
    jacobian,
    margin,
    mim,
    one_vs_all,
    pgd,
    random_noise,
    rescore,
    square,
    truncated_deepfool,
    zoo,
)
from genrobust.attacks.result import norm
from genrobust.files import save_tensors
from genrobust.models import CNN, BayesClassifier, load_pretrained


def test_the_list_is_complete():
    public = {
        f
        for f in vars(attacks).values()
        if inspect.isfunction(f)
        and list(inspect.signature(f).parameters)[:3] == ['model', 'x', 'y']
    }
    assert public == set(ATTACKS)


@every_attack
def test_any_shape_and_bounds(attack):
    model, x = elsewhere()
    result = attack_small(attack, model, x, bounds=(-1, 1))
    assert result.x_adv.shape == x.shape and result.x_adv.min() >= -1 and result.x_adv.max() <= 1
    assert torch.equal(result.success, model(result.x_adv).argmax(1) != result.y)
    if attack in MINIMUM_NORM:
        assert result.success.all()


@every_attack
def test_success_is_that_the_target_is_reached(attack):
    model, x = elsewhere()
    target = (model(x).argmax(1) + 2) % 5
    result = attack_small(attack, model, x, target=target, bounds=(-1, 1))
    assert torch.equal(result.success, model(result.x_adv).argmax(1) == target)
    assert torch.equal(result.target, target)
    with pytest.raises(ValueError, match='must differ'):
        attack_small(attack, model, x, target=(target - 2) % 5, bounds=(-1, 1))


@every_attack
@pytest.mark.parametrize(
    'make',
    [lambda: CNN().eval(), lambda: BayesClassifier('GFZ', n_samples=2).eval()],
    ids=['cnn', 'gfz'],
)
def test_an_image_fares_the_same_in_any_batch(attack, make):
    # in float64, so that only the batch could make a difference
    x, parts = torch.rand(3, 1, 28, 28).double(), (None, 2)
    together, apart = (small(attack, make().double(), x, batch_size=size) for size in parts)
    assert torch.allclose(together.x_adv, apart.x_adv, atol=1e-9)
    assert torch.equal(together.success, apart.success)
    # the last bit may decide whether a step ends before or behind a boundary
    assert (together.forwards - apart.forwards).abs().max() <= 1


@every_attack
@pytest.mark.parametrize('outside', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('stochastic', [False, True], ids=['plain', 'gfz'])
def test_leaves_everything_as_it_was(attack, outside, stochastic):
    (model, x), bounds = elsewhere(), (-1, 1)
    if stochastic:
        model = BayesClassifier('GFZ', hidden=50, n_samples=2).eval()
        x, bounds = torch.rand(2, 1, 28, 28), (0, 1)
    before = x.clone()
    weights = [p.clone() for p in model.parameters()]
    randomness = torch.random.get_rng_state()
    expected = small(attack, model, x, bounds=bounds).x_adv
    with outside():
        result = small(attack, model, x, bounds=bounds)
    assert torch.equal(result.x_adv, expected)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(model.parameters(), weights))
    assert torch.equal(torch.random.get_rng_state(), randomness)


@every_attack
def test_passes_are_counted_as_spent(attack):
    class Fixed(Counting):
        def fixed(self, seed):
            return self

    for kind in (Counting, Fixed):
        model, x = elsewhere()
        model = kind(model)
        result = attack_small(attack, model, x, bounds=(-1, 1))
        assert result.forwards.sum() == model.forwards
        assert result.backwards.sum() == model.backwards


def test_deepfool_asks_again_where_the_answer_may_change():
    "A lucky draw of dropout is no success of a model in training mode, though it has `fixed`"
    model, x = CNN(dropout=0.9), torch.rand(64, 1, 28, 28)
    settled = deepfool(model.eval(), x, steps=5)
    assert settled.success.any()
    assert torch.equal(
        settled.forwards[settled.success], 1 + settled.backwards[settled.success] // 9
    )
    asked = deepfool(model.train(), x, steps=5, allow_training=True)
    assert not asked.success.all()


@every_attack
def test_models_take_no_more_images_at_once_than_they_say(attack):
    model, x = elsewhere()
    assert attack_small(attack, AtMost(model, 3), x, bounds=(-1, 1)).x_adv.shape == x.shape


@every_attack
def test_refuses_training_mode_and_nonsense(attack):
    model, x = elsewhere()
    with pytest.raises(ValueError, match='training mode'):
        attack(model.train(), x, bounds=(-1, 1))
    attack_small(attack, model, x, bounds=(-1, 1), allow_training=True)
    model.eval()
    for kw, match in [
        (dict(x=x * 3), 'within bounds'),
        (dict(x=x / 0), 'NaN'),
        (dict(x=x.int()), 'float tensor'),
        (dict(y=torch.full((7,), 5)), 'y must lie'),
        (dict(target=-1), 'target must lie'),
        (dict(y=torch.zeros(3).long()), 'y must be integers'),
        (dict(model=nn.Identity().eval()), 'logits'),
    ]:
        with pytest.raises(ValueError, match=match):
            attack(**{**dict(model=model, x=x, bounds=(-1, 1)), **kw})
    with pytest.raises(TypeError):
        attack(model, x, epsilon=1)


@every_attack
def test_log_densities_near_minus_a_thousand(attack):
    "Masking the right class with 0 instead of minus infinity fails here, and so does a softmax in float32"
    model, x = elsewhere()

    def shifted(x):
        return 50 * model(x) - 1000

    result = attack_small(attack, shifted, x, bounds=(-1, 1))
    plain = attack_small(attack, model, x, bounds=(-1, 1))
    assert torch.equal(result.success, plain.success)
    if attack in MINIMUM_NORM:
        rtol = 0.1 if attack is hop_skip_jump else 0.01  # one label that rounding flips moves it
        assert torch.allclose(result.l2, plain.l2, rtol=rtol)


@each(MINIMUM_NORM)
def test_failure_returns_the_original(attack):
    def deaf(x):
        return torch.stack([x.flatten(1).sum(1) * 0 + 1, x.flatten(1).sum(1) * 0], 1)

    x = torch.rand(4, 1, 8, 8)
    result = attack_small(attack, deaf, x)
    assert not result.success.any()
    assert torch.equal(result.x_adv, x)
    assert math.isnan(result.summary()['l2'])


def test_the_last_update_is_checked():
    "One step crosses a flat boundary; that it did is seen although no step is left to see it with"
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    assert deepfool(linear, torch.rand(9, 1, 8, 8) * 0.2 + 0.4, steps=1).success.all()


def test_deepfool_crosses_from_a_hairs_breadth():
    "A margin of 1e-6 between logits of -300, which a float32 cannot even hold"

    def hair(x):
        return -300 + torch.stack(
            [1e-2 * (x.flatten(1).mean(1) - 0.5) + 1e-6, x.flatten(1).sum(1) * 0], 1
        )

    result = deepfool(hair, torch.full((1, 1, 8, 8), 0.5))
    assert result.success.all() and result.linf < 0.2


def test_overshoot_does_not_scale_with_the_box():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.rand(5, 1, 8, 8) * 0.2 + 0.4
    assert torch.allclose(
        deepfool(linear, x).x_adv, deepfool(linear, x, bounds=(-100, 100)).x_adv, atol=1e-6
    )


def test_images_stop_one_by_one():
    "An image that is done costs nothing more, however long others take"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False)).eval()

    def curved(x):
        return model(x.pow(3))

    x = torch.rand(16, 1, 8, 8) * 0.5 + 0.25
    together = deepfool(curved, x)
    alone = torch.cat([deepfool(curved, image[None]).forwards for image in x])
    assert torch.equal(together.forwards, alone)


def test_a_stochastic_model_is_attacked_on_noise_of_the_attackers_own():
    clf, x = BayesClassifier('DFZ', n_samples=2).eval(), torch.rand(3, 1, 28, 28)
    result = deepfool(clf, x, seed=4)
    assert result.settings['noise_seed'] == 4
    assert torch.equal(result.y_adv, clf.fixed(4)(result.x_adv).argmax(1))
    assert 'noise_seed' not in deepfool(clf.fixed(4), x).settings
    assert 'noise_seed' not in deepfool(CNN().eval(), x).settings


def test_rescoring_never_uses_the_noise_of_the_attack():
    "Whatever the seeds: the first numbers of both streams differ"
    clf, seen = BayesClassifier('GFZ', n_samples=2).eval(), []
    clf._draw = lambda *shape, draw=clf._draw: seen.append(draw(*shape)) or seen[-1]
    result = fgsm(clf, torch.rand(2, 1, 28, 28), seed=0)
    rescore(result, clf, draws=3, seed=0)
    noise = clf.fixed(0).noise.flatten()
    assert len(seen) == 3 and not torch.isin(noise, torch.cat([s.flatten() for s in seen])).any()
    assert len({s.sum().item() for s in seen}) == 3 and not torch.equal(seen[0][0], seen[0][1])


@every_attack
def test_what_is_not_a_number_is_no_success(attack):
    "Gradients that are NaN, and logits that turn NaN away from the image"
    model, x = elsewhere()

    def steep(x):
        return model(x) + (x[:, :1, :1, :1] - x[:, :1, :1, :1]).flatten(1).abs().sqrt()

    def cliff(z):
        is_image = (z[:, None] == x).flatten(2).all(2).any(1, keepdim=True)
        return torch.where(is_image, model(z), torch.nan)

    result = attack_small(attack, steep, x, bounds=(-1, 1))
    assert result.x_adv.isfinite().all()
    assert torch.equal(result.success, model(result.x_adv).argmax(1) != result.y)
    assert not attack_small(attack, cliff, x, bounds=(-1, 1)).success.any()


def test_an_operation_that_cannot_be_vectorised():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2 if g.sum() > -1e9 else g

    model, x = elsewhere()
    odd, twice = (
        jacobian(f, x)[1] for f in (lambda x: model(Odd.apply(x)), lambda x: model(x * 2))
    )
    assert torch.allclose(odd, twice, atol=1e-6)


def test_a_tied_vote_is_no_success():
    class Coin(nn.Module):
        "Answers 0, 1, 0, 1, ..."

        calls = 0

        def forward(self, x):
            Coin.calls += 1
            return torch.eye(3)[(Coin.calls - 1) % 2].expand(len(x), 3)

    x = torch.rand(2, 1, 4, 4)
    common = dict(
        x=x,
        x_adv=x,
        success=torch.tensor([True] * 2),
        initially_wrong=torch.tensor([False] * 2),
        forwards=torch.ones(2),
        backwards=torch.ones(2),
    )
    for y in (0, 1):
        tied = rescore(
            AttackResult(y=torch.full((2,), y), y_adv=torch.full((2,), 1 - y), **common),
            Coin().eval(),
            draws=4,
        )
        assert not tied.majority.any() and tied.worst.all() and (tied.share == 0.5).all()


def test_rescored_targets_and_skips():
    model, x = elsewhere()
    y = model(x).argmax(1)
    given = torch.where(torch.arange(7) < 2, (y + 1) % 5, y)
    result = deepfool(model, x, given, bounds=(-1, 1), target=(given + 2) % 5)
    scored = rescore(result, model, draws=2)
    assert scored.share[:2].isnan().all() and not scored.worst[:2].any()
    assert torch.equal(scored.majority, result.success)


def test_jacobian_works_on_shipped_weights_that_want_no_gradient():
    clf = load_pretrained('gfz', device='cpu').fixed(0)
    with torch.no_grad(), torch.enable_grad():
        logits, J = jacobian(clf, torch.rand(2, 1, 28, 28))
    assert J.shape == (2, 10, 1, 28, 28) and J.abs().sum() > 0
    assert torch.equal(margin(logits, logits.argmax(1)) >= 0, torch.tensor([True, True]))


@pytest.mark.parametrize('p', [2, torch.inf])
@pytest.mark.parametrize('loss', ['ce', 'joint', 'dlr'])
@pytest.mark.parametrize('aimed', [False, True], ids=['untargeted', 'targeted'])
def test_apgd_in_ball_and_box_with_every_loss(p, loss, aimed):
    model, x = elsewhere()
    target = (model(x).argmax(1) + 1) % 5 if aimed else None
    result = apgd(
        model, x, eps=0.4, p=p, loss=loss, steps=9, restarts=2, target=target, bounds=(-1, 1)
    )
    assert (norm(result.perturbation, p) <= 0.4 * (1 + 1e-5)).all()
    assert result.x_adv.abs().max() <= 1
    assert torch.equal(result.success, result.is_success(model(result.x_adv).argmax(1)))


def test_apgd_spends_one_gradient_a_step_and_restarts_only_where_it_has_not_succeeded():
    model, x = elsewhere()
    result = apgd(model, x, eps=0.03, steps=7, restarts=3, bounds=(-1, 1))
    once = apgd(model, x, eps=0.03, steps=7, bounds=(-1, 1)).success
    assert once.any() and not once.all()
    assert (result.backwards[once] == 7).all() and (
        result.forwards[once] == 7 + 3
    ).all()  # the last point, and those before and after the attack
    never = ~result.success
    assert (result.backwards[never] == 21).all() and (result.forwards[never] == 21 + 5).all()


def test_apgd_closes_in_on_a_narrow_peak():
    "The margin is lowest at one point of the ball; steps of a fixed size jump over it"

    def valley(x):
        return torch.stack([1 + (x.flatten(1) - 0.537).abs().sum(1), x.flatten(1).sum(1) * 0], 1)

    x = torch.full((1, 1, 4, 4), 0.5)
    off = [
        (attack(valley, x, eps=0.1, steps=60, **kw).x_adv - 0.537).abs().max()
        for attack, kw in ((apgd, {}), (pgd, dict(step_size=0.2)))
    ]
    assert off[0] < 0.002 < 0.02 < off[1]


def test_dlr_needs_classes_enough():
    x = torch.rand(3, 8)
    for loss_of, n in ((dict(loss='dlr'), 2), (dict(loss='dlr', target=2), 3)):
        few, enough = (nn.Linear(8, classes).eval() for classes in (n, n + 1))
        y = dict(y=torch.zeros(3).long())
        for model in (few, enough):
            model.bias.data[0] = 5.0  # every image is of class 0
        for attack in (fgsm, apgd):
            with pytest.raises(ValueError, match=f"'dlr' needs at least {n + 1} classes.*has {n}"):
                attack(few, x, **y, **loss_of)
            attack(enough, x, **y, **loss_of)


def test_one_against_all_is_the_smallest_of_the_targeted():
    model, x = elsewhere()
    result = one_vs_all(deepfool, model, x, bounds=(-1, 1), seed=3, p=1.5)
    y = model(x).argmax(1)
    norms = torch.full((7, 5), torch.inf)
    images = torch.zeros(7, 5, 3, 20, 30)
    for c in range(5):
        i = (y != c).nonzero().squeeze(1)
        one = deepfool(model, x[i], y[i], target=c, bounds=(-1, 1), p=1.5)
        norms[i, c] = norm(one.perturbation, 1.5).where(one.success, torch.inf)
        images[i, c] = one.x_adv
    assert torch.equal(result.y_adv, norms.argmin(1))
    assert torch.allclose(result.x_adv, images[range(7), norms.argmin(1)], atol=1e-6)
    assert result.success.all() and result.target is None and torch.equal(result.y, y)
    assert result.settings == dict(
        deepfool(model, x, bounds=(-1, 1), seed=3, p=1.5).settings, attack='one_vs_all(deepfool)'
    )


def test_one_against_all_counts_what_it_spends_and_is_the_same_in_any_batch():
    plain, x = (v.double() for v in elsewhere())
    model, top = Counting(plain), plain(x).argmax(1)
    y = torch.where(torch.arange(7) < 2, (top + 1) % 5, top)
    together = one_vs_all(apgd, model, x, y, bounds=(-1, 1), steps=4)
    assert together.forwards.sum() == model.forwards and (together.backwards[2:] == 4 * 4).all()
    assert together.initially_wrong.tolist() == [True] * 2 + [False] * 5
    assert torch.equal(together.x_adv[:2], x[:2])
    assert not together.backwards[:2].any()
    apart = one_vs_all(apgd, model, x, y, bounds=(-1, 1), steps=4, batch_size=2)
    assert torch.allclose(together.x_adv, apart.x_adv, atol=1e-9)
    assert torch.equal(together.forwards, apart.forwards)


def test_one_against_all_on_noise_of_the_attackers_own():
    clf, x = BayesClassifier('GFZ', hidden=50, n_samples=2).eval(), torch.rand(2, 1, 28, 28)
    result, still = one_vs_all(pgd, clf, x, seed=4, steps=2), clf.fixed(4)
    assert result.success.any()
    assert result.settings['noise_seed'] == 4
    assert torch.equal(result.y, still(x).argmax(1))
    assert torch.equal(result.success, still(result.x_adv).argmax(1) != result.y)
    assert torch.equal(result.y_adv, still(result.x_adv).argmax(1))
    assert torch.allclose(result.x_adv, one_vs_all(pgd, still, x, seed=4, steps=2).x_adv)


def test_one_against_all_fails_like_any_minimum_norm_attack_and_refuses_nonsense():
    model, x = elsewhere()
    none = one_vs_all(pgd, model, x, bounds=(-1, 1), eps=1e-4, steps=2)
    assert not none.success.any() and torch.equal(none.x_adv, x) and torch.equal(none.y_adv, none.y)
    wrong = one_vs_all(pgd, model, x, (none.y + 1) % 5, bounds=(-1, 1), eps=1e-4, steps=2)
    assert wrong.initially_wrong.all()
    assert torch.equal(wrong.x_adv, x)
    assert wrong.settings == none.settings
    for kw, match in [
        (dict(target=1), 'leave target out'),
        (dict(steps=0), 'steps'),
        (dict(bounds=(0, 1)), 'within bounds'),
        (dict(attack='pgd'), 'attack must be'),
        (dict(y=[9] * 7), 'y must lie'),
    ]:
        with pytest.raises(ValueError, match=match):
            one_vs_all(**{**dict(attack=pgd, model=model, x=x, bounds=(-1, 1)), **kw})
    with pytest.raises(TypeError):
        one_vs_all(pgd, model, x, bounds=(-1, 1), epsilon=1)


@each(QUERIES)
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_a_service_without_gradients_is_attacked_the_same(attack, mode):
    model, x = elsewhere()

    @mode()
    def service(x):
        return model(x)

    expected = attack_small(attack, model, x, bounds=(-1, 1))
    for p in model.parameters():
        p.requires_grad_(False)
    result = attack_small(attack, service, x, bounds=(-1, 1))
    assert torch.equal(result.x_adv, expected.x_adv)
    assert torch.equal(result.forwards, expected.forwards)
    assert not result.backwards.any()
    assert expected.success.any() or attack is square


@every_attack
def test_memory_layout_of_the_images_makes_no_difference(attack):
    model, x = elsewhere()
    expected = attack_small(attack, model, x, bounds=(-1, 1))
    for same in (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    ):
        assert torch.equal(same, x) and not same.is_contiguous()
        assert torch.equal(attack_small(attack, model, same, bounds=(-1, 1)).x_adv, expected.x_adv)


@every_attack
def test_logits_of_another_precision(attack):
    model, x = elsewhere()

    def precise(x):
        return model(x).double().log_softmax(1)

    result = attack_small(attack, precise, x, bounds=(-1, 1))
    assert result.x_adv.dtype == torch.float
    assert torch.equal(result.success, model(result.x_adv).argmax(1) != result.y)
    if attack in MINIMUM_NORM:
        assert result.success.all()


@each([carlini_wagner, zoo])
def test_all_logits_tied_is_no_dead_end(attack):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False)).eval()
    assert attack(model, torch.zeros(3, 1, 4, 4)).success.all()


def test_zoo_asks_again_and_wants_a_margin_where_answers_are_noisy():
    "On a noisy linear model one lucky answer is no success; with answers averaged and a margin asked for, it is one"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    x = torch.rand(20, 1, 8, 8) * 0.2 + 0.4
    y = model(x).argmax(1)

    def noisy(x):
        return model(x) + 0.05 * torch.randn(len(x), 2)

    def across(**kw):
        "Share of the attacked images counted as successes, and share of these that are"
        result = zoo(noisy, x, y, h=0.1, coordinates=16, **kw)
        assert result.forwards.max() <= 20_002
        return result.summary()['success_rate'], (model(result.x_adv).argmax(1) != y)[
            result.success
        ].double().mean()

    rate, real = across(repeats=10, kappa=0.1)
    assert rate >= 0.7 and real >= 0.95 and across()[1] < 0.9


@pytest.mark.parametrize(
    'attack, own',
    [(pgd, dict(random_start=False, step_size=0.03, steps=20)), (mim, dict(steps=20))],
    ids=['pgd', 'mim'],
)
def test_a_point_of_infinite_logits_hides_no_success(attack, own):
    "Far beyond the boundary log(sigmoid) is -inf; what was misclassified on the way there stays a success"

    def underflowing(x):
        u = 600 * (x.mean(1) - 0.5)
        return torch.stack([torch.sigmoid(u).log(), torch.sigmoid(-u).log()], 1)

    assert attack(underflowing, torch.full((2, 4), 0.45), eps=0.5, **own).success.all()


@pytest.mark.parametrize('p', [12, 20, 50])
def test_norms_with_high_powers(p):
    "784 numbers of a thousandth, to the power p, are 0 in float32"
    torch.manual_seed(0)
    model, x = nn.Linear(784, 5).eval(), torch.rand(8, 784) * 0.2 + 0.4
    assert torch.allclose(
        one_vs_all(deepfool, model, x, p=p).linf, deepfool(model, x, p=p).linf, rtol=0.01
    )
    assert (truncated_deepfool(model, x, p=p).forwards >= 10).all()
    assert torch.allclose(norm(x / 1e3, p).double(), (x / 1e3).double().norm(p, dim=1), rtol=1e-5)


@pytest.mark.parametrize('loss', ['ce', 'joint'])
def test_a_step_is_no_longer_than_eps_where_gradients_are_tiny(loss):
    torch.manual_seed(0)
    linear = nn.Linear(20, 3, bias=False)

    def probabilities(x):
        return linear(160 * x).softmax(1)

    result = fgsm(probabilities, torch.rand(200, 20), eps=0.1, p=2, loss=loss)
    assert result.l2.max() <= 0.1 * (1 + 1e-5)


def test_rescoring_refuses_what_is_not_a_number():
    model, x = elsewhere()

    class Failing(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return model(x) * (1 if self.calls < 3 else math.nan)

    with pytest.raises(ValueError, match='NaN'):
        rescore(random_noise(model, x, eps=0.01, bounds=(-1, 1)), Failing().eval(), draws=5)


def test_a_black_image_leaves_the_mean_rho_alone():
    torch.manual_seed(0)
    result = deepfool(
        nn.Linear(784, 5).eval(), torch.stack([torch.zeros(784), torch.full((784,), 0.5)])
    )
    assert result.success.all()
    assert result.rho.isnan().tolist() == [True, False]
    assert result.summary()['rho'] == result.rho[1]


@pytest.mark.parametrize(
    'error',
    [torch.cuda.OutOfMemoryError('no'), RuntimeError('MPS backend out of memory')],
    ids=repr,
)
def test_too_little_memory_is_no_bad_input(error):
    "Who catches it, to try again with fewer images, should"

    def large(x):
        raise error

    with pytest.raises(type(error)) as caught:
        pgd(large, torch.rand(4, 30))
    assert caught.value is error


def test_a_function_may_be_random_too():
    linear = nn.Linear(20, 3).eval()

    class Function:
        def __call__(self, x):
            return linear(x)

        def fixed(self, seed):
            return self

    assert deepfool(Function(), torch.rand(4, 20)).success.all()


def test_convolutions_are_not_rounded_to_tf32_under_attack():
    model, x = elsewhere()
    cudnn, seen = torch.backends.cudnn, []

    def rounded():
        return cudnn.conv.fp32_precision == 'tf32' if hasattr(cudnn, 'conv') else cudnn.allow_tf32

    class Watching(nn.Module):
        def forward(self, x):
            seen.append(rounded())
            return model(x)

    assert rounded()  # PyTorch's default
    rescore(fgsm(Watching().eval(), x, bounds=(-1, 1)), Watching().eval(), draws=1)
    with pytest.raises(ValueError):
        fgsm(Watching().eval(), x[:, :1], bounds=(-1, 1))
    assert len(seen) == 4 and not any(seen) and rounded()


def test_results_say_what_noise_they_ran_on():
    clf = BayesClassifier('DBX', hidden=8, latent=2, n_samples=2).eval()
    x = torch.rand(2, 1, 28, 28)
    noise = [
        random_noise(model, x, seed=4).settings.get('noise')
        for model in (clf, clf.fixed(3, 5), clf.averaged(5, 1), clf.fresh(), CNN().eval())
    ]
    assert noise == [
        dict(seed=4, n_samples=2, draws=1),
        dict(seed=3, n_samples=5, draws=1),
        dict(seed=1, n_samples=2, draws=5),
        'fresh',
        None,
    ]


def test_results_written_before_there_was_a_digest_still_load(tmp_path):
    model, x = elsewhere()
    result = fgsm(model, x, bounds=(-1, 1), target=(model(x).argmax(1) + 1) % 5)
    safetensors.torch.save_file(
        result.tensors(), tmp_path / 'old.safetensors', dict(settings=json.dumps(result.settings))
    )
    again = AttackResult.load(tmp_path / 'old.safetensors')
    assert again.settings == result.settings
    assert all(torch.equal(v, again.tensors()[k]) for k, v in result.tensors().items())
    for settings in ('[1, 2]', '{', '[' * 10_000 + ']' * 10_000, '"eps"', 'null'):
        safetensors.torch.save_file(
            result.tensors(), tmp_path / 'odd.safetensors', dict(settings=settings)
        )
        with pytest.raises(ValueError, match='odd.safetensors is not an attack result'):
            AttackResult.load(tmp_path / 'odd.safetensors')
    for name in ('x', 'success', 'forwards'):
        fewer = dict(result.tensors(), **{name: getattr(result, name)[:3]})
        save_tensors(tmp_path / 'odd.safetensors', fewer, settings=result.settings)
        with pytest.raises(ValueError, match='do not fit together'):
            AttackResult.load(tmp_path / 'odd.safetensors')
        save_tensors(
            tmp_path / 'odd.safetensors',
            {k: v for k, v in result.tensors().items() if k != name},
            settings=result.settings,
        )
        with pytest.raises(ValueError, match='is not an attack result'):
            AttackResult.load(tmp_path / 'odd.safetensors')


def test_a_changed_bit_of_a_result_is_noticed_and_equal_results_have_equal_files(tmp_path):
    model, x = elsewhere()
    path = tmp_path / 'a.safetensors'
    fgsm(model, x, bounds=(-1, 1)).save(path)
    content = path.read_bytes()
    AttackResult.load(path).save(tmp_path / 'b.safetensors')
    assert (tmp_path / 'b.safetensors').read_bytes() == content
    for place in [
        *range(0, 600, 7),
        *torch.randint(len(content), (60,), generator=torch.Generator().manual_seed(0)).tolist(),
        len(content) - 1,
    ]:
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match='a.safetensors is not an attack result'):
            AttackResult.load(path)


@every_attack
def test_a_masked_class_changes_nothing(attack):
    "A logit of -1e9, as of a head that is not used"
    model, x = elsewhere()
    masked = lambda x: torch.cat([model(x), torch.full_like(model(x)[:, :1], -1e9)], 1)  # noqa: E731
    one, other = (attack_small(attack, net, x, bounds=(-1, 1)) for net in (model, masked))
    assert torch.equal(one.success, other.success)
    assert torch.allclose(one.x_adv, other.x_adv, atol=1e-4)


def test_logits_may_be_tiny():
    model, x = elsewhere()
    for scale in (1.0, 1e-12):
        scaled = lambda x, scale=scale: scale * model(x)  # noqa: E731
        for attack in (carlini_wagner, zoo):
            assert attack_small(attack, scaled, x, bounds=(-1, 1)).success.all()


def test_a_success_that_ties_is_kept():
    "Of two classes with one vote each the first is the answer: the margin is 0, on either side"

    def votes(x):
        of = x.flatten(1).sum(1)
        return torch.stack([2.0 * (of > 1), 0 * of + 2, 2.0 * ((of > 0.6) & (of <= 1))], 1)

    x = torch.full((1, 1, 1, 2), 0.2)
    for seed in range(5):
        assert square(votes, x, eps=0.5, max_queries=500, seed=seed).success.all()


def test_an_attack_leaves_precision_as_it_was():
    "oneDNN has switches of its own, and an old one of PyTorch writes some of them"
    owner = torch.backends.mkldnn
    parts = [getattr(owner, name, None) for name in ('conv', 'matmul')]
    if not all(hasattr(part, 'fp32_precision') for part in parts):
        pytest.skip('this PyTorch has no such switches')
    (model, x), seen = elsewhere(), []
    before = [part.fp32_precision for part in parts]

    def watched(x):
        seen.append([part.fp32_precision for part in parts])
        return model(x)

    try:
        for part in parts:
            part.fp32_precision = 'bf16'
        fgsm(watched, x, bounds=(-1, 1))
        assert seen and all(found == ['ieee', 'ieee'] for found in seen)
        assert [part.fp32_precision for part in parts] == ['bf16', 'bf16']
    finally:
        for part, value in zip(parts, before):
            part.fp32_precision = value
