"Attacks made for Bayes classifiers and for detectors: what each view promises, on small models."

import json
from functools import partial

import pytest
import torch
from under_attack import Prototypes, made_up

from genrobust.adaptive import (
    AVERAGES,
    Averaged,
    DetectorAugmented,
    FactorGradient,
    attack_with_detector,
    evasion_rate,
)
from genrobust.attacks import AttackResult, apgd, carlini_wagner, deepfool, fgsm, random_noise
from genrobust.detection import DETECTORS, REJECTED, KLDetector, LogitDetector, fit_detectors
from genrobust.models import CNN, FACTORISATIONS, BayesClassifier


def small(name='GFZ'):
    return BayesClassifier(name, latent=4, hidden=16, n_samples=2).eval().requires_grad_(False)


@pytest.fixture(scope='module')
def x(garments):
    return garments.test.x[:6]


@pytest.fixture(scope='module')
def detectors(prototypes, garments):
    return fit_detectors(prototypes, garments.train, garments.valid)


def gradient(model, x, c=0):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x)[:, c].sum(), x)[0]


@pytest.mark.parametrize('of', AVERAGES)
def test_averages_are_those_of_their_definitions(of, x):
    "In float64, from the logits of each draw by itself"
    clf, draws = small().double(), 3
    noise = clf.averaged(draws, 5).noise.split(clf.n_samples, 1)
    logits = torch.stack([clf(x.double(), n) for n in noise], -1)
    p = logits.softmax(1)
    expected = dict(
        losses=(p.log() - (1 - p).log()).mean(-1),
        probabilities=p.mean(-1).log(),
        logits=logits.mean(-1),
        samples=(logits - logits.amax()).exp().mean(-1).log() + logits.amax(),
    )
    assert torch.allclose(
        Averaged(clf, draws, of, 5)(x.double()), expected[of], rtol=1e-6, atol=1e-6
    )


def test_averages_stay_finite_where_probabilities_are_0_and_1():
    logits = torch.tensor([[0.0, -900.0], [-900.0, 0.0], [-400.0, -450.0]])[None].requires_grad_()
    for of, average in AVERAGES.items():
        value = average(logits)
        (g,) = torch.autograd.grad(value[0, 0], logits)
        assert (
            value.isfinite().all()
            and g.isfinite().all()
            and (of == 'probabilities' or g.abs().sum() > 0)
        ), of


VIEWS = dict(
    probabilities=(lambda clf: Averaged(clf, 3), dict(seed=0, draws=3, average='probabilities')),
    losses=(lambda clf: Averaged(clf, 2, 'losses', 4), dict(seed=4, draws=2, average='losses')),
    factors=(lambda clf: FactorGradient(clf.fixed(1), 'xq'), dict(seed=1, draws=1, factors='xq')),
)


@pytest.mark.parametrize('make, noise', VIEWS.values(), ids=VIEWS)
def test_a_view_is_attacked_like_any_model(make, noise, x, tmp_path):
    "The same alone as in a batch (in float64, where no sign hangs on rounding), one gradient a step, and the record says what was attacked"
    view, x = make(small().double()), x.double()
    result = apgd(view, x, eps=0.2, steps=4)
    assert torch.allclose(result.x_adv[:2], apgd(view, x[:2], eps=0.2, steps=4).x_adv)
    assert (result.backwards == 4).all()
    assert result.settings['noise'] == noise | dict(n_samples=2)
    result.save(tmp_path / 'r')
    assert AttackResult.load(tmp_path / 'r').settings == json.loads(json.dumps(result.settings))


def test_draws_are_recorded_where_they_are_averaged(x):
    clf = small()
    still = clf.fixed(0)
    assert fgsm(clf, x, eps=0.1, draws=3).settings['draws'] == 3
    for model in (still, CNN().eval()):
        result = fgsm(model, x, eps=0.1, draws=3)
        assert 'draws' not in result.settings and result.forwards.max() <= 2


@pytest.mark.parametrize('name', FACTORISATIONS)
def test_gradients_through_the_factors_add_up(name, x):
    still, f = small(name).averaged(2, 3), FACTORISATIONS[name]
    factors = [k for k in 'xyzq' if not (k == 'x' and f.x is None or k == 'y' and f.y is None)]
    whole = gradient(still, x)
    assert torch.equal(FactorGradient(still, 'z')(x), still(x))
    assert (
        sum(gradient(FactorGradient(still, k), x) for k in factors) - whole
    ).norm() <= 1e-4 * whole.norm()
    assert torch.allclose(
        gradient(FactorGradient(still, 'zq'), x),
        gradient(FactorGradient(still, 'z'), x) + gradient(FactorGradient(still, 'q'), x),
        atol=1e-4 * whole.abs().max().item(),
    )


@pytest.mark.parametrize('kind', DETECTORS)
def test_the_augmented_model_answers_what_its_detector_does(kind, prototypes, detectors, garments):
    "On clean images, noisy ones and noise alone"
    images = torch.cat(
        [
            garments.test.x,
            random_noise(prototypes, garments.test.x[:100], eps=0.5).x_adv,
            torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
        ]
    )
    answer = DetectorAugmented(prototypes, detectors[kind])(images).argmax(1)
    assert torch.equal(answer.where(answer < 10, REJECTED), detectors[kind](images))
    assert {REJECTED} < set(detectors[kind](images).tolist())


def test_the_gradient_leads_back_to_what_is_violated_alone(prototypes, detectors, garments):
    "To the score where the margin is positive, to the margin where the slack is, to both where neither is"
    detector, images = detectors['logit'], garments.test.x[:300]
    logits = prototypes(images)
    view = DetectorAugmented(prototypes, detector)
    slack = detector.slack(logits)
    lead = logits - logits.amax(1, keepdim=True)
    for leads, passes in ((True, False), (False, True), (False, False)):
        where = ((lead == 0) == leads) & ((slack > 0) == passes)
        assert len(where.nonzero()) >= 3
        for n, c in where.nonzero()[:3].tolist():
            x = images[n : n + 1]
            to_pass = gradient(prototypes, x, c)
            to_lead = to_pass - gradient(prototypes, x, logits[n].argmax().item())
            assert torch.allclose(
                gradient(view, x, c), to_pass * (not passes) + to_lead * (not leads), atol=1e-4
            )


def test_slack_is_below_zero_where_a_class_would_be_rejected(prototypes, detectors, garments):
    for detector in detectors.values():
        logits = prototypes(garments.test.x[:50])
        label = torch.arange(50) % 10
        slack = detector.slack(logits).gather(1, label[:, None]).squeeze(1)
        assert torch.equal(slack < 0, detector.judge(logits, label) > detector.threshold)
        assert torch.allclose(detector.judge(logits, logits.argmax(1)), detector.judge(logits))
    expected = (
        detectors['logit'].sign
        * (logits[range(50), label] - detectors['logit'].statistics['mean'][label])
        / detectors['logit'].statistics['std'][label]
    )
    assert torch.allclose(detectors['logit'].judge(logits, label), expected)
    with pytest.raises(ValueError, match='call calibrate first'):
        LogitDetector(prototypes).fit(garments.train).slack(logits)


@pytest.mark.parametrize(
    'attack',
    [
        lambda *a, **k: apgd(*a, eps=0.5, steps=20, **k),
        deepfool,
        lambda *a, **k: carlini_wagner(*a, binary_search_steps=3, steps=60, **k),
    ],
    ids=['apgd', 'deepfool', 'carlini_wagner'],
)
@pytest.mark.parametrize('kind', DETECTORS)
def test_successes_are_accepted_as_their_target(kind, attack, prototypes, detectors, garments):
    x, y = garments.test.x[:10], prototypes(garments.test.x[:10]).argmax(1)
    result = attack_with_detector(attack, prototypes, detectors[kind], x, y)
    assert result.success.sum() >= 3
    assert torch.equal(detectors[kind](result.x_adv[result.success]), result.target[result.success])
    assert torch.equal(result.initially_wrong, detectors[kind](x) != y)
    assert torch.equal(
        result.target,
        DetectorAugmented(prototypes, detectors[kind])(x)[:, :10]
        .scatter(1, y[:, None], -torch.inf)
        .argmax(1),
    )
    assert set(result.y_adv.tolist()) <= {REJECTED, *range(10)}
    share = evasion_rate(result, detectors[kind], draws=2)
    assert (share[result.success] == 1).all() and share[result.initially_wrong].isnan().all()


def test_who_knows_the_detector_evades_it_more_often(prototypes, detectors, garments):
    x, y = garments.test.x[:40], garments.test.y[:40]
    unaware = apgd(prototypes, x, y, eps=0.5, steps=20)
    aware = attack_with_detector(apgd, prototypes, detectors['logit'], x, y, eps=0.5, steps=20)
    assert (
        evasion_rate(aware, detectors['logit'], draws=1).nanmean()
        > evasion_rate(unaware, detectors['logit'], draws=1).nanmean() + 0.2
    )


def test_a_stochastic_model_is_attacked_on_latents_of_the_given_seed(x):
    clf = small()
    detector = made_up(clf, threshold=1e6)
    y = clf.fixed(3)(x).argmax(1)
    result = attack_with_detector(fgsm, clf, detector, x, y, seed=3, target=(y + 1) % 10)
    assert result.settings['noise']['seed'] == 3 and result.settings['noise']['detector'] == 'kl'
    assert torch.equal(
        result.x_adv,
        attack_with_detector(fgsm, clf.fixed(3), detector, x, y, seed=3, target=(y + 1) % 10).x_adv,
    )
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = evasion_rate(result, detector, 5, seed=1)
    second = evasion_rate(result, detector, 5, seed=1)
    assert not result.initially_wrong.any()
    assert torch.equal(first, second) and torch.equal(torch.rand(3), expected)


def test_every_draw_is_a_new_one_and_none_is_the_attacks(garments):
    noisy = Prototypes(garments.train, noise=20.0)
    torch.manual_seed(0)
    detector = KLDetector(noisy).fit(garments.train).calibrate(garments.valid)
    share = evasion_rate(
        random_noise(noisy, *garments.test.first(200), eps=0.1), detector, draws=10
    )
    assert ((share > 0) & (share < 1)).sum() >= 5

    class Recorded(BayesClassifier):
        seen = []

        def _draw(self, *shape):
            self.seen.append(super()._draw(*shape))
            return self.seen[-1]

    clf = Recorded('GFZ', latent=4, hidden=16, n_samples=2).eval().requires_grad_(False)
    result = random_noise(clf.fixed(0), garments.test.x[:3], eps=0.1)
    evasion_rate(result, made_up(clf, threshold=1e6), draws=2)
    assert len(clf.seen) == 2
    assert not torch.isin(
        clf.seen[0], torch.cat([clf.fixed(0).noise.flatten(), clf.seen[1].flatten()])
    ).any()


def test_bad_input_is_one_clear_error(prototypes, detectors, garments, x):
    clf, y = small(), garments.test.y[:6]
    half_done = LogitDetector(prototypes).fit(garments.train)
    at = partial(attack_with_detector, apgd, prototypes)
    for act, message in [
        (lambda: Averaged(clf, 3, 'means'), 'losses, probabilities, samples, logits'),
        (lambda: DetectorAugmented(clf.fresh(), detectors['kl']), 'is stochastic'),
        (lambda: FactorGradient(small('DFX').fixed(0), 'x'), 'DFX has no others'),
        (lambda: FactorGradient(small('GFY').fixed(0), 'xy'), 'GFY has no others'),
        (lambda: DetectorAugmented(CNN().eval(), detectors['kl']), 'another network'),
        (lambda: DetectorAugmented(Averaged(clf, 2), made_up(clf, 1e6)), 'log-densities'),
        (lambda: at(detectors['kl'], x, y, target=10), 'target must lie'),
        (lambda: at(detectors['kl'], x, y + 9), 'y must lie'),
        (lambda: at(detectors['kl'], x, None), 'y must be integers'),
        (lambda: at(detectors['kl'], x, y[:3]), 'y must be integers'),
        (lambda: at(half_done, x, y), 'fitted and calibrated'),
        (lambda: Averaged(CNN().eval(), 3), 'expected a stochastic BayesClassifier'),
        (lambda: Averaged(clf.fixed(0), 3), 'expected a stochastic BayesClassifier'),
        (lambda: Averaged(clf, 0), 'draws'),
        (lambda: FactorGradient(clf, 'x'), 'is stochastic'),
        (lambda: FactorGradient(prototypes, 'x'), 'expected clf.fixed'),
        (lambda: FactorGradient(clf.fixed(0), ''), 'factors must be some of'),
        (lambda: FactorGradient(clf.fixed(0), 'xw'), "found 'xw'"),
        (lambda: FactorGradient(clf.fixed(0), 3), 'factors must be'),
        (lambda: DetectorAugmented(clf, detectors['logit']), 'is stochastic'),
        (lambda: DetectorAugmented(prototypes, LogitDetector(prototypes)), 'fitted and calibrated'),
        (lambda: DetectorAugmented(prototypes, prototypes), 'fitted and calibrated'),
        (lambda: evasion_rate(at(detectors['kl'], x, y, steps=1), detectors['kl'], 0), 'draws'),
        (lambda: evasion_rate(x, detectors['kl']), 'expected an AttackResult'),
    ]:
        with pytest.raises(ValueError, match=message):
            act()
