"Each check of a study passes on an honest model and fails on one that is built to fail it."

import json
import math

import pandas as pd
import pytest
import torch
from torch import nn
from under_attack import NEVER, Prototypes

from genrobust import evidence
from genrobust.attacks import apgd, norm, pgd
from genrobust.data import Splits
from genrobust.deceivers import Detached, FlatTanh, Linear, Rounded, Vote, Wrapper, train_briefly
from genrobust.detection import LogitDetector
from genrobust.evidence import (
    BUDGETS,
    CHECKS,
    Trial,
    match_latents,
    match_logits,
    measure_checks,
    measure_transfer,
    nearest_of_others,
    noise_in_ball,
    transfer_matrix,
)
from genrobust.models import CNN, BayesClassifier, load_pretrained, save_model
from genrobust.numerics import seeded

EPS, N = 0.1, 16


class Noise(Wrapper):
    "Adds noise to logits"

    def __init__(self, net, sigma=1e-3):
        super().__init__(net)
        self.sigma = sigma

    def forward(self, x):
        logits = self.net(x)
        return logits + self.sigma * torch.randn_like(logits)


class Reversed(Wrapper):
    "The gradient points the wrong way, but at images of whole bytes"

    def forward(self, x):
        bytes_ = 255 * x.detach()
        is_whole = (bytes_ - bytes_.round()).abs().flatten(1).amax(1) < 1e-3
        sign = torch.where(is_whole, 1, -1)[:, None, None, None]
        return self.net(x.detach() + sign * (x - x.detach()))


class Backwards(Wrapper):
    "The gradient points the wrong way everywhere"

    def forward(self, x):
        return self.net(2 * x.detach() - x)


class Ripple(Wrapper):
    "Ripples on the image: the gradient of a point says little about the next"

    def __init__(self, net, a=0.1, f=100):
        super().__init__(net)
        self.a, self.f = a, f

    def forward(self, x):
        return self.net(x + self.a * torch.sin(self.f * x))


class NoisyGradient(Noise):
    "Logits that hardly differ from draw to draw, with gradients that are noise for the most part"

    n_samples = 1

    def __init__(self, net, sigma=1.0, samples=1, seed=None):
        super().__init__(net, sigma)
        self.samples, self.seed = samples, seed

    def fixed(self, seed=0, n_samples=None):
        return self if self.seed is not None else self.like(n_samples or 1, seed)

    def like(self, samples, seed):
        return NoisyGradient(self.net, self.sigma, samples, seed)

    def averaged(self, draws, seed=0):
        return self.like(draws, seed)

    def forward(self, x):
        logits = self.net(x)
        generator = torch.Generator().manual_seed(
            torch.randint(2**31, ()).item() if self.seed is None else self.seed
        )
        shape = self.samples, x[0].numel(), logits.shape[1]
        w = torch.randn(shape, generator=generator).mean(0)
        shift = 0.05 * torch.randn(logits.shape[1], generator=generator)
        return logits + shift + self.sigma * (x - x.detach()).flatten(1) @ w


class Masked(Wrapper):
    "Sees a random half of the pixels"

    def __init__(self, net, mask=None):
        super().__init__(net)
        self.mask = mask

    def fixed(self, seed=0):
        if self.mask is not None:
            return self
        with seeded(seed):
            return Masked(self.net, torch.rand(1, 1, 28, 28) < 0.5)

    def forward(self, x):
        mask = torch.rand_like(x) < 0.5 if self.mask is None else self.mask
        return self.net(2 * x * mask)


class TwoDetached(Wrapper):
    "The two largest logits are cut off from the image, and so is the margin"

    def forward(self, x):
        logits = self.net(x)
        is_top = logits >= logits.topk(2).values[:, 1:]
        return torch.where(is_top, logits.detach(), logits)


class Misled(BayesClassifier):
    "log p(x|.) with a gradient that points the wrong way, a thousand times as long"

    def _log_px(self, x, y, z):
        found = super()._log_px(x, y, z)
        return found.detach() - 1000 * (found - found.detach())


@pytest.fixture(autouse=True)
def little(monkeypatch):
    few = BUDGETS['quick']._replace(images=N, steps=12, noisy=N, climbs=6, draws=(1, 2), inner=40)
    few = few._replace(more=4, scored=8)
    monkeypatch.setitem(BUDGETS, 'quick', few)


@pytest.fixture(scope='module')
def splits(loaded):
    return Splits(*[part.first(2000) for part in loaded[1]])


@pytest.fixture(scope='module')
def linear(splits):
    with seeded(0):
        return train_briefly(Linear(), *splits.train)


@pytest.fixture(scope='module')
def dfz():
    return of_dfz(BayesClassifier)


def of_dfz(kind):
    "A Bayes classifier with the weights of DFZ, and one sample of the latents"
    shipped = load_pretrained('dfz', 'cpu')
    clf = kind(**dict(shipped.config, n_samples=1))
    clf.load_state_dict(shipped.state_dict())
    return clf.eval().requires_grad_(False)


def judged(check, model, splits, **own):
    found = check(model, splits.test.x, splits.test.y, **dict(eps=EPS, size='quick') | own)
    assert found.name == check.__name__ and found.reason
    assert found.verdict == 'does not apply' or not math.isnan(found.number)
    return found


def budget(monkeypatch, **own):
    monkeypatch.setitem(BUDGETS, 'quick', BUDGETS['quick']._replace(**own))


def test_every_check_of_an_honest_model_passes_or_does_not_apply(linear, splits):
    trial = Trial(linear, splits.test.x, splits.test.y, eps=0.03, size='quick')
    found = {check.__name__: check(trial) for check in CHECKS}
    words = {name: check.verdict for name, check in found.items()}
    of_random = {'averaging', 'more_samples', 'resampled_latents', 'single_factors', 'joint_attack'}
    assert {k for k, word in words.items() if word == 'does not apply'} == of_random
    assert {word for k, word in words.items() if k not in of_random} == {'passes'}, words
    for check in found.values():
        assert check.verdict != 'passes' or check.number <= check.limit
        assert math.isnan(check.low) or check.low <= check.number <= check.high


@pytest.mark.parametrize('sigma, word', [(1e-3, 'passes'), (2.0, 'fails')])
def test_noise_that_misclassifies_clean_images_is_told(linear, splits, sigma, word):
    assert judged(evidence.clean_draws, Noise(linear, sigma), splits).verdict == word


def test_the_rate_of_clean_images_that_depend_on_the_draw(splits):
    "Right with probability 3/4, whatever the image: right on one draw and wrong on another, 1/4"

    def model(x):
        is_right = (torch.rand(len(x)) < 0.75).float()[:, None]
        label = nn.functional.one_hot(splits.test.y[: len(x)], 10)
        return 0 * x.sum() + is_right * label

    model(splits.test.x[:N])
    found = judged(evidence.clean_draws, model, splits)
    assert found.low < 0.25 + 0.1 and found.high > 0.25 - 0.1 and found.verdict == 'fails'


@pytest.mark.parametrize(
    'check, kind',
    [
        (evidence.headline, Reversed),
        (evidence.single_step, Reversed),
        (evidence.binary_test, Reversed),
        (evidence.ablation, FlatTanh),
        (evidence.larger_radius, FlatTanh),
        (evidence.order_of_attacks, Backwards),
        (evidence.black_box, Rounded),
    ],
    ids=lambda v: v.__name__,
)
def test_masked_gradients_fail(linear, splits, check, kind):
    assert judged(check, kind(linear), splits).verdict == 'fails'


@pytest.mark.parametrize(
    'model', [Vote, lambda net: Noise(Detached(net), 0.1)], ids=['vote', 'noise']
)
def test_every_check_judges_a_model_without_a_gradient(linear, splits, model):
    trial = Trial(model(linear), splits.test.x, splits.test.y, eps=EPS, size='quick')
    found = {check.__name__: check(trial) for check in CHECKS}
    silent = {name for name, check in found.items() if 'no gradient' in check.reason}
    of_random = {'averaging', 'resampled_latents'} if trial.is_random else set()
    assert silent == {'ablation', 'binary_test', *of_random}
    assert {found[name].verdict for name in silent} == {'does not apply'}


def test_images_without_a_binary_problem_do_not_count(linear, splits):
    x, few = splits.test.x[:N], splits.test.x[:3]

    def model(z):
        "The linear model near three images; far from them all logits are 0"
        is_near = (torch.cdist(z.flatten(1), few.flatten(1), p=math.inf) < 2 * EPS).any(1)
        return linear(z) * is_near[:, None]

    found = evidence.binary_test(model, x, model(x).argmax(1), eps=EPS, size='quick')
    assert found.n == 3 and found.verdict == 'undecided' and found.rates == {'solved': 1}


def test_an_attack_that_has_not_converged_fails(linear, splits):
    trial = Trial(Ripple(linear), splits.test.x, splits.test.y, eps=EPS, size='quick')
    trial.white = pgd(trial.model, trial.x, trial.y, steps=1, eps=EPS)
    found = evidence.more_steps(trial)
    assert found.verdict == 'fails'
    assert found.rates['stood before'] - found.rates['stood after'] == pytest.approx(found.number)


@pytest.mark.parametrize('check', [evidence.averaging, evidence.more_samples])
@pytest.mark.parametrize('sigma, word', [(1e-3, 'passes'), (0.5, 'fails')])
def test_an_average_of_too_few_draws_fails(linear, splits, monkeypatch, check, sigma, word):
    budget(monkeypatch, draws=(1, 4, 100), more=100)
    found = judged(check, NoisyGradient(linear, sigma), splits)
    assert found.verdict == word and len(found.rates) == (3 if check is evidence.averaging else 2)


@pytest.mark.parametrize('check', [evidence.averaging, evidence.more_samples])
def test_bounds_of_each_image_go_with_the_images_of_a_check(linear, splits, monkeypatch, check):
    budget(monkeypatch, noisy=5, draws=(1, 4), more=4)
    x, one = splits.test.x[:N], torch.ones(N, 1, 1, 1)
    model = NoisyGradient(linear, 1e-3)
    found, expected = (
        check(Trial(model, x, splits.test.y[:N], eps=EPS, size='quick', **own))
        for own in (dict(bounds=(0 * one, one)), {})
    )
    assert found.rates == expected.rates


def test_success_on_the_latents_of_the_attack_alone_fails(linear, splits):
    found = judged(evidence.resampled_latents, Masked(linear), splits)
    assert found.verdict == 'fails' and found.rates['one-shot'] < found.rates['resubmission']
    assert judged(evidence.resampled_latents, Noise(linear), splits).verdict == 'passes'


def test_an_attack_that_knows_the_detector_fails_it(splits, monkeypatch):
    budget(monkeypatch, images=40, climbs=20)
    model = Prototypes(splits.train)
    detectors = dict(logit=LogitDetector(model).fit(splits.train).calibrate(splits.valid))
    near, far = (
        judged(evidence.joint_attack, model, splits, detectors=detectors, eps=eps)
        for eps in (0.05, 0.5)
    )
    assert near.verdict == 'passes' and far.verdict == 'fails'
    assert far.rates['logit, aware'] > far.rates['logit, unaware']


def test_a_single_factor_that_finds_more_fails(dfz, splits, monkeypatch):
    budget(monkeypatch, images=8, climbs=8, steps=8)
    for model, word in ((dfz, 'passes'), (of_dfz(Misled), 'fails')):
        found = judged(evidence.single_factors, model, splits, eps=0.05)
        assert found.verdict == word, found


def test_matching_that_finds_more_fails(linear, splits):
    trial = Trial(TwoDetached(linear), splits.test.x, splits.test.y, eps=EPS, size='quick')
    trial.white = apgd(trial.model, trial.x, trial.y, loss='margin', eps=EPS, steps=10)
    assert evidence.matching(trial).verdict == 'fails'


@pytest.mark.parametrize('p, eps', [(math.inf, 0.1), (2, 1.0)])
def test_matching_brings_features_nearer_within_the_ball(dfz, splits, p, eps):
    x, y = splits.test.x[:6], splits.test.y[:6]
    like = x[nearest_of_others(x, y)[:, 0]]
    views = dict(p=p, eps=eps, steps=8, like=like, seed=3)
    model = dfz.fixed(3)
    label = model(like).argmax(1)

    def distance(embed, points):
        return (embed(points) - embed(like)).flatten(1).norm(dim=1)

    for attack, embed in (
        (match_logits, model),
        (match_latents, lambda v: dfz.latent_mean(v, label)),
    ):
        result = attack(dfz, x, y, **views)
        assert (norm(result.perturbation, p) <= eps * (1 + 1e-5)).all()
        moved = result.attacked & (result.perturbation != 0).flatten(1).any(1)
        nearer = distance(embed, result.x_adv) < distance(embed, x)
        assert moved.any() and nearer[moved & ~result.success].all()
        assert torch.equal(result.y_adv[moved], model(result.x_adv).argmax(1)[moved])
        again = attack(dfz, x[:3], y[:3], **dict(views, like=like[:3]))
        assert torch.allclose(again.x_adv, result.x_adv[:3], atol=1e-5)


def test_nearest_images_have_other_labels():
    x = torch.tensor([0.0, 0.1, 0.5, 0.9]).view(4, 1, 1, 1)
    y = torch.tensor([0, 0, 1, 1])
    assert nearest_of_others(x, y, 2).tolist() == [[2, 3], [2, 3], [1, 0], [1, 0]]
    with pytest.raises(ValueError, match='needs 3 of other labels to go for, found 2'):
        nearest_of_others(x, y, 3)


@pytest.mark.parametrize('p, eps', [(math.inf, 0.1), (2, 1.0)])
def test_chance_keeps_to_the_ball(linear, splits, p, eps):
    result = noise_in_ball(linear, splits.test.x[:N], p=p, eps=eps)
    size = norm(result.perturbation, p)
    assert (size <= eps * (1 + 1e-5)).all() and (size > eps / 2).all()


def test_transfer_is_success_of_one_models_examples_on_another(linear, splits):
    models = dict(linear=linear, masked=Rounded(linear), noise=Noise(linear))
    found = transfer_matrix(models, splits.test.x[:N], splits.test.y[:N], eps=EPS, steps=10)
    success = found.pivot(index='source', columns='target', values='success')
    white = apgd(linear, splits.test.x[:N], splits.test.y[:N], eps=EPS, steps=10, loss='margin')
    rate = white.success.sum() / white.attacked.sum()
    assert success.linear['linear'] == pytest.approx(rate.item())
    assert success.masked['linear'] > success.masked['masked']  # which has no gradient
    assert success.noise['linear'] == success.linear['linear'] > success.linear['chance']
    assert (found.low <= found.success).all() and (found.success <= found.high).all()


def test_tables_are_written_and_go_on_where_they_stopped(splits, tmp_path):
    cheap, told = ['clean_draws', 'ablation', 'more_steps'], []
    own = dict(size='quick', splits=splits, sources=[], device='cpu', say=told.append)
    measure_checks(['cnn'], tmp_path, balls=[(math.inf, 0.1)], checks=cheap[:2], **own)
    first = pd.read_csv(tmp_path / 'cnn.csv')
    assert list(first.check) == ['clean_draws', 'ablation'] and len(told) == 2
    assert set(first.norm) == {'linf'} and set(first.verdict) == {'passes'}
    assert json.loads(first.rates[1]) == {'success at any size': 1.0}
    measure_checks(['cnn'], tmp_path, balls=[(math.inf, 0.1)], checks=cheap, **own)
    again = pd.read_csv(tmp_path / 'cnn.csv')
    assert list(again.check) == cheap and len(told) == 3
    with pytest.raises(ValueError, match="check must be one of clean_draws, .*, found 'luck'"):
        measure_checks(['cnn'], tmp_path, checks=['ablation', 'luck'], **own)
    pd.testing.assert_frame_equal(again[:2], first)
    measure_transfer(['cnn', 'cnn_at'], tmp_path, images=8, splits=splits, device='cpu')
    found = pd.read_csv(tmp_path / 'transfer.csv')
    assert len(found) == 2 * 3 * 2 and set(found.norm) == {'linf', 'l2'}
    assert found.data.str.fullmatch('given [0-9a-f]{8}').all()
    other = splits._replace(test=splits.test._replace(x=splits.test.x.flip(0)))
    with pytest.raises(ValueError, match='holds rows of data'):
        measure_checks(['cnn'], tmp_path, **own | dict(splits=other))


def test_a_trial_keeps_its_images_and_settings(linear, splits):
    trial = Trial(linear, splits.test.x, splits.test.y, eps=EPS, size='quick')
    for own in (dict(eps=0.3), dict(y=splits.test.y)):
        with pytest.raises(ValueError, match='a Trial has images and settings of its own'):
            evidence.headline(trial, **own)


def test_images_that_are_all_misclassified_are_called_so(linear, splits):
    wrong = (splits.test.y + 1) % 10
    found = evidence.clean_draws(linear, splits.test.x, wrong, eps=EPS, size='quick')
    assert found.verdict == 'undecided' and found.reason == 'no image is classified correctly'


def test_rows_of_other_sizes_stay_and_of_other_settings_are_refused(tmp_path, splits):
    own = dict(balls=[(math.inf, 8 / 255)], checks=['clean_draws'], splits=splits)
    own |= dict(device='cpu', say=lambda text: None)
    for size in ('quick', 'standard', 'quick'):
        measure_checks(['cnn'], tmp_path, size=size, **own)
    rows = pd.read_csv(tmp_path / 'cnn.csv')
    assert rows['size'].tolist() == ['quick', 'standard'] and rows.eps.eq(8 / 255).all()
    with pytest.raises(ValueError, match=r'holds rows of seed \[0\], not of 1'):
        measure_checks(['cnn'], tmp_path, size='quick', seed=1, **own)
    (tmp_path / 'other').mkdir()
    save_model(CNN(seed=3), tmp_path / 'other/net.safetensors')
    save_model(CNN(seed=4), tmp_path / 'net.safetensors')
    measure_checks([tmp_path / 'net.safetensors'], tmp_path, size='quick', **own)
    with pytest.raises(ValueError, match='holds rows of weights'):
        measure_checks([tmp_path / 'other/net.safetensors'], tmp_path, size='quick', **own)


def test_images_of_one_class_cannot_be_matched():
    x = torch.rand(6, 8)
    net = nn.Linear(8, 3).eval()
    y = torch.zeros(6, dtype=torch.long)
    net.bias.data = torch.tensor([9.0, 0.0, 0.0])
    found = evidence.matching(Trial(net, x, y, eps=0.1, size='quick'))
    assert found.verdict == 'does not apply' and 'other classes' in found.reason


def test_bad_input_is_one_error(splits):
    x, y = splits.test.first(N)
    with pytest.raises(ValueError, match='y must'):
        evidence.ablation(NEVER, x, y[:3])
    with pytest.raises(ValueError, match='match_latents needs a BayesClassifier'):
        match_latents(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval(), x, like=x.flip(0))
