"Models, training, the study, benchmarks and the command line on a GPU, images on either device."

from functools import partial
from unittest.mock import patch

import pytest
import torch
from small import Plain, Prototypes, classifier, ready, some

from genrobust import bench, cli, numerics, study
from genrobust.adaptive import evasion_rate
from genrobust.attacks import fgsm
from genrobust.bench import (
    compare_paths,
    machine,
    measure_limits,
    product_rates,
    run_benchmark,
    time_calls,
)
from genrobust.data import Splits, load
from genrobust.detection import detect, fit_detectors
from genrobust.diagnosis import AttackCase, surrogate
from genrobust.evaluation import evaluate
from genrobust.evidence import _trial
from genrobust.models import FACTORISATIONS, Decoder, load_pretrained, predict, save_model
from genrobust.numerics import batch_for, no_tf32, seeded
from genrobust.smoothing import _counted
from genrobust.study import PRESETS, Preset, Stage, run
from genrobust.training import fit

NAMES = [*FACTORISATIONS, 'CNN']


@pytest.mark.parametrize('name', NAMES)
def test_methods_take_images_from_anywhere(name, home):
    "Of a model on the GPU; what they return lies where the images do"
    clf, (x, y) = ready(classifier(name)), some(3, home)
    found = [clf(x), clf.fixed(0)(x), clf.averaged(2)(x), clf.fresh()(x)]
    clf.loss(x, y).item()
    if name != 'CNN':
        found += [clf.elbo(x, y), clf.encode(x, y)]
        clf.log_terms(x), clf.fixed(1, n_samples=3).log_terms(x)
    if clf.has_density:
        found += [clf.reconstruct(x), clf.log_joint(x), clf.fixed(0).log_marginal(x)]
        for labels in (3, torch.arange(4), torch.arange(4).to(home)):
            assert clf.sample(labels, 2).shape[-1] == 28
    assert {v.device.type for v in found} == {home}


@pytest.mark.parametrize('name', ['GFZ', 'CNN'])
def test_an_evaluation(name, gpu):
    "Attacks, checks and scores; an untrained model's own labels on these latents, so that all is attacked"
    clf, (x, _) = ready(classifier(name)), some(4, 'cpu')
    with no_tf32():
        y = clf.fixed(0)(x).argmax(1)
    report = evaluate(clf, x, y, p=2, eps=0.5, size='quick', progress=False)
    assert report.result.attacked[0] and report.result.success.equal(report.result.attacked)
    assert report.distance.isfinite().all()
    assert report.result.x.device.type == 'cpu' and min(report.passes.values()) > 0
    assert not gpu.rounded


@pytest.mark.parametrize('name', NAMES)
def test_models_are_kept(name, tmp_path):
    clf = ready(classifier(name))
    save_model(clf, tmp_path / 'm.safetensors')
    again = load_pretrained(tmp_path / 'm.safetensors')
    assert {v.device.type for v in again.state_dict().values()} == {'cuda'}


HOW = dict(
    plainly={},
    amp=dict(amp=True),
    adversary=dict(adversary=partial(cli.pgd_start, steps=2)),
    adversary_amp=dict(adversary=partial(cli.pgd_start, steps=2), amp=True),
    warmup=dict(warmup=2),
)


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('name', ['GFZ', 'CNN'])
def test_training_goes_on_where_it_stopped(name, how, tmp_path):
    home = 'cuda' if 'amp' in how else 'cpu'
    parts, own = (some(80, home), some(40, home, 100)), dict(HOW[how], batch_size=40)
    if name == 'GFZ' and 'adversary' in own:
        pytest.skip('a Bayes classifier is not trained so here')
    models = [classifier(name) for _ in range(3)]
    fit(models[0], *parts, epochs=1, checkpoint=tmp_path / 'c', progress=False, **own)
    resumed = fit(models[1], *parts, epochs=2, checkpoint=tmp_path / 'c', progress=False, **own)
    assert fit(models[2], *parts, epochs=2, progress=False, **own) == resumed
    weights = [m.state_dict().values() for m in models[1:]]
    assert all(torch.equal(a, b) for a, b in zip(*weights))


@pytest.mark.parametrize('name', ['GFZ', 'CNN'])
def test_a_recorded_step_is_a_step(name, gpu):
    "Replayed as a CUDA graph, with all kinds of batches, it learns what it learns kernel by kernel"
    if not gpu.is_real:
        pytest.skip('a pretended GPU records no kernels')
    found = []
    for graphs in (True, False):
        model = classifier(name)
        how = dict(epochs=2, batch_size=30, warmup=1, graphs=graphs, progress=False)
        found.append(fit(model, some(200, 'cpu'), some(40, 'cpu', 100), **how))
    one, other = found
    assert [h['bound'] for h in one] == pytest.approx([h['bound'] for h in other], rel=0.01)


def test_seeded_is_for_the_gpu_too():
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded(3):
            drawn.append(torch.rand(3, device='cuda'))
    assert drawn[0].equal(drawn[1])
    assert all(map(torch.equal, before, (torch.get_rng_state(), torch.cuda.get_rng_state())))


def test_seeded_before_cuda_has_begun(monkeypatch):
    "Its generators are made by the first call that needs CUDA"
    ready_made = torch.cuda.default_generators
    monkeypatch.setattr(torch.cuda, 'default_generators', ())
    begin = lambda: monkeypatch.setattr(torch.cuda, 'default_generators', ready_made)  # noqa: E731
    monkeypatch.setattr(torch.cuda, '_lazy_init', begin)
    with seeded(3, 'cuda:0'):
        torch.rand(3, device='cuda:0')


def fitted(home):
    model = ready(Prototypes())
    return model, fit_detectors(model, some(120, home), some(80, home, 120)), some(4, home)


def evasion(home):
    model, detectors, images = fitted(home)
    evasion_rate(fgsm(model, *images), detectors['logit'], draws=2)


def detection(home):
    model, _, images = fitted(home)
    splits = Splits(some(120, home), some(80, home, 120), images)
    detect(model, {}, splits, n_train=120, n_valid=80, n_clean=4)


def certificates(home):
    numbers = torch.arange(2)
    about = dict(seed=0, sigma=0.25, n0=3, n=5)
    _counted(ready(classifier('GFZ')), *some(2, 'cpu'), numbers, about)


def learnt_surrogate(home):
    model, (x, _y) = ready(Plain()), some(4, home)
    result = fgsm(model, x)
    surrogate(AttackCase(model, result, 2, 1.0, size='quick'), hidden=5, steps=2)


def trial_with_detectors(home):
    splits = Splits(some(120, home), some(80, home, 120), some(4, home))
    _trial(ready(Prototypes()), splits, {}, True, p=2, eps=1.0, seed=0, size='quick')


def stage(home):
    Stage('GFZ', 'test', 0, 3).measure(ready(classifier('GFZ')), Splits(*[some(3, home)] * 3))


def training(home):
    fit(classifier('CNN'), some(40, home), some(40, home), 1, device='cuda:0', progress=False)


SEEDED = evasion, detection, certificates, learnt_surrogate, trial_with_detectors, stage, training


@pytest.mark.parametrize('work', SEEDED, ids=lambda work: work.__name__)
def test_the_card_of_the_work_is_seeded(work, home):
    "Not the current one, where a machine has several"
    seen, generators = set(), numerics._generators
    with patch.object(numerics, '_generators', lambda d: seen.add(d) or generators(d)):
        with patch.object(numerics, '_device_in_use', lambda: pytest.fail('no device is named')):
            work(home)
    assert torch.device('cuda:0') in seen


def test_work_on_the_cpu_starts_no_context(tmp_path):
    "Of a machine with a GPU that nobody has touched"
    from genrobust.attacks import deepfool, rescore

    def never(*args):
        raise AssertionError('a CUDA context is started')

    untouched = dict(is_initialized=lambda: False, default_generators=())
    untouched |= dict.fromkeys(('_lazy_init', 'get_rng_state', 'current_device'), never)
    with patch.multiple(torch.cuda, **untouched):
        clf, (x, _y) = classifier('GFZ').eval(), some(3, 'cpu')
        rescore(deepfool(clf, x, steps=2), clf, draws=2)
        fit(classifier('GFZ'), some(40, 'cpu'), some(40, 'cpu'), 1, device='cpu', progress=False)
        with seeded(3):
            torch.rand(3)


def test_batches_grow_with_memory(gpu):
    x = torch.rand(1, 1, 28, 28)
    assert batch_for(x, 256) == 256 and batch_for(x.to('cuda'), 256) == 2048
    assert 1 <= batch_for(torch.rand(1, 3, 512, 512).to('cuda'), 256) < 256


def test_the_decoder_takes_latents_in_parts():
    clf, x = ready(classifier('GFZ')).fixed(0), some(3, 'cpu').x
    whole = predict(clf, x)
    with patch.object(Decoder, 'chunk_on_gpu', 7):
        assert torch.allclose(predict(clf, x), whole, atol=1e-4)


def test_the_study(tmp_path, gpu):
    how = Preset(500, 60, 20, 2, carlini_wagner=1, zoo=1, apgd=1, seeds=1, draws=2)
    attacks = ['Noise', 'FGS', 'PGD', 'DeepFool', 'APGD, L2 1']
    run(how, tmp_path, ['cnn'], attacks, say=lambda text: None)
    assert machine()['device'] in (tmp_path / 'seconds.csv').read_text()
    assert not gpu.rounded, gpu.rounded


def test_the_quick_preset(tmp_path, gpu, monkeypatch):
    "As it is on the CNN; with fewer images on a Bayes classifier"
    run('quick', tmp_path / 'cnn', ['cnn'], ['FGS', 'DeepFool'], say=lambda text: None)
    monkeypatch.setattr(study, 'N_DIGITS', 3)
    few = PRESETS['quick']._replace(train=60, valid=20, test=5, attacked=1, seeds=1, draws=2)
    run(few, tmp_path / 'gfz', ['gfz'], ['FGS', 'DeepFool'], say=lambda text: None)
    assert not gpu.rounded, gpu.rounded


def test_benchmarks(gpu):
    assert gpu.is_real or machine()['device'] == 'a pretended GPU'
    time_calls(torch.add, lambda: (torch.ones(2, device='cuda'),) * 2, 2, 'cuda')
    found = compare_paths(load_pretrained('gfz').fixed(0), some(2, 'cpu').x, 1)
    assert found['clear'] == 0
    frame = run_benchmark('fgsm-cnn', load('synthetic').valid, rounds=1, n=2)
    assert 'error' not in frame or frame.error.isna().all()
    product_rates('cuda', size=64)
    assert not gpu.rounded, gpu.rounded
    with patch.object(bench, 'product_rates', lambda device: dict(matmul=1.0, convolution=1.0)):
        assert (measure_limits(('gfz',), n=2, batches=1).seconds > 0).all()


def command(*words):
    assert cli.main([str(word) for word in words]) in (0, None)


def test_the_command_line(tmp_path, capsys):
    own, model, result = ('--data', 'synthetic', '--no-progress'), tmp_path / 'm', tmp_path / 'r'
    model, result = model.with_suffix('.safetensors'), result.with_suffix('.safetensors')
    first, second = ('--images', 9, '--out', result), ('--images', 2, '--out', result, '--steps', 2)
    command('train', 'cnn', *own, '--images', 100, '--epochs', 1, '--out', model)
    command('attack', 'fgsm', '--model', model, *own, *first, '--device', 'cuda:0')
    command('attack', 'deepfool', '--model', 'gfz', *own, *second, '--draws', 2)
    command('attack', 'pgd', '--model', model, *own, *second, '--device', 'cpu')
    assert 'Traceback' not in capsys.readouterr().err


def test_the_command_detect(tmp_path, capsys):
    own, model = ('--data', 'synthetic', '--no-progress'), tmp_path / 'm.safetensors'
    result = tmp_path / 'r.safetensors'
    command('train', 'cnn', *own, '--images', 1000, '--epochs', 4, '--out', model)
    command('attack', 'fgsm', '--model', model, *own, '--images', 40, '--out', result, '--eps', 0.3)
    sizes = '--n-train', 500, '--n-valid', 40, '--n-clean', 40
    command('detect', '--model', model, *own, '--result', result, *sizes)
    assert 'evasion rate' in capsys.readouterr().out and (tmp_path / 'r.roc.csv').exists()


def test_the_command_evaluate(tmp_path, capsys):
    how = '--data', 'synthetic', '--images', 3, '--size', 'quick', '--p', 2, '--eps', 1
    command('evaluate', 'cnn', *how, '--folder', tmp_path / 'e')
    assert 'robust accuracy' in capsys.readouterr().out and list((tmp_path / 'e').iterdir())


def test_the_command_reproduce(tmp_path, capsys):
    few = dict(train=150, valid=20, test=5, attacked=2, seeds=1, draws=2)
    sizes = [word for name, n in few.items() for word in (f'--{name}', n)]
    names = '--models', 'cnn', '--attacks', 'FGS', 'DeepFool'
    command('reproduce', *sizes, *names, '--out', tmp_path, '--no-progress')
    assert (tmp_path / 'tables.md').exists(), capsys.readouterr()


def test_the_command_bench(tmp_path):
    given = '--benchmarks', 'fgsm-cnn,deepfool-gfz', '--rounds', 1, '--images', 2
    command('bench', *given, '--out', tmp_path)
    assert len(list(tmp_path.glob('benchmark-*.csv'))) == 2
