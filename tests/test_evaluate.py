"Any model is evaluated by one call: the numbers are right, what was done is not done again, and what makes no sense is one error."

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from under_attack import NET, NEVER, AtMost, images, make_net

from genrobust import cli, evaluation
from genrobust.attacks import Normalized, norm
from genrobust.cli import main
from genrobust.data import Images
from genrobust.evaluation import RADII, SIZES, Evaluation, ensemble, evaluate, worst_case
from genrobust.files import claimed
from genrobust.models import CNN, load_pretrained, save_model

X = images(12)
Y = NET(X).argmax(1)
COUNTS = ['one-shot', 'majority vote', 'resubmission']


@pytest.fixture
def checks():
    "Asked for by tests that run the checks"


@pytest.fixture(autouse=True)
def no_checks(request, monkeypatch):
    "Others leave them out: they have tests of their own, and take most of the time"
    if 'checks' not in request.fixturenames:
        monkeypatch.setattr(evaluation, 'MODEL_CHECKS', ())
        monkeypatch.setattr(evaluation, 'ATTACK_CHECKS', ())


def quick(model, *data, **kw):
    return evaluate(model, *data, **dict(dict(size='quick', progress=False), **kw))


def rates(report, threat_model='white box'):
    return report.robust[report.robust.threat_model == threat_model].rate.tolist()


def same(one, other):
    "Equal numbers, whatever the time they took"
    assert one.clean == other.clean and one.warnings == other.warnings
    assert one.robust.equals(other.robust) and one.passes == other.passes
    assert (one.scores is None) == (other.scores is None)
    assert one.scores is None or one.scores.equals(other.scores)
    if one.result is not None:
        for name, value in one.result.tensors().items():
            assert torch.equal(value, other.result.tensors()[name]), name
        assert torch.equal(one.distance, other.distance)
    assert one.settings == other.settings


# --- the number


@pytest.mark.parametrize('p, dual', [(1, math.inf), (2, 2), (math.inf, 1)])
def test_of_a_linear_model_the_robust_accuracy_is_exact(p, dual):
    torch.manual_seed(0)
    w, x = torch.randn(4, 20).double(), torch.rand(40, 20).double()
    logits = x @ w.T
    y = logits.argmax(1)
    y[:4] = (y[:4] + 1) % 4  # misclassified
    top = logits.argmax(1)
    gap = logits.gather(1, top[:, None]) - logits
    size = (w[top][:, None] - w[None]).norm(dual, dim=2)
    exact = (gap / size).masked_fill(torch.nn.functional.one_hot(top, 4).bool(), torch.inf).amin(1)
    exact[:4] = 0
    ordered = exact.sort().values
    eps = [ordered[n : n + 2].mean().item() for n in (10, 20, 30)]
    report = quick(lambda x: x @ w.T, x, y, p=p, eps=eps, bounds=(-10, 10))
    assert report.clean.rate == 0.9 and report.clean.n == 40
    assert rates(report) == [29 / 40, 19 / 40, 9 / 40]
    assert report.robust.eps.tolist() == eps and (report.robust.n == 40).all()
    assert (
        (report.robust.low < report.robust.rate) & (report.robust.rate < report.robust.high)
    ).all()
    found = report.distance[4:] / exact[4:]
    assert (report.distance[:4] == 0).all() and (0.999 < found).all() and (found < 1.02).all()
    curve = report.curve
    assert (
        curve.rate.iloc[0] == 0.9
        and curve.rate.iloc[-1] == 0
        and curve.rate.is_monotonic_decreasing
    )
    names = report.result.settings['attacks']
    won = report.result.found_by[report.result.success]
    assert len(won) == 36 and (won >= 0).all() and len(names) > won.max()


@pytest.mark.parametrize('p', [1, 2, math.inf])
def test_robust_accuracy_is_never_above_that_of_worst_case(p):
    report = quick(NET, X, Y, p=p)
    assert report.robust.eps.tolist() == list(RADII[p])
    for eps, rate in zip(report.robust.eps, rates(report)):
        worst = worst_case(NET, X, Y, p=p, eps=eps, size='quick')
        assert rate <= (worst.attacked & ~worst.success).double().mean()
    r = report.result
    assert torch.equal(r.success, NET(r.x_adv).argmax(1) != Y) and r.success.any()
    size = norm(r.perturbation, p)
    assert torch.allclose(size[r.success].double(), report.distance[r.success], rtol=1e-5)
    assert sorted(rates(report), reverse=True) == rates(report)
    assert report.passes['backwards'] > 0 and report.seconds > 0


def test_what_fell_at_a_small_radius_is_attacked_no_more(monkeypatch):
    seen = []

    def spying(model, x, y, *, eps, **kw):
        seen.append((eps, len(x)))
        return worst_case(model, x, y, eps=eps, **kw)

    monkeypatch.setattr(evaluation, 'worst_case', spying)
    report = quick(NET, X, Y, eps=(0.005, 0.02))
    within = {eps: n for eps, n in seen if eps}
    assert all(n == len(X) for eps, n in seen if eps is None)
    standing = (report.distance > 0.02).sum()
    assert 0 < standing <= within[0.02] < within[0.005] < len(X)


def test_larger_sizes_do_more():
    sizes = [evaluation._white_box_jobs(2, [0.5, 1], size, math.inf) for size in SIZES]
    assert len(sizes[0]) < len(sizes[1]) < len(sizes[2])
    few = evaluation._white_box_jobs(2, [0.5, 1], 'standard', 900)
    assert 2 < len(few) < len(sizes[1]) and {job.name for job in few} <= {
        *ensemble(2, 1, 'standard')
    }
    by_steps = {job.name: job.steps for job in sizes[1]}
    assert by_steps['APGD, 9 targets'] == 900 and by_steps['APGD, 50 steps'] == 50


# --- models and images of all kinds


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, x):
        return x + self.layers(x)


class ResNet(nn.Module):
    "As torchvision builds them, and small"

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=4, padding=3)
        self.blocks = nn.Sequential(Block(8), nn.MaxPool2d(2), Block(8))
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return 20 * self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Transformer(nn.Module):
    "Patches, attention, and an answer with more than logits"

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 4, stride=4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        hidden = self.encoder(self.embed(x).flatten(2).transpose(1, 2)).mean(1)
        return dict(hidden=hidden, logits=10 * self.head(hidden))


def foreign():
    "Name, model and images"
    torch.manual_seed(0)
    weight = torch.randn(64, 3, generator=torch.Generator().manual_seed(3))
    one = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).eval()
    return dict(
        resnet=(ResNet().eval(), torch.rand(10, 3, 32, 32)),
        function=(lambda x: x.flatten(1) @ weight, X),
        double=(make_net().double(), X),
        one_logit=(one, X),
        transformer=(Transformer().eval(), X),
    )


@pytest.mark.parametrize('name', foreign())
@pytest.mark.parametrize('as_array', [False, True], ids=['tensor', 'array'])
def test_foreign_models_need_no_code_beyond_the_call(name, as_array):
    model, x = foreign()[name]
    dtype = torch.float64 if name == 'double' else torch.float32
    logits = model(x.to(dtype))
    logits = logits['logits'] if isinstance(logits, dict) else logits
    y = logits.argmax(1) if logits.shape[1] > 1 else (logits > 0).long().squeeze(1)
    data = (x.numpy(), y.numpy()) if as_array else (x, y)
    report = quick(model, *data, eps=(0.02, 0.5))
    assert report.clean.rate == 1 and report.result.success.any() and report.result.x.dtype == dtype
    assert rates(report)[1] < 1 and report.robust.threat_model.eq('white box').all()


def test_images_come_in_many_forms():
    report = quick(NET, X, Y)
    several = [
        Images(X, Y),
        (X.numpy(), Y.numpy()),
        (X, Y.tolist()),
        [(image, int(label)) for image, label in zip(X, Y)],
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=5),
        [(X[:7], Y[:7]), (X[7:], Y[7:])] + [(X[:0], Y[:0])],
    ]
    for data in several:
        same(quick(NET, data), report)
    first = quick(NET, TensorDataset(X, Y), images=7)
    same(first, quick(NET, X[:7], Y[:7]))
    assert first.clean.n == 7


def test_numbers_come_in_many_types(tmp_path):
    report = quick(NET, X, Y, p=2, eps=(0.5, 1), draws=3, folder=tmp_path)
    for eps in (pd.Series([0.5, 1]), (r for r in (1, 0.5)), torch.tensor([0.5, 1]), {1: 0, 0.5: 0}):
        given = dict(p=np.float32(2), draws=np.int64(3), seed=np.int64(0), folder=tmp_path)
        assert quick(NET, X, Y, eps=eps, **given).robust.equals(report.robust)
    assert quick(NET, X, Y, p=torch.tensor(2)).clean == report.clean


def test_bounds_may_be_others():
    wide = quick(lambda x: NET((x + 1) / 2), 2 * X - 1, Y, bounds=(-1, 1))
    assert wide.robust.eps.tolist() == [2 * r for r in RADII[math.inf]]
    assert abs(wide.distance / 2 - quick(NET, X, Y).distance).max() < 1e-3


def test_a_tree_ensemble_is_attacked_by_queries():
    from sklearn.ensemble import RandomForestClassifier

    x = X.flatten(1)
    forest = RandomForestClassifier(5, random_state=0).fit(x.numpy(), Y.numpy())
    n_classes = int(Y.max()) + 1

    def model(x):
        shares = np.zeros((len(x), n_classes))
        shares[:, forest.classes_] = forest.predict_proba(x.flatten(1).numpy())
        return torch.from_numpy(shares).to(x)

    report = quick(model, X, Y, eps=0.3)
    assert set(report.result.settings['attacks']) <= {'Square', 'HopSkipJump'}
    assert report.passes['backwards'] == 0 and report.result.success.any()
    assert rates(report)[0] < report.clean.rate


def test_a_model_without_a_gradient_is_told_so_and_attacked_by_queries(checks):
    report = quick(lambda x: NET(x).detach(), X[:6], Y[:6], eps=0.1)
    assert 'no_gradient' in [caution.name for caution in report.warnings]
    assert report.passes['backwards'] == 0 and report.result.success.any()
    flat = quick(lambda x: (1e4 * NET(x)).tanh(), X[:6], Y[:6], eps=0.01)
    assert any('gradient' in caution.name for caution in flat.warnings)
    assert 'HopSkipJump' in flat.result.settings['attacks'] and flat.result.success.any()
    assert quick(NET, X[:6], Y[:6], eps=0.02).warnings == []


def test_inference_mode_within_a_model_is_no_gradient_and_around_the_call_is_nothing(checks):
    within = quick(torch.inference_mode()(lambda x: NET(x)), X[:6], Y[:6], eps=0.1)
    assert [caution.name for caution in within.warnings] == ['no_gradient']
    assert within.passes['backwards'] == 0 and within.result.success.any()
    with torch.inference_mode():
        around = quick(NET, X.clone(), Y.clone(), eps=0.02)
    same(around, quick(NET, X, Y, eps=0.02))


def test_a_model_in_training_mode_is_told_so_and_stays_as_it_is(checks):
    layers = nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3)
    net = nn.Sequential(nn.BatchNorm2d(1), *layers).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = quick(net, X[:6], Y[:6], eps=0.1)
    assert 'training_mode' in [caution.name for caution in report.warnings]
    assert net.training and report.robust.threat_model.tolist() == COUNTS
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- random models


class Latent(nn.Module):
    "A network with noise on its logits, which can be held fixed, one draw for all images"

    def __init__(self, noise=1.0, seed=None):
        super().__init__()
        self.net, self.noise, self.seed = make_net(), noise, seed
        self.eval()

    def fixed(self, seed=0, n_samples=None):
        return self if self.seed is not None else Latent(self.noise, seed)

    def forward(self, x):
        logits = self.net(x)
        if self.seed is None:
            return logits + self.noise * torch.randn(logits.shape)
        generator = torch.Generator().manual_seed(self.seed)
        return logits + self.noise * torch.randn(logits.shape[1], generator=generator)


def test_a_random_model_is_counted_in_four_ways():
    x = images(20)
    y = NET(x).argmax(1)
    report = quick(Latent(0.2), x, y, eps=(0.02, 0.1))
    ways = ['deterministic white box', *COUNTS]
    assert report.robust.threat_model.tolist() == 2 * ways
    white, one_shot, majority, any_of = (rates(report, name) for name in ways)
    for n in range(2):
        assert any_of[n] <= min(one_shot[n], majority[n]) and white[n] < 1
    assert any_of[0] < one_shot[0] < 1 and one_shot[1] < one_shot[0]
    scores = report.scores
    assert set(scores.eps) == {0.02, 0.1} and len(scores) == 40 and scores.share.between(0, 1).all()
    assert (scores.worst >= scores.majority).all() and (scores.worst == (scores.share > 0)).all()
    assert 0.5 < report.clean.rate < 1 and report.clean.n == 20
    same(quick(Latent(0.2), x, y, eps=(0.02, 0.1)), report)


def test_noise_that_cannot_be_held_fixed_leaves_three_ways():
    def noisy(x):
        return NET(x + 0.1 * torch.randn_like(x))

    report = quick(noisy, X, Y, eps=0.1)
    assert report.robust.threat_model.tolist() == COUNTS and report.result is None
    assert len(report.curve) == 0 and rates(report, 'resubmission') <= rates(report, 'one-shot')
    assert rates(report, 'one-shot')[0] < report.clean.rate
    still = quick(lambda x: NET(x), X, Y, eps=0.1)
    assert still.robust.threat_model.tolist() == ['white box']


class Coin(nn.Module):
    "One of two networks, chosen anew at every call"

    def __init__(self):
        super().__init__()
        self.one, self.other = make_net(), make_net(5.0)
        self.eval()

    def forward(self, x):
        return self.one(x) if torch.rand(()) < 0.5 else -self.other(x)


def test_one_coin_for_all_images_makes_a_random_model(checks):
    report = quick(Coin(), X, Y, eps=0.05)
    assert report.robust.threat_model.tolist() == COUNTS and report.clean.rate < 0.9
    assert 'random_answers' in [caution.name for caution in report.warnings]


@pytest.mark.parametrize('name', ['fixed', 'averaged', 'fresh'])
def test_attributes_may_bear_the_names_of_our_methods(name):
    for model in (make_net(), Coin()):
        setattr(model, name, False)
        assert quick(lambda x: model(x), X, Y, eps=0.05).robust.equals(
            quick(model, X, Y, eps=0.05).robust
        )


def test_a_scalar_of_another_type_says_nothing_of_the_images():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
            self.net = NET

        def forward(self, x):
            return self.net(x) * self.scale.to(x)

    assert quick(Scaled().eval(), X, Y).result.x.dtype == torch.float32


def test_random_models_are_scored_on_twenty_images():
    "Of sixty, four of each twelve"
    x = images(60)
    report = quick(Latent(), x, NET(x).argmax(1), eps=0.05)
    assert report.robust.n.tolist() == [60, 20, 20, 20]
    chunks = report.scores.groupby('chunk').image.apply(list)
    assert len(chunks) == 5 and chunks[1] == [12, 13, 14, 15]


def test_l1_of_a_random_model():
    report = quick(Latent(0.2), X, Y, p=1, eps=(1, 4))
    ways = ['deterministic white box', *COUNTS]
    assert report.robust.threat_model.tolist() == 2 * ways
    shares = report.scores.groupby('eps').share.mean()
    assert shares[1] < shares[4] and rates(report, 'one-shot')[1] < report.clean.rate
    assert 'l1 distance' in repr(report)


def test_l1_needs_gradients():
    with pytest.raises(ValueError, match='p = 1 needs gradients'):
        quick(lambda x: NET(x).detach(), X, Y, p=1)


# --- folders


SCRIPT = """
import sys, time
import torch
from genrobust import evaluation
from test_evaluate import X, Y, Latent as Quick, quick

evaluation.MODEL_CHECKS = evaluation.ATTACK_CHECKS = ()

class Latent(Quick):
    def forward(self, x):
        time.sleep(0.01)
        return super().forward(x)

    def fixed(self, seed=0, n_samples=None):
        return self if self.seed is not None else Latent(self.noise, seed)

quick(Latent(0.3), X, Y, eps=0.02, folder=sys.argv[1])
"""


def run_script(folder):
    tests = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get('PYTHONPATH', '')])
    env = dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', SCRIPT, str(folder)], env=env)


def test_a_killed_run_goes_on_to_equal_numbers(tmp_path):
    folder, parts = tmp_path / 'killed', tmp_path / 'killed' / 'parts'
    process = run_script(folder)
    while len(list(parts.glob('attack*.safetensors'))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match='no finished evaluation'):
        Evaluation.load(folder)
    done = {path: path.stat().st_mtime_ns for path in parts.glob('*.safetensors')}
    report = quick(Latent(0.3), X, Y, eps=0.02, folder=folder)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(parts.iterdir())) > len(done)
    same(report, quick(Latent(0.3), X, Y, eps=0.02))
    same(Evaluation.load(folder), report)


def test_processes_share_a_folder_and_one_may_be_killed(tmp_path):
    parts = tmp_path / 'shared' / 'parts'
    two = [run_script(parts.parent) for _ in range(2)]
    while len(list(parts.glob('chunk*.lock'))) < 2:  # each is at a chunk of its own
        assert all(process.poll() is None for process in two)
        time.sleep(0.01)
    two[0].send_signal(signal.SIGKILL)
    assert [process.wait() for process in two] == [-signal.SIGKILL, 0]
    same(Evaluation.load(parts.parent), quick(Latent(0.3), X, Y, eps=0.02))


def test_what_another_process_is_at_is_waited_for_or_left(tmp_path):
    other = claimed([tmp_path / 'parts' / 'chunk-0001.safetensors'])
    next(other)
    given = Latent(0.3), X, Y
    assert quick(*given, eps=0.02, folder=tmp_path, wait=False) is None
    done = {path.name.split('-')[-1] for path in tmp_path.glob('parts/attack*.safetensors')}
    assert done == {f'000{c}.safetensors' for c in (0, 2, 3)}
    released = threading.Event()
    threading.Timer(0.3, lambda: (released.set(), other.close())).start()
    report = quick(*given, eps=0.02, folder=tmp_path)
    assert released.is_set()
    same(report, quick(*given, eps=0.02))


@pytest.mark.parametrize('check', ['image_bounds', 'binarisation'])
def test_checks_of_another_process_are_waited_for_or_left(tmp_path, checks, check):
    other = claimed([tmp_path / 'parts' / f'check-{check}.safetensors'])
    next(other)
    timer = threading.Timer(600, other.close)  # where it is waited for nonetheless
    timer.daemon = True
    timer.start()
    assert quick(NET, X, Y, eps=0.02, folder=tmp_path, wait=False) is None
    assert timer.is_alive()
    timer.cancel()
    assert (tmp_path / 'parts' / 'check-gradient_mismatch.safetensors').exists()
    other.close()
    same(quick(NET, X, Y, eps=0.02, folder=tmp_path, wait=False), quick(NET, X, Y, eps=0.02))


def test_images_that_every_answer_gets_wrong_are_not_attacked_again(monkeypatch):
    asked, candidate = [], evaluation._Averages.candidate
    monkeypatch.setattr(
        evaluation._Averages,
        'candidate',
        lambda self, job, c, i: asked.extend(i.tolist()) or candidate(self, job, c, i),
    )
    wrong = Y.clone()
    wrong[::2] = (NET(X).argmax(1)[::2] + 1) % 4
    report = quick(lambda x: NET(x) + 1e-3 * torch.randn(len(x), 4), X, wrong, eps=(1e-4, 2e-4))
    assert asked and not set(asked) & set(range(0, len(X), 2))
    lost = report.scores[report.scores.image % 2 == 0]
    assert len(lost) and (lost.share == 1).all() and (lost.majority == 1).all()


@pytest.mark.parametrize('text', ['CUDA out of memory', 'MPS backend out of memory'])
def test_memory_that_does_not_suffice_is_no_bad_input(text):
    def model(x):
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=text):
        quick(model, X, Y)
    assert text in cli._exceeded(RuntimeError(text))


class LosesGradient(nn.Module):
    "Cuts off images that were moved; a network behind it"

    def __init__(self, noise=0.0):
        super().__init__()
        self.net, self.noise = NET, noise
        self.eval()

    def forward(self, x):
        is_moved = bool(((255 * x - (255 * x).round()).abs() > 1e-3).any())
        x = x.detach() if is_moved else x
        return self.net(x + self.noise * torch.randn_like(x))


@pytest.mark.parametrize('noise', [0, 0.01])
def test_a_gradient_that_is_lost_in_an_attack_is_told_and_queries_go_on(checks, noise):
    x = (255 * X).round() / 255
    report = quick(LosesGradient(noise), x, NET(x).argmax(1), eps=(0.1, 0.3))
    lost = [c for c in report.warnings if c.name == 'no_gradient']
    assert len(lost) == 1 and 0 < lost[0].evidence <= 1
    if not noise:
        assert {'Square', 'HopSkipJump'} <= set(report.result.settings['attacks'])
        won = report.result.to_frame().query('success').found_by
        assert set(won) <= {'Square', 'HopSkipJump'} and len(won)


def test_a_check_that_fails_does_not_end_the_run_and_is_named(checks, monkeypatch):
    def breaks(case):
        raise RuntimeError('singular')

    monkeypatch.setattr(evaluation.ATTACK_CHECKS[-1], 'found', breaks)
    report = quick(NET, X, Y, eps=0.02)
    assert report.warnings == [] and report.evidence['binarisation'] == 'singular'
    assert 'not checked, singular: binarisation' in repr(report)
    assert report.evidence['more_steps_help'] == 0 and report.images_checked == len(X)
    monkeypatch.setattr(evaluation.ATTACK_CHECKS[-1], 'found', out_of_memory)
    with pytest.raises(RuntimeError, match='out of memory'):
        quick(NET, X, Y, eps=0.02)


def out_of_memory(case):
    raise RuntimeError('CUDA out of memory')


def test_a_report_says_which_checks_can_say_nothing(checks, tmp_path):
    one = quick(NET, X[:1], Y[:1], eps=0.02)
    assert one.evidence['black_box_beats_white_box'] == 'nothing to measure'
    assert 'not checked, nothing to measure: normalisation' in repr(one)
    assert 'No warning, but 7 checks could measure nothing.' in repr(one), repr(one)
    wrong = quick(NET, X, (Y + 1) % 4, eps=0.02, folder=tmp_path)
    assert 'no image of the result was classified correctly' in wrong.evidence['binarisation']
    loaded = Evaluation.load(tmp_path)
    assert loaded.evidence == wrong.evidence and repr(loaded) == repr(wrong)


def test_an_answer_that_is_no_number_near_images_is_told(checks):
    def model(x):
        is_moved = ((255 * x - (255 * x).round()).abs() > 1e-3).flatten(1).any(1)
        return NET(x).where(~is_moved[:, None], math.nan)

    x = (255 * X).round() / 255
    report = quick(model, x, NET(x).argmax(1), eps=0.1)
    assert 'undefined_answers' in [caution.name for caution in report.warnings]


def test_what_is_saved_is_loaded(tmp_path):
    for n, model in enumerate((NET, Latent(), lambda x: NET(x + torch.randn_like(x)))):
        report = quick(model, X, Y, eps=0.1)
        report.save(tmp_path / str(n))
        loaded = Evaluation.load(tmp_path / str(n))
        same(loaded, report)
        assert repr(loaded) == repr(report) and loaded._repr_html_() == report._repr_html_()
        assert loaded.curve.equals(report.curve)
        (tmp_path / str(n) / 'result.safetensors').unlink(missing_ok=True)
        small = Evaluation.load(tmp_path / str(n))
        assert small.result is None and small.curve.equals(report.curve)
        assert small.table().equals(report.table())


def test_checks_may_be_left_out_and_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, 'MODEL_CHECKS', [NEVER])
    monkeypatch.setattr(evaluation, 'ATTACK_CHECKS', [NEVER])
    report = quick(NET, X, Y, eps=0.1, checks=False, folder=tmp_path)
    assert report.warnings is None and 'Not checked' in repr(report)
    assert 'Not checked' in report._repr_html_()
    same(Evaluation.load(tmp_path), report)


def test_cautions_are_not_lost_where_checks_are_left_out(tmp_path, checks):
    model = lambda x: NET((255 * x).round() / 255)  # noqa: E731
    report = quick(model, X, Y, eps=0.05, folder=tmp_path)
    assert 'zero_gradient' in [caution.name for caution in report.warnings]
    assert 'HopSkipJump' in report.result.settings['attacks']
    same(quick(model, X, Y, eps=0.05, folder=tmp_path, checks=False), report)
    shutil.rmtree(tmp_path / 'parts')  # as results are published
    same(quick(model, X, Y, eps=0.05, folder=tmp_path, checks=False), report)
    assert Evaluation.load(tmp_path).evidence == report.evidence
    assert quick(model, X, Y, eps=0.05, folder=tmp_path / 'other', checks=False).warnings is None


def test_a_finished_folder_is_not_attacked_again(tmp_path, monkeypatch):
    report = quick(NET, X, Y, folder=tmp_path)
    monkeypatch.setattr(evaluation, 'worst_case', NEVER)
    same(quick(NET, X, Y, folder=tmp_path), report)


def test_a_folder_of_another_evaluation_is_refused(tmp_path):
    quick(NET, X, Y, folder=tmp_path)
    before = (tmp_path / 'evaluation.json').read_bytes()
    others = [
        (dict(model=make_net(5.0)), 'weights'),
        (dict(x=X.flip(0), y=Y.flip(0)), 'images'),
        (dict(y=(Y + 1) % 4), 'images'),
        (dict(eps=0.3), 'eps'),
        (dict(seed=1), 'seed'),
        (dict(size='standard'), 'size'),
        (dict(p=2), 'p'),
        (dict(bounds=(-1, 2)), 'bounds'),
        (dict(model=lambda x: NET(x)), 'model'),
        (dict(model=lambda x: 1.01 * NET(x)), 'answers'),
        (dict(images=5), 'images'),
    ]
    for own, what in others:
        given = dict(model=NET, x=X, y=Y) | own
        model, x, y = (given.pop(name) for name in ('model', 'x', 'y'))
        with pytest.raises(ValueError, match=f'belongs to another evaluation.*{what}'):
            quick(model, x, y, folder=tmp_path, **given)
    assert (tmp_path / 'evaluation.json').read_bytes() == before


class Behind(nn.Module):
    "Something around a network, which its weights do not tell"

    def __init__(self, answer):
        super().__init__()
        self.net, self.answer = NET, answer
        self.eval()

    def forward(self, x):
        return self.answer(x)


def test_models_of_the_same_weights_that_answer_otherwise_are_told_apart(tmp_path):
    def noisy(x, std):
        return NET(x + std * torch.randn_like(x))

    def biased(x, bias):
        return NET(x) - 6000 + bias * torch.tensor([1.0, 0, 0, 0])

    models = [Behind(partial(noisy, std=std)) for std in (0.05, 0.5)]
    models += [Behind(partial(biased, bias=bias)) for bias in (0, 4)]
    models += [Normalized(NET, mean, 0.5) for mean in (0.1, 0.2)]
    for n, model in enumerate(models):
        folder = tmp_path / str(n // 2)
        if n % 2 == 0:
            quick(model, X, Y, eps=0.1, folder=folder)
            continue
        with pytest.raises(ValueError, match='of other answers'):
            quick(model, X, Y, eps=0.1, folder=folder)


def test_rounding_of_logits_and_draws_that_cannot_be_seeded_are_no_other_model(tmp_path):
    quick(NET, X, Y, folder=tmp_path / 'net')
    nearly = deepcopy(NET)
    nearly.forward = lambda x: NET(x) * (1 + 1e-6)
    quick(nearly, X, Y, folder=tmp_path / 'net')
    rng = np.random.default_rng(0)

    def drawn(x):
        return NET(x) + torch.from_numpy(rng.normal(size=(len(x), 4))).to(x)

    for _ in range(2):
        report = quick(drawn, X, Y, eps=0.1, folder=tmp_path / 'drawn')
    assert report.settings['answers'] is None


def test_parts_of_another_version_are_refused(tmp_path, monkeypatch):
    report = quick(NET, X, Y, folder=tmp_path)
    monkeypatch.setattr(evaluation, '__version__', '99')
    with pytest.raises(ValueError, match='of other version'):
        quick(NET, X, Y, folder=tmp_path)
    shutil.rmtree(tmp_path / 'parts')
    assert quick(NET, X, Y, folder=tmp_path).robust.equals(report.robust)


def test_a_part_that_is_broken_is_measured_again(tmp_path, monkeypatch):
    report, again = quick(NET, X, Y, folder=tmp_path), []
    parts = sorted(tmp_path.glob('parts/attack*'))
    parts[1].write_bytes(parts[1].read_bytes()[:-5])
    parts[2].write_bytes(b'')

    def counting(*args, **kw):
        again.append(kw['attacks'])
        return worst_case(*args, **kw)

    monkeypatch.setattr(evaluation, 'worst_case', counting)
    for _ in range(2):  # what was measured again is whole
        same(quick(NET, X, Y, folder=tmp_path), report)
    assert len(again) == 2


def test_files_that_are_broken_are_one_error(tmp_path):
    quick(NET, X, Y, folder=tmp_path)
    for name, content in (('evaluation.json', '{"clean": 3}'), ('settings.json', '[')):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match='holds no evaluation'):
        Evaluation.load(tmp_path)
    with pytest.raises(ValueError, match='settings.json is corrupt'):
        quick(NET, X, Y, folder=tmp_path)
    with pytest.raises(ValueError, match='no finished evaluation'):
        Evaluation.load(tmp_path / 'none')
    with pytest.raises(ValueError, match='is a file'):
        quick(NET, X, Y, folder=tmp_path / 'settings.json')


# --- what it says


def test_a_report_says_what_it_is_as_text_and_as_html():
    report = quick(NET, X, Y)
    text, html = repr(report), report._repr_html_()
    for shown in (text, html):
        assert 'pper bound' in shown and 'l-infinity' in shown and 'No warning' in shown
        assert str(report.clean) in shown and '(n = 12)' in shown and 'nearest by' in shown
    for row in report.robust.itertuples():
        assert f'{row.rate:.1%} [{row.low:.1%}, {row.high:.1%}]' in text
    caution = evaluation.Caution('black_box<b>', 0.25, 'do <this>')
    report.warnings.append(caution)
    assert (
        'black_box<b> (0.25): do <this>' in repr(report) and '&lt;this&gt;' in report._repr_html_()
    )


def test_a_plot_shows_the_curve_and_the_rates():
    report = quick(Latent(), X, Y, eps=(0.02, 0.1))
    ax = report.plot()
    assert 'at most' in ax.get_ylabel() and len(ax.get_legend().get_texts()) == 5


def test_the_plan_is_said_before_it_starts(checks, capsys):
    said = []
    evaluate(NET, X, Y, size='quick', progress=False, say=said.append)
    assert '12 images' in said[0] and 'DeepFool' in said[1] and said[2].startswith('about')
    assert capsys.readouterr() == ('', '')
    evaluate(NET, X, Y, size='quick')
    out, err = capsys.readouterr()
    assert said[1] in out and '100%' in err and 'left' in err


# --- bad input


BAD = [
    (dict(p=3), 'p must be one of 1, 2, inf'),
    (dict(p='inf'), 'p must be'),
    (dict(eps=0), 'eps must be'),
    (dict(eps=(0.1, -1)), 'eps must be'),
    (dict(eps=math.nan), 'eps must be'),
    (dict(eps=()), 'eps must be'),
    (dict(eps='0.1'), 'eps must be'),
    (dict(eps=(0.1, 8)), 'eps = 8 is more than the width of the bounds, 1'),
    (dict(eps=511, bounds=(-255, 255)), 'width of the bounds, 510'),
    (dict(eps=0.5, bounds=(X - 0.1, X + 0.1)), 'width of the bounds, 0.2'),
    (dict(size='huge'), 'size must be'),
    (dict(size=['quick']), 'size must be'),
    (dict(bounds=(1, 0)), 'bounds must be'),
    (dict(seed=-1), 'seed must be'),
    (dict(draws=0), 'draws must be'),
    (dict(batch_size=0), 'batch_size must be'),
    (dict(images=0), 'images must be'),
    (dict(y=None), 'y must be the labels'),
    (dict(y=Y[:3]), 'y must be integers'),
    (dict(y=Y.float()), 'y must be integers'),
    (dict(x=X[:0], y=Y[:0]), 'x holds no image'),
    (dict(x=X + 1), 'within bounds'),
    (dict(x=X * math.nan), 'x'),
    (dict(x=(255 * X).byte()), 'x / 255'),
    (dict(x='images', y=None), 'x must be images'),
    (dict(x=[X, X, X], y=None), 'must be a pair'),
    (dict(x=[(X[:2], Y[:2]), (X[:2, :, :4], Y[:2])], y=None), 'one shape'),
    (dict(x=[('image', 'label')], y=None), 'must hold numbers'),
    (dict(x=np.array(['a', 'b']), y=Y[:2]), 'must hold numbers'),
    (dict(x=X.numpy() + 1j), 'complex'),
    (dict(x=[], y=None), 'no images'),
    (dict(model=3), 'model must be'),
]


@pytest.mark.parametrize('own, match', BAD, ids=map(str, range(len(BAD))))
def test_bad_input_is_one_error_before_the_model_is_asked(own, match):
    given = dict(model=NEVER, x=X, y=Y) | own
    model, x, y = (given.pop(name) for name in ('model', 'x', 'y'))
    with pytest.raises(ValueError, match=match):
        quick(model, x, y, **given)


def test_models_that_answer_nonsense_are_one_error():
    for model, match in [
        (lambda x: x, 'must return float logits'),
        (lambda x: None, 'must return float logits'),
        (lambda x: NET(x) * math.nan, 'NaN or infinite'),
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 3)).eval(), 'cannot take images'),
        (lambda x: dict(a=NET(x), b=x), 'logits_of'),
        (lambda x: NET(x)[:, :2], 'y must lie'),
    ]:
        with pytest.raises(ValueError, match=match):
            quick(model, X, Y)
    report = quick(lambda x: dict(a=NET(x), b=x), X, Y, logits_of=lambda out: out['a'])
    assert report.robust.equals(quick(NET, X, Y).robust)


# --- the command


def command(capsys, *args):
    status = main(['evaluate', *map(str, args), '--no-progress', '--device', 'cpu'])
    return status, *capsys.readouterr()


@pytest.fixture
def files(tmp_path):
    "Of a user: one that makes two networks, and one that holds images and labels"
    net, npz = tmp_path / 'net.py', tmp_path / 'mine.npz'
    nets = 'net, other, number = make_net(), make_net(5.0), 3'
    net.write_text(f'from under_attack import make_net\n{nets}')
    np.savez(npz, x=X.numpy(), y=Y.numpy())
    return net, npz


def test_the_command_evaluates_what_a_file_makes(files, tmp_path, capsys):
    (net, npz), folder = files, tmp_path / 'out'
    broken, ends = tmp_path / 'broken.py', tmp_path / 'ends.py'
    broken.write_text('net = (')
    ends.write_text('import sys; sys.exit(3)')
    cut = tmp_path / 'cut.npz'
    np.savez_compressed(cut, x=X.numpy(), y=Y.numpy())
    cut.write_bytes(bytes(b ^ (200 < n < 260) for n, b in enumerate(cut.read_bytes())))
    common = '--images', npz, '--size', 'quick'
    status, out, err = command(
        capsys, f'{net}:net', *common, '--eps', 0.05, 0.1, '--folder', folder
    )
    report = quick(NET, X, Y, eps=(0.05, 0.1))
    assert status == 0 and not err and str(report.clean) in out and 'white box' in out
    assert Evaluation.load(folder).robust.equals(report.robust)
    for args, match in [
        ([f'{net}:none', *common], 'it is not there'),
        ([f'{net}:number', *common], 'must be a module'),
        ([f'{tmp_path}/none.py:net', *common], 'no file'),
        ([f'{npz}:net', *common], 'no .py file'),
        ([f'{broken}:net', *common], 'cannot be run: SyntaxError'),
        ([f'{ends}:net', *common], 'cannot be run: SystemExit'),
        ([f'{net}:net', '--images', cut], 'no .npz file'),
        ([f'{net}:net', '--images', tmp_path / 'none.npz'], 'no file'),
        ([f'{net}:net', '--images', net], 'no .npz file'),
        ([f'{net}:net', *common, '--eps', 0.3, '--folder', folder], 'belongs to another'),
        ([f'{net}:net', *common, '--bounds', 0, 0.5], 'within bounds'),
        ([f'{net}:net', *common, '--p', 3], 'p must be'),
        (['gpt', *common], 'no pretrained model'),
        (['cnn', '--images', 0], 'at least 1'),
    ]:
        status, out, err = command(capsys, *args)
        assert status == 2 and match in err and len(err.strip().splitlines()) == 1, (args, err)


DATA_CLASS = """
from __future__ import annotations
from dataclasses import dataclass
from under_attack import make_net

@dataclass
class Net:
    scale: float

    def __call__(self, x):
        return self.scale * make_net()(x)

net = Net(1.0)
"""


def test_the_command_knows_models_of_one_name_apart(files, tmp_path, capsys):
    nets = [tmp_path / name / 'net.py' for name in 'ab']
    for net in nets:
        net.parent.mkdir()
        net.write_text(DATA_CLASS)
    common = '--images', files[1], '--size', 'quick', '--folder', tmp_path / 'out'
    status, out, err = command(capsys, *(f'{net}:net' for net in nets), *common)
    assert status == 2 and 'models of the same name in one folder' in err and not out
    status, out, err = command(capsys, f'{nets[0]}:net', *common, '--eps', 0.05)
    assert status == 0 and not err and 'white box' in out


def test_the_command_evaluates_saved_weights_on_test_images(tmp_path, capsys, offline):
    save_model(CNN(hidden=10).eval(), tmp_path / 'm.safetensors')
    args = tmp_path / 'm.safetensors', '--data', 'synthetic', '--images', 4, '--size', 'quick'
    status, out, err = command(capsys, *args, '--p', 2, '--eps', 0.5)
    assert status == 0 and not err and 'the first 4 test images of synthetic' in out
    assert 'dry run' in out and 'l2' in out


def test_the_command_evaluates_several_models_in_several_norms(files, tmp_path, capsys):
    (file, npz), folder = files, tmp_path / 'out'
    args = f'{file}:net', f'{file}:other', '--images', npz, '--p', 2, 'inf'
    args = *args, '--size', 'quick', '--folder', folder
    other = claimed([folder / 'net.py-net-l2' / 'parts' / 'chunk-0000.safetensors'])
    next(other)  # it is left for the end

    def release():
        while not (folder / 'net.py-other-linf' / 'evaluation.json').exists():
            time.sleep(0.01)
        other.close()

    threading.Thread(target=release, daemon=True).start()
    status, out, err = command(capsys, *args)
    assert status == 0 and not err and out.count('clean accuracy') == 4
    found = sorted(path.name for path in folder.iterdir())
    assert found == ['net.py-net-l2', 'net.py-net-linf', 'net.py-other-l2', 'net.py-other-linf']
    for name, model, p in zip(found, 2 * [NET] + 2 * [make_net(5.0)], 2 * [2, math.inf]):
        report = Evaluation.load(folder / name)
        assert report.robust.equals(quick(model, X, Y, p=p).robust)
    ends = [out.rindex(f'{file}:{name}: 12 images') for name in ('net', 'other')]
    assert ends[0] > ends[1]


class NoisyNet(nn.Module):
    "Logits with noise"

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)
        torch.manual_seed(0)
        nn.init.normal_(self.net.weight)
        self.eval()

    def forward(self, x):
        return self.net(x) + 0.1 * torch.randn(len(x), 3)


def test_a_larger_l1_ball_holds_worse_points_of_a_random_model():
    "At the decision boundary half of the answers are right; the ball reaches farther"
    net, x = NoisyNet(), torch.rand(12, 6, generator=torch.Generator().manual_seed(0))
    report = quick(net, x, net.net(x).argmax(1), p=1, eps=(0.01, 6))
    near, far = rates(report, 'one-shot')
    assert near > 0.9 and far < near - 0.3, report


def test_bounds_of_each_image_reach_the_checks(checks):
    low, high = torch.zeros_like(X), torch.ones_like(X)
    assert quick(NET, X, Y, bounds=(low, high)).warnings == quick(NET, X, Y).warnings


def test_the_checks_take_half_precision(checks):
    net = nn.Linear(6, 3).half().eval()
    x = torch.rand(8, 6).half()
    report = quick(net, x, net(x).argmax(1))
    assert 'undefined_gradient' not in [caution.name for caution in report.warnings]


def test_saving_leaves_nothing_of_an_evaluation_before(tmp_path):
    quick(NET, X, Y).save(tmp_path)
    net, x = NoisyNet(), torch.rand(6, 6)
    quick(net, x, net.net(x).argmax(1)).save(tmp_path)
    found = Evaluation.load(tmp_path)
    assert found.settings['model'] == 'NoisyNet' and found.result is None and found.distance is None


class Stateful(nn.Linear):
    "Its state holds more than tensors, and an attribute is called as a method of ours"

    fixed = True

    def get_extra_state(self):
        return dict(version=1)

    def set_extra_state(self, state):
        pass


def test_what_a_state_holds_and_attributes_are_called_is_free():
    net, x = Stateful(6, 3).eval(), torch.rand(6, 6)
    assert quick(net, x, net(x).argmax(1)).clean.rate == 1


def test_batch_norm_in_training_mode_cannot_take_one_image():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.rand(8, 6)
    y = net.eval()(x).argmax(1)
    with pytest.raises(ValueError, match='cannot take images .* when training'):
        quick(net.train(), x, y)


def test_close_radii_are_two():
    assert len(quick(NET, X, Y, eps=[0.0313725, 8 / 255]).table()) == 2


def test_two_batches_are_no_pair():
    same(quick(NET, [(X[:6], Y[:6]), (X[6:], Y[6:])]), quick(NET, X, Y))
    with pytest.raises(ValueError, match=r'found 3 parts'):
        quick(NET, [(X, Y, Y)])


def test_no_batch_is_larger_than_the_model_takes(checks):
    assert quick(AtMost(NET, 4), X, Y).warnings == quick(NET, X, Y).warnings


def test_more_steps_help_is_told_of_cnn_at_in_l2(checks, fashion):
    "There the smallest size leaves far too many images"
    net = load_pretrained('cnn_at', device='cpu')
    report = quick(net, *fashion.test.first(100), p=2, eps=1)
    assert 'more_steps_help' in [caution.name for caution in report.warnings]


def test_a_gradient_that_was_mended_is_no_other_name_for_the_same_results(tmp_path):
    masked = Behind(lambda x: NET(x.detach()) + 0 * x.sum())
    mended = Behind(lambda x: NET(x))
    quick(masked, X, Y, eps=0.1, folder=tmp_path)
    with pytest.raises(ValueError, match='of other gradients: name another folder'):
        quick(mended, X, Y, eps=0.1, folder=tmp_path)
    settings = json.loads((tmp_path / 'settings.json').read_text())
    del settings['gradients']  # as older files lack it
    (tmp_path / 'settings.json').write_text(json.dumps(settings))
    quick(masked, X, Y, eps=0.1, folder=tmp_path)


def test_functions_that_share_a_masked_class_are_told_apart(tmp_path):
    def masked(x, scale):
        logits = NET(scale * x)
        return torch.cat([logits, torch.full_like(logits[:, :1], -1e9)], 1)

    quick(Behind(partial(masked, scale=1)), X, Y, eps=0.1, folder=tmp_path)
    with pytest.raises(ValueError, match='of other answers'):
        quick(Behind(partial(masked, scale=0.5)), X, Y, eps=0.1, folder=tmp_path)


def test_files_of_the_same_name_have_helpers_of_their_own(tmp_path, capsys):
    x = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / 'images.npz', x=x.numpy(), y=x.flatten(1)[:, :2].argmax(1).numpy())
    for folder, sign in (('old', ''), ('new', '-')):
        (tmp_path / folder).mkdir()
        text = f'def net(x):\n    return {sign}x.flatten(1)[:, :2]\n'
        (tmp_path / folder / 'arch.py').write_text(text)
        (tmp_path / folder / 'net.py').write_text('from arch import net\n')
    models = [f'{tmp_path}/{folder}/net.py:net' for folder in ('old', 'new')]
    how = '--images', tmp_path / 'images.npz', '--eps', 0.01, '--size', 'quick'
    status, out, _ = command(capsys, *models, *how)
    assert status == 0 and re.findall(r'clean accuracy ([\d.]+)%', out) == ['100.0', '0.0']
    assert 'arch' not in sys.modules


def test_bounds_of_each_pixel_may_be_arrays():
    x = images()
    bounds = np.zeros((1, 8, 8), np.float32), np.ones((1, 8, 8), np.float32)
    how = dict(size='quick', checks=False, progress=False)
    found = evaluate(NET, x, NET(x).argmax(1), bounds=bounds, **how)
    expected = evaluate(NET, x, NET(x).argmax(1), **how)
    assert torch.equal(found.distance, expected.distance)
