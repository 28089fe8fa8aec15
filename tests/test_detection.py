"Detectors: what they promise, on real images and on small models."

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from under_attack import Prototypes, made_up

from genrobust.attacks import AttackResult, fgsm, random_noise
from genrobust.data import Images
from genrobust.detection import (
    DETECTORS,
    REJECTED,
    Detector,
    KLDetector,
    LogitDetector,
    MarginalDetector,
    conformal_rank,
    conformal_threshold,
    detect,
    detected,
    evaded,
    fit_detectors,
    roc,
    score_images,
)
from genrobust.models import (
    CNN,
    BayesClassifier,
    NoDensityError,
    load_pretrained,
    load_tensors,
    save_tensors,
)


@pytest.fixture(scope='module')
def noisy(garments):
    return Prototypes(garments.train, noise=3.0)


@pytest.mark.parametrize('name', ['gfz', 'dfz'])
def test_one_in_twenty_clean_images_is_rejected(name, fashion):
    """Within two points. With 1,200 images to choose the threshold and 1,200 to test it the rate has a standard deviation of 0.9 points;
    what is usual need not be known well for that, and 400 images and K = 2 latents will do."""
    torch.manual_seed(0)
    clf = load_pretrained(name, device='cpu')
    clf.n_samples = 2
    found = fit_detectors(
        clf,
        fashion.train.first(400),
        fashion.valid.first(1200),
        fpr=0.05,
    )
    frame = score_images(found, *fashion.test.first(1200))
    assert list(found) == list(DETECTORS)
    for kind, detector in found.items():
        assert abs((frame[kind] > detector.threshold).mean() - 0.05) <= 0.02, kind


@pytest.mark.parametrize('fpr', [0.01, 0.05, 0.2])
@pytest.mark.parametrize('kind', DETECTORS.values(), ids=DETECTORS)
def test_the_rate_asked_for_is_kept_on_validation_images(kind, fpr, noisy, garments):
    detector = kind(noisy).fit(garments.train)
    torch.manual_seed(1)
    detector.calibrate(garments.valid, fpr)
    torch.manual_seed(1)
    assert detector.rejects(garments.valid.x).sum() == int(fpr * 501) - 1


def test_one_pass_or_three_are_the_same_detectors(prototypes, garments):
    together = fit_detectors(prototypes, garments.train, garments.valid, fpr=0.1)
    for name, kind in DETECTORS.items():
        alone = (
            kind(prototypes)
            .fit(garments.train, batch_size=37)
            .calibrate(garments.valid, fpr=0.1, batch_size=64)
        )
        assert repr(alone) == repr(together[name])
        assert torch.allclose(
            alone.score(garments.test.x), together[name].score(garments.test.x), atol=1e-3
        )


def test_wrong_training_images_do_not_count_and_wrong_validation_images_do(prototypes, garments):
    right = prototypes(garments.train.x).argmax(1) == garments.train.y
    assert 0 < right.sum() < len(right)
    whole, part = (
        LogitDetector(prototypes).fit(images)
        for images in (garments.train, Images(*[v[right] for v in garments.train]))
    )
    assert torch.equal(whole.statistics['mean'], part.statistics['mean'])
    permuted = Images(garments.valid.x, garments.valid.y.roll(1))
    assert whole.calibrate(garments.valid).threshold == part.calibrate(permuted).threshold


def test_learning_anew_forgets_the_threshold(prototypes, garments):
    detector = LogitDetector(prototypes).fit(garments.train).calibrate(garments.valid)
    with pytest.raises(ValueError, match='call calibrate first'):
        detector.fit(garments.train).rejects(garments.test.x)


def test_prediction_and_score_share_their_draw(noisy, garments):
    "One call of the model for both, and for the label that comes of them"
    detector = LogitDetector(noisy).fit(garments.train).calibrate(garments.valid)
    seen = []
    noisy.register_forward_hook(lambda module, args, logits: seen.append(logits))
    prediction, score = detector.predict_and_score(garments.test.x, batch_size=500)
    assert len(seen) == 1
    assert torch.equal(prediction, seen[0].argmax(1))
    assert torch.equal(score, detector.judge(seen[0]))
    torch.manual_seed(2)
    labels = detector(garments.test.x, batch_size=500)
    expected = seen[1].argmax(1).where(detector.judge(seen[1]) <= detector.threshold, REJECTED)
    assert len(seen) == 2
    assert torch.equal(labels, expected)
    assert (labels == REJECTED).any()
    assert (labels != REJECTED).any()
    noisy._forward_hooks.clear()


def test_the_old_name_warns_and_works(prototypes, garments):
    detector = LogitDetector(prototypes).fit(garments.train)
    with pytest.warns(DeprecationWarning, match='predict_and_score'):
        prediction, score = detector.look(garments.test.x)
    assert torch.equal(prediction, detector.predict_and_score(garments.test.x)[0])
    assert torch.equal(score, detector.score(garments.test.x))


def test_scores_are_differentiable_for_those_who_attack_the_detector(prototypes, garments):
    for detector in fit_detectors(prototypes, garments.train, garments.valid).values():
        x = garments.test.x[:3].clone().requires_grad_()
        (g,) = torch.autograd.grad(detector.judge(prototypes(x)).sum(), x)
        assert g.isfinite().all() and g.abs().sum() > 0


@pytest.mark.parametrize(
    'make',
    [
        CNN,
        lambda: BayesClassifier('DFX', n_samples=2),
        lambda: BayesClassifier('DBX', n_samples=2),
        lambda: BayesClassifier('DFX', n_samples=2).fixed(0),
        lambda: BayesClassifier('DBX', n_samples=2).fresh(),
    ],
)
def test_without_a_density_there_is_kl_alone(make, garments):
    clf = make().eval()
    for kind in (LogitDetector, MarginalDetector):
        with pytest.raises(NoDensityError, match='no density'):
            kind(clf)
    score = made_up(clf).score(garments.test.x[:20])
    assert score.shape == (20,) and score.min() >= -1e-5


def test_kl_is_finite_where_probabilities_are_zero(garments):
    detector = KLDetector(nn.Linear(2, 2))
    detector.statistics = dict(
        usual=torch.tensor([[0.9, 0.1], [0, 1]]), mean=torch.zeros(2), std=torch.ones(2)
    )
    score = detector.judge(torch.tensor([[0.0, -500.0], [-500.0, 0.0], [0.0, 1.0]]))
    assert torch.allclose(
        score,
        torch.tensor(
            [0.9 * math.log(0.9) + 0.1 * math.log(0.1) + 50, 0, math.log(1 + math.exp(-1))]
        ),
        atol=1e-4,
    )


def test_bad_input_is_one_clear_error(prototypes, garments, tmp_path):
    images, fresh = garments.train, LogitDetector(prototypes)

    def scarce(n):
        return Images(
            torch.cat([images.x[images.y != 3], images.x[images.y == 3][:n]]),
            torch.cat([images.y[images.y != 3], images.y[images.y == 3][:n]]),
        )

    for act, message in [
        (lambda: fresh.score(images.x), 'call fit first'),
        (lambda: fresh.calibrate(garments.valid), 'call fit first'),
        (lambda: fresh.save(tmp_path / 'x'), 'call fit first'),
        (lambda: fresh.fit(scarce(0)), r'classes \[3\]'),
        (lambda: fresh.fit(images).rejects(images.x), 'call calibrate first'),
        (lambda: fresh.calibrate(garments.valid.first(19)), 'at least 20 clean images, found 19'),
        (lambda: fresh.calibrate(garments.valid.first(99), fpr=0.01), 'at least 100'),
        (lambda: fit_detectors(prototypes, images, garments.valid.first(19)), 'at least 20'),
        (lambda: detect(prototypes, {}, garments, n_valid=10), 'at least 20'),
        (lambda: fresh.score(images.x * math.nan), 'NaN'),
        (lambda: fresh.fit(Images(images.x * math.nan, images.y)), 'NaN'),
        (lambda: fresh.fit(Images(images.x, images.y[:9])), 'a label for each of 600'),
        (lambda: KLDetector(CNN()).fit(images), 'training mode'),
        (lambda: roc([math.nan], [1.0]), 'clean images hold NaN'),
        (lambda: roc([1.0], []), 'at least one adversarial'),
    ]:
        with pytest.raises(ValueError, match=message):
            act()
    assert not list(tmp_path.iterdir())
    for fpr in (0, 1, 1.5, math.nan, None):
        with pytest.raises(ValueError, match='between 0 and 1'):
            fresh.calibrate(garments.valid, fpr=fpr)


@pytest.mark.parametrize(
    'other', [lambda m, images: Prototypes(images.first(500)), lambda m, images: CNN()]
)
def test_a_saved_detector_serves_its_own_model_only(other, prototypes, garments, tmp_path):
    for name, detector in fit_detectors(prototypes, garments.train, garments.valid).items():
        detector.save(tmp_path / name)
        again = Detector.load(tmp_path / name, prototypes)
        assert type(again) is type(detector)
        assert repr(again) == repr(detector)
        assert torch.equal(again.rejects(garments.test.x), detector.rejects(garments.test.x))
        with pytest.raises(ValueError, match='fitted on another model'):
            type(detector).load(tmp_path / name, other(prototypes, garments.train))


def test_noise_and_samples_belong_to_the_model_of_a_detector(tmp_path):
    clf = BayesClassifier('GFZ', hidden=20, n_samples=2).eval()
    detector = made_up(clf.fixed(0))
    detector.save(tmp_path / 'kl')
    assert repr(KLDetector.load(tmp_path / 'kl', clf.fixed(0))) == repr(detector)
    for other in (clf, clf.fixed(1), clf.fixed(0, n_samples=3), clf.averaged(2)):
        with pytest.raises(ValueError, match='another model'):
            KLDetector.load(tmp_path / 'kl', other)


def test_detect_scores_attacks_and_counts_what_should_count(prototypes, garments):
    results = {
        'FGS': fgsm(prototypes, *garments.test.first(100), eps=0.05),
        'noise': random_noise(prototypes, *garments.test.first(50), eps=0.02),
    }
    found, frame = detect(prototypes, results, garments, n_train=600, n_valid=500, n_clean=300)
    assert frame.groupby('attack', sort=False).size().to_dict() == {
        'clean': 300,
        'FGS': 100,
        'noise': 50,
    }
    of, result = frame[frame.attack == 'FGS'], results['FGS']
    assert of.success.tolist() == result.success.tolist()
    assert of.prediction.tolist() == result.y_adv.tolist()
    assert of.label.tolist() == result.y.tolist()
    assert of.image.tolist() == list(range(100))
    for name, detector in found.items():
        judged = detected(frame, 'FGS', name, detector.threshold)
        assert torch.allclose(
            torch.tensor(judged.adversarial),
            detector.score(result.x_adv[result.success]).double(),
            atol=1e-3,
        )
        assert len(judged.clean) == 300
        assert judged.rate == pytest.approx(
            detector.rejects(result.x_adv[result.success]).double().mean().item()
        )
        passed = evaded(frame, 'FGS', name, detector.threshold)
        assert len(passed) == result.attacked.sum()
        assert passed.sum() == (result.success & ~detector.rejects(result.x_adv)).sum()


def test_the_clean_versions_of_other_images_are_not_guessed(prototypes, garments):
    later = fgsm(prototypes, *(v[100:150] for v in garments.test), eps=0.05)
    _, frame = detect(prototypes, {'FGS': later}, garments, n_train=600, n_valid=100, n_clean=50)
    assert (frame[frame.attack == 'FGS'].image == -1).all()
    with pytest.raises(ValueError, match='first test images'):
        detected(frame, 'FGS', 'kl', 0.0, alpha_on_batch=True)
    first = fgsm(prototypes, *garments.test.first(50), eps=0.05)
    _, frame = detect(prototypes, {'FGS': first}, garments, n_train=600, n_valid=100, n_clean=49)
    with pytest.raises(ValueError, match='clean versions of all of them'):
        detected(frame, 'FGS', 'kl', 0.0, alpha_on_batch=True)


def test_detect_is_repeatable_and_leaves_random_numbers_alone(noisy, garments):
    state = torch.random.get_rng_state()
    (_, one), (_, same), (_, another) = (
        detect(noisy, {}, garments, n_train=600, n_valid=100, n_clean=50, seed=seed)
        for seed in (0, 0, 1)
    )
    assert one.equals(same)
    assert not one.equals(another)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_saved_attack_can_be_judged(prototypes, garments, tmp_path):
    result = fgsm(prototypes, *garments.test.first(40), eps=0.05)
    result.save(tmp_path / 'fgsm.safetensors')
    frames = [
        detect(prototypes, {'fgsm': r}, garments, n_train=600, n_valid=100, n_clean=40)[1]
        for r in (result, AttackResult.load(tmp_path / 'fgsm.safetensors'))
    ]
    assert frames[0].equals(frames[1])


def test_intervals_of_all_and_nothing_are_not_points():
    perfect = roc(range(100), range(200, 230), threshold=95)
    assert perfect.rate == perfect.area == 1
    assert 0.8 < perfect.rate_interval[0] < 1
    assert perfect.false_positives == 0.04
    assert math.isnan(roc([1.0, 2.0], [3.0]).area_interval[0])
    assert '1 adversarial example' in repr(roc([1.0, 2.0], [3.0]))
    assert roc(range(100), range(100, 130)).to_frame()[['fpr', 'tpr']].iloc[
        [0, -1]
    ].values.tolist() == [[0, 0], [1, 1]]


RATES = [Fraction(percent, 100) for percent in range(1, 100)]


def test_a_rate_that_n_images_allow_is_not_refused_by_rounding():
    "1/49 of 49 images is one image, and the rank of a threshold is exact, for every n up to 2,000"
    for n in range(2, 2001):
        for rate in (
            Fraction(1, n),
            Fraction(2, n + 1),
            Fraction(n - 1, n),
            Fraction(n // 2, n),
            RATES[n % 99],
        ):
            if n * rate < 1:
                continue
            assert conformal_rank(n, float(rate)) == math.floor(rate * (n + 1)), (n, rate)
        with pytest.raises(ValueError, match=f'at least {n} clean images, found {n - 1}'):
            conformal_rank(n - 1, 1 / n)


@pytest.mark.parametrize(
    'fpr', [1e-12, 5e-324, 1 - 1e-12, math.nextafter(1, 0), np.float32(0.05), Fraction(1, 3)]
)
def test_extreme_rates_are_ranks_too(fpr):
    if fpr > 0.01:
        assert 1 <= conformal_rank(100, fpr) <= 100
        assert 1 <= conformal_threshold(torch.arange(100.0), fpr) + 1 <= 100
    else:
        with pytest.raises(ValueError, match=r'at least \d+ clean'):
            conformal_rank(10**6, fpr)


def test_a_share_of_clean_scores_is_not_rounded():
    "Without a threshold, that share of distinct clean scores is rejected exactly"
    for n in range(1, 300):
        for k in {1, n // 3, n // 2, n - 1} - {0, n}:
            found = roc(range(n), [0.0], fpr=k / n)
            assert (found.clean > found.threshold).sum() == k, (n, k)


def test_infinite_scores_count():
    "As scores beyond all others would"
    rng = np.random.default_rng(0)
    clean, adversarial = rng.normal(size=60).round(1), rng.normal(1, size=40).round(1)
    for places in ([], [0], [0, 1, 2]):
        for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            pair = {}
            for far in (99.0, math.inf):
                scores = [v.copy() for v in (clean, adversarial)]
                for v, sign in zip(scores, signs):
                    v[places] = sign * far
                pair[far] = roc(*scores)
            near, far = pair.values()
            grid = np.linspace(0, 1, 11)
            assert repr(near) == repr(far)
            assert (
                near.area,
                near.rate,
                near.rate_interval,
                near.area_interval,
            ) == (far.area, far.rate, far.rate_interval, far.area_interval)
            assert np.array_equal(near.band(grid), far.band(grid))
            assert np.isfinite(far.band(grid)).all()
            assert near.to_frame()[['fpr', 'tpr']].equals(far.to_frame()[['fpr', 'tpr']])
            assert far.to_frame()[['fpr', 'tpr']].iloc[[0, -1]].values.tolist() == [[0, 0], [1, 1]]
    assert roc([-math.inf] * 3, [math.inf]).area == 1
    assert roc([math.inf] * 3, [math.inf] * 2).area == 0.5
    with pytest.raises(ValueError, match='NaN'):
        roc([0.0, math.inf], [math.nan])


def test_the_curve_is_that_of_scikit_learn():
    metrics = pytest.importorskip('sklearn.metrics')
    rng = np.random.default_rng(1)
    for n, m, digits in ((1, 1, 1), (2, 1, 0), (1, 5, 0), (30, 20, 0), (200, 100, 1), (50, 50, 8)):
        clean, adversarial = rng.normal(size=n).round(digits), rng.normal(0.5, size=m).round(digits)
        labelled = np.repeat([1, 0], [m, n]), np.concatenate([adversarial, clean])
        assert np.allclose(
            roc(clean, adversarial).to_frame().values.T, metrics.roc_curve(*labelled)
        )
        assert roc(clean, adversarial).area == pytest.approx(metrics.roc_auc_score(*labelled))


@pytest.mark.parametrize('name', DETECTORS)
def test_a_file_with_other_values_than_a_detectors_is_one_error(
    name, prototypes, garments, tmp_path
):
    "As somebody could write one, its digest right"
    path = tmp_path / 'guard'
    fit_detectors(prototypes, garments.train, garments.valid)[name].save(path)
    tensors, about = load_tensors(path)
    Detector.load(path, prototypes)
    wrong = [
        (tensors, {**about, key: value})
        for key in ('threshold', 'fpr')
        for value in ([1.0], '1', math.nan, math.inf, None, True, {})
    ]
    wrong += [
        (tensors, {**about, 'fpr': 2.0}),
        (tensors, {**about, 'model': [about['model']]}),
        (tensors, {**about, 'detector': [name]}),
        (tensors, {**about, 'detector': None}),
    ]
    wrong += [(tensors, {k: v for k, v in about.items() if k != key}) for key in about]
    wrong += [({k: v for k, v in tensors.items() if k != key}, about) for key in tensors]
    wrong += [
        ({**tensors, key: value}, about)
        for key in tensors
        for value in (
            tensors[key] * math.nan,
            -tensors[key].abs() - 1 if key != 'mean' else tensors[key] * math.inf,
            tensors[key].long(),
            tensors[key][:0],
            tensors[key][None],
            torch.ones(3, 4),
        )
    ]
    wrong += [({**tensors, 'more': torch.ones(1)}, about)]
    for values, metadata in wrong:
        save_tensors(path, values, **metadata)
        with pytest.raises(ValueError, match=str(path)):
            Detector.load(path, prototypes)


def test_a_detector_keeps_what_it_was_given(prototypes, garments, tmp_path):
    for fpr in (0.05, np.float32(0.25), Fraction(1, 3)):
        detector = KLDetector(prototypes).fit(garments.train).calibrate(garments.valid, fpr=fpr)
        detector.save(tmp_path / 'kl')
        assert json.dumps(detector.fpr) and Detector.load(tmp_path / 'kl', prototypes).fpr == float(
            fpr
        )


def test_scores_that_are_nan_set_no_threshold():
    with pytest.raises(ValueError, match='NaN'):
        conformal_threshold(torch.tensor([0.0, torch.nan, 1, 2]), 0.5)
