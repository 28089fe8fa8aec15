"The command, as a user runs it."
import inspect, os, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastcore.docments import docments

from genrobust import attacks, cli, data, results
from genrobust.attacks import AttackResult
from genrobust.data import Images
from genrobust.models import CNN, BayesClassifier, load_tensors, save_model
from genrobust.results import Preset, reproduce
from genrobust.training import fit

def genrobust(*args, **kw):
    "A process of its own, on one thread"
    command = [sys.executable, '-c', 'import sys; from genrobust.cli import main; sys.exit(main())', *map(str, args)]
    return subprocess.Popen(command, env=dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def torchrun(*args):
    "Two processes"
    env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg', PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    return subprocess.Popen(['torchrun', '--standalone', '--no-python', '--nproc-per-node', '2', 'genrobust', *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def train(out, epochs, *args): return genrobust('train', 'gfz', '--data', 'synthetic', '--images', 300, '--epochs', epochs, '--no-progress', '--out', out, *args)

def test_a_killed_run_ends_in_the_same_weights(tmp_path):
    straight = train(tmp_path/'straight.safetensors', 3)
    killed = train(tmp_path/'killed.safetensors', 3)
    checkpoint = tmp_path/'killed.checkpoint'
    while not checkpoint.exists() and killed.poll() is None: time.sleep(.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(load_tensors(checkpoint)[1]['history'])<3
    assert not (tmp_path/'killed.safetensors').exists()
    again = train(tmp_path/'killed.safetensors', 3)
    for process in (straight, again):
        errors = process.communicate()[1]
        assert process.returncode==0, errors
    for suffix in ('checkpoint', 'safetensors'):
        a, b = (load_tensors(tmp_path/f'{name}.{suffix}') for name in ('straight', 'killed'))
        assert a[1]==b[1] and a[0].keys()==b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])

def test_two_processes_train_what_one_trains(tmp_path):
    "torchrun shares models and seeds out (gloo); done again, nothing is trained or written"
    args = ['train', 'cnn', 'cnn_at', '--seed', '0', '1', '--data', 'synthetic', '--images', '200', '--epochs', '1', '--no-progress']
    spread = torchrun(*args, '--folder', tmp_path/'two')
    alone = genrobust(*args, '--folder', tmp_path/'one')
    for process in (spread, alone):
        out = process.communicate()[0]
        assert process.returncode==0 and out.count('after 1 epochs')==4, out
    names = ['cnn', 'cnn-1', 'cnn_at', 'cnn_at-1']
    for folder in ('one', 'two'): assert sorted(p.name for p in (tmp_path/folder).iterdir())==sorted(f'{n}.{s}' for n in names for s in ('checkpoint', 'checkpoint.previous', 'safetensors'))
    for name in names:
        (a, about), (b, also) = (load_tensors(tmp_path/folder/f'{name}.safetensors') for folder in ('one', 'two'))
        assert about==also and all(torch.equal(a[k], b[k]) for k in a)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'one').iterdir()}
    again = genrobust(*args, '--folder', tmp_path/'one')
    assert again.communicate()[0].count('after 1 epochs')==4 and again.returncode==0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/'one').iterdir()}==before

@pytest.mark.parametrize('args, message', [
    (['train', 'gfx'], 'no model'), (['reproduce', '--preset', 'huge'], 'invalid choice'), (['attack'], 'required'), (['attack', 'fgsm', '--model', 'gfz', '--out', 'new/x.safetensors', '--eps', '-1'], 'eps must be'), (['reproduce', '--data', 'mnist'], 'no weights'),
    (['train', 'gfz', '--data', 'imagenet'], 'no data set'), (['train', 'gfz', '--images', '0'], 'at least 1'), (['reproduce', '--device', 'meta'], 'cannot be used'), (['reproduce', '--out', '/dev/null/results'], 'Not a directory'), (['train', 'cnn', '--lr', '-1', '--data', 'synthetic'], 'lr > 0')])
def test_bad_input_is_one_line_and_status_2(args, message, tmp_path):
    process = genrobust(*args, cwd=tmp_path)
    out, errors = process.communicate()
    assert process.returncode==2 and message in errors and 'Traceback' not in errors
    assert len([line for line in errors.splitlines() if 'error:' in line])==1
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]

def test_a_corrupt_archive_is_not_replaced_by_synthetic_images(tmp_path):
    raw = tmp_path/'FashionMNIST'/'raw'
    raw.mkdir(parents=True)
    (raw/'train-images-idx3-ubyte.gz').write_bytes(b'cut short')
    process = genrobust('reproduce', '--root', tmp_path, '--out', tmp_path/'out')
    assert 'corrupt or truncated' in process.communicate()[1] and process.returncode==2

def test_without_fashion_mnist_everything_is_synthetic_and_says_so(tmp_path, monkeypatch):
    def offline(*args, **kw): raise OSError('no network')
    monkeypatch.setattr(data, 'download_url', offline)
    images = data.load('synthetic')
    clf = CNN(hidden=50)
    fit(clf, Images(*[v[:1500] for v in images.train]), Images(*[v[:200] for v in images.valid]), epochs=4, lr=3e-3, batch_size=50, device='cpu', progress=False)
    monkeypatch.setattr(results, '_stand_in', lambda *_: clf.requires_grad_(False))
    said = []
    folder = reproduce(Preset(train=500, valid=60, test=30, attacked=4, seeds=2, draws=2), out=tmp_path/'out', models=['dfz', 'cnn'], root=tmp_path, device='cpu', say=said.append)
    assert 'synthetic' in said[0] and 'no network' in said[0]
    assert sorted(p.name for p in folder.iterdir())==['clean.csv', 'detectors.csv', 'examples.png', 'images.csv', 'seconds.csv', 'settings.json', 'stages', 'tables.md']
    titles = [line for line in (folder/'tables.md').read_text().splitlines() if line.startswith('**')]
    assert len(titles)==5 and all('synthetic' in title for title in titles)

def test_detectors_judge_what_was_made_for_them(tmp_path):
    save_model(CNN().eval(), tmp_path/'mine.safetensors')
    out = genrobust('attack', 'random_noise', '--model', tmp_path/'mine.safetensors', '--data', 'synthetic', '--images', '30', '--out', tmp_path/'noise.safetensors', '--eps', '1').communicate()
    assert (tmp_path/'noise.safetensors').exists(), out
    for args, message in [(['--model', 'gfz', '--data', 'synthetic'], 'was made with --model'), (['--model', tmp_path/'mine.safetensors'], 'was made with --data synthetic')]:
        process = genrobust('detect', '--result', tmp_path/'noise.safetensors', *args)
        assert message in process.communicate()[1] and process.returncode==2

def test_one_training_that_fails_does_not_stop_the_others(tmp_path):
    (tmp_path/'cnn.checkpoint').write_bytes(b'cut short')
    process = genrobust('train', 'cnn', 'dbx', '--data', 'synthetic', '--images', '100', '--epochs', '1', '--no-progress', '--folder', tmp_path)
    out, errors = process.communicate()
    assert process.returncode==2 and 'corrupt or truncated' in errors and 'DBX after 1 epochs' in out and (tmp_path/'dbx.safetensors').exists()

def test_a_study_killed_or_spread_over_processes_ends_in_the_same_numbers(tmp_path, fashion):
    args = ['reproduce', '--preset', 'quick', '--models', 'cnn', '--attacks', 'FGS', 'Truncated-DeepFool', '--device', 'cpu']
    killed = genrobust(*args, '--out', tmp_path/'killed')
    while len(list(tmp_path.glob('killed/stages/*.safetensors')))<5 and killed.poll() is None: time.sleep(.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path/'killed/tables.md').exists()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob('killed/stages/*.safetensors')}
    spread = torchrun(*args, '--out', tmp_path/'spread')
    for process in (genrobust(*args, '--out', tmp_path/'killed'), genrobust(*args, '--out', tmp_path/'straight'), spread):
        out, errors = process.communicate()
        assert process.returncode==0 and out.count('Written to')==1, errors or out
    assert all(p.stat().st_mtime_ns==then for p,then in kept.items())
    for file in ('images', 'clean', 'detectors'):
        first, *others = ((tmp_path/folder/f'{file}.csv').read_text() for folder in ('straight', 'killed', 'spread'))
        assert first.count("\n")>1 and others==[first, first], file
    assert len(list(tmp_path.glob('straight/stages/*')))==len(list(tmp_path.glob('spread/stages/*')))==4+2*5

ATTACKS = [f for f in vars(attacks).values() if inspect.isfunction(f) and list(inspect.signature(f).parameters)[:3]==['model', 'x', 'y']]

@pytest.mark.parametrize('attack', ATTACKS, ids=lambda f: f.__name__)
def test_every_attack_is_on_the_command_line_with_all_its_parameters(attack, capsys):
    parameters = dict(list(inspect.signature(attack).parameters.items())[3:])
    given = cli._given(cli._parser().parse_args(['attack', attack.__name__, '--model', 'gfz', '--out', 'x.safetensors', '--no-progress']), attack)
    assert given=={k: parameters[k].default for k in given}
    assert all(k in ('bounds', 'allow_training') or parameters[k].annotation in (torch.Tensor, torch.Tensor|None) for k in parameters if k not in given)
    with pytest.raises(SystemExit): cli.main(['attack', attack.__name__, '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert ' '.join(attack.__doc__.split()) in text
    for name in given:
        if name!='progress': assert ' '.join(docments(attack)[name].split()) in text, name

@pytest.fixture
def small(tmp_path, drawn, monkeypatch):
    "Attacks on drawn images and small models: `small(name, *options)` gives the result and its table"
    monkeypatch.setattr(cli, 'load', lambda name, root: drawn)
    def attack(name, model, *args):
        save_model(model, tmp_path/'model.safetensors')
        command = ['attack', name, '--model', tmp_path/'model.safetensors', '--data', 'synthetic', '--out', tmp_path/'new'/'a.safetensors', '--device', 'cpu', '--no-progress', *args]
        assert cli.main([str(arg) for arg in command])==0
        assert sorted(p.name for p in (tmp_path/'new').iterdir())==['a.csv', 'a.safetensors']
        return AttackResult.load(tmp_path/'new'/'a.safetensors'), pd.read_csv(tmp_path/'new'/'a.csv')
    return attack

def test_an_attack_is_that_of_the_library(small, drawn, capsys):
    model = BayesClassifier('GFZ', hidden=50, n_samples=2).eval()
    result, frame = small('pgd', model, '--images', 60, '--steps', 3, '--p', 'inf', '--eps', '.02', '--no-random-start', '--seed', 7, '--draws', 4, '--batch-size', 16)
    expected = attacks.pgd(cli.load_pretrained(result.settings['model'], 'cpu'), drawn.test.x[:60], drawn.test.y[:60], steps=3, eps=.02, random_start=False, seed=7, batch_size=16)
    assert torch.equal(result.x_adv, expected.x_adv) and expected.settings.items() <= result.settings.items()
    assert torch.equal(torch.tensor(frame.success), expected.success) and frame.image.tolist()==list(range(60))
    attacked = frame[~frame.initially_wrong]
    assert attacked.share.isin([0, .25, .5, .75, 1]).all() and frame[frame.initially_wrong].share.isna().all() and (frame.worst | ~frame.majority).all()
    out = capsys.readouterr().out
    for text in ('a dry run', f'{len(attacked)} of 60 images', f'{attacked.success.mean():.1%} [', f'{attacked.share.mean():.1%} [', 'mean of 4 draws', 'a.safetensors, '): assert text in out, (text, out)

def test_images_of_the_target_are_left_out_and_no_noise_needs_no_draws(small, drawn):
    result, frame = small('fgsm', CNN().eval(), '--images', 30, '--target', 3)
    assert frame.image.tolist()==(drawn.test.y[:30]!=3).nonzero().flatten().tolist()
    assert (result.target==3).all() and 'share' not in frame and 'target' in frame

def test_every_class_in_turn(small, drawn):
    result, _ = small('fgsm', CNN().eval(), '--images', 8, '--one-vs-all')
    assert result.settings['attack']=='one_vs_all(fgsm)' and result.target is None

def test_no_image_left_is_an_error(small, drawn, tmp_path, capsys):
    assert cli.main(['attack', 'fgsm', '--model', 'gfz', '--images', '1', '--target', str(drawn.test.y[0].item()), '--out', str(tmp_path/'a.safetensors')])==2
    assert 'no image is left' in capsys.readouterr().err and not list(tmp_path.iterdir())

def test_nothing_to_attack_is_no_error(small, drawn, capsys):
    wrong = CNN().eval()
    with torch.no_grad(): list(wrong.parameters())[-1].copy_(1e4*torch.eye(10)[(drawn.test.y[0]+1)%10])
    assert small('deepfool', wrong, '--images', 1)[1].initially_wrong.all()
    assert 'attacked        0 of 1' in capsys.readouterr().out

def test_an_interrupted_attack_writes_nothing(tmp_path):
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = genrobust('attack', 'deepfool', '--model', 'gfz', '--data', 'synthetic', '--images', 1000, '--batch-size', 2, '--device', 'cpu', '--out', tmp_path/'a.safetensors', preexec_fn=default)
    assert 'deepfool on GFZ' in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1]=='genrobust: interrupted\n' and process.returncode==130
    assert not list(tmp_path.iterdir())
