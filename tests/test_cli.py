"The command, as a user runs it."

import inspect
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastcore.docments import docments
from processes import Command, two_commands
from under_attack import every_attack

from genrobust import attacks, cli, data, study
from genrobust.attacks import AttackResult, random_noise
from genrobust.data import Splits
from genrobust.models import CNN, BayesClassifier, digest, load_tensors, save_model, save_tensors
from genrobust.results import Preset, reproduce
from genrobust.training import fit


def start(*command, **kw):
    "A process on one thread, among whose commands are those of this Python"
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    return subprocess.Popen(
        [str(arg) for arg in command],
        env=dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg', PATH=path),
        **dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) | kw,
    )


COMMON = '--data synthetic --device cpu --no-progress'.split()
SIZES = '--n-train 500 --n-valid 100 --n-clean 50'.split()


@pytest.fixture
def few(drawn):
    "The first drawn images of each part"
    return Splits(*[part.first(200) for part in drawn])


@pytest.fixture(scope='module')
def trained(drawn):
    "A small model that knows the drawn images"
    clf = CNN(hidden=50)
    fit(
        clf,
        drawn.train.first(1500),
        drawn.valid.first(100),
        epochs=4,
        lr=3e-3,
        batch_size=50,
        device='cpu',
        progress=False,
    )
    return clf


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *args):
    "Status, standard output and error of a command in this process"
    status = cli.main([str(arg) for arg in args])
    return status, *capsys.readouterr()


def refused(capsys, message, *args):
    "One line and status 2"
    status, _, errors = run(capsys, *args)
    assert status == 2 and errors.startswith('genrobust: error: ') and errors.count('\n') == 1, (
        errors
    )
    assert message in errors


def save_result(path):
    "Of an attack that succeeds on two images"
    result = random_noise(CNN(hidden=9).eval(), torch.zeros(2, 1, 28, 28), eps=1.0)
    result.success[:] = True
    result.save(path)


def test_a_killed_run_ends_in_the_same_weights(tmp_path, few):
    def train(out):
        options = 'train gfz --images 20 --batch-size 5 --epochs 6 --out'.split()
        return Command(*options, out, *COMMON, splits=few)

    straight = train(tmp_path / 'straight.safetensors')
    killed = train(tmp_path / 'killed.safetensors')
    checkpoint = tmp_path / 'killed.checkpoint'
    while not checkpoint.exists() and killed.is_alive():
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert len(load_tensors(checkpoint)[1]['history']) < 6
    assert not (tmp_path / 'killed.safetensors').exists()
    again = train(tmp_path / 'killed.safetensors')
    for process in (straight, again):
        errors = process.communicate()[1]
        assert process.exitcode == 0, errors
    for suffix in ('checkpoint', 'safetensors'):
        a, b = (load_tensors(tmp_path / f'{name}.{suffix}') for name in ('straight', 'killed'))
        assert a[1] == b[1]
        assert a[0].keys() == b[0].keys()
        assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def test_two_processes_train_what_one_trains(tmp_path, few):
    """As torchrun starts them (gloo), and where two go on in one folder by themselves; what is
    there is neither trained nor written again"""
    args = [*'train cnn cnn_at --seed 0 1 --images 200 --epochs 1'.split(), *COMMON]
    two = two_commands(*args, '--folder', tmp_path / 'two', splits=few)
    one = Command(*args, '--folder', tmp_path / 'one', splits=few)
    for process, said in zip((*two, one), (4, 0, 4)):
        out, errors = process.communicate()
        assert process.exitcode == 0 and out.count('after 1 epochs') == said, errors or out
    names = ['cnn', 'cnn-1', 'cnn_at', 'cnn_at-1']
    for folder in ('one', 'two'):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == sorted(
            f'{n}.{s}' for n in names for s in ('checkpoint', 'checkpoint.previous', 'safetensors')
        )
    for name in names:
        (a, about), (b, also) = (
            load_tensors(tmp_path / folder / f'{name}.safetensors') for folder in ('one', 'two')
        )
        assert about == also and all(torch.equal(a[k], b[k]) for k in a)
    files = set((tmp_path / 'one').iterdir())
    gone = {path for path in files if '-1.' in path.name}
    kept = {path: path.stat().st_mtime_ns for path in files - gone}
    weights = {path: path.read_bytes() for path in gone if path.suffix == '.safetensors'}
    for path in gone:
        path.unlink()
    for process in [Command(*args, '--folder', tmp_path / 'one', splits=few) for _ in range(2)]:
        assert process.communicate()[0].count('after 1 epochs') == 4 and process.exitcode == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {path: path.read_bytes() for path in weights} == weights


def test_a_name_says_how_a_model_is_trained(tmp_path, drawn, monkeypatch, capsys):
    "Adversary, data and learning rate; what is given on the command line goes before"
    asked = []
    monkeypatch.setattr(cli, 'load', lambda name, root: asked.append(name) or drawn)
    names = ['gfz_at', 'cnn_at_l2', 'cnn_noise50', 'gfz_mnist']
    short = ['--images', '20', '--epochs', '1', '--no-progress', '--device', 'cpu']
    status, *_ = run(capsys, 'train', *names, *short, '--folder', str(tmp_path))
    assert status == 0 and asked == ['fashion_mnist', 'mnist']
    told = {name: load_tensors(tmp_path / f'{name}.safetensors')[1]['info'] for name in names}
    ends = ['loss=margin, n_samples=1', 'p=2, eps=1.5', 'sigma=0.5']
    assert all(told[name]['adversary'].endswith(end) for name, end in zip(names, ends))
    assert told['gfz_mnist']['lr'] == 1e-4 and told['gfz_mnist']['data'] == 'mnist'
    other = ['--data', 'synthetic', '--lr', '0.01', '--folder', str(tmp_path / 'other')]
    assert run(capsys, 'train', 'cnn_mnist', *short, *other)[0] == 0
    info = load_tensors(tmp_path / 'other' / 'cnn_mnist.safetensors')[1]['info']
    assert (info['data'], info['lr']) == ('synthetic', 0.01)


def test_a_corrupt_archive_is_not_replaced_by_synthetic_images(tmp_path, capsys):
    raw = tmp_path / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    (raw / 'train-images-idx3-ubyte.gz').write_bytes(b'cut short')
    command = ['reproduce', '--root', tmp_path, '--out', tmp_path / 'out', '--device', 'cpu']
    refused(capsys, 'corrupt or truncated', *command)


def test_without_fashion_mnist_everything_is_synthetic_and_says_so(tmp_path, trained, monkeypatch):
    def offline(*args, **kw):
        raise OSError('no network')

    monkeypatch.setattr(data, 'download_url', offline)
    clf = deepcopy(trained).requires_grad_(False)
    monkeypatch.setattr(study, '_train_briefly', lambda *_: clf)
    said = []
    folder = reproduce(
        Preset(train=500, valid=60, test=30, attacked=4, seeds=2, draws=2),
        out=tmp_path / 'out',
        models=['dfz', 'cnn'],
        root=tmp_path,
        device='cpu',
        say=said.append,
    )
    assert 'synthetic' in said[0] and 'no network' in said[0]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*study.FILES, 'stages'])
    titles = re.findall(r'^\*\*.*', (folder / 'tables.md').read_text(), re.M)
    assert len(titles) == 5 and all('synthetic' in title for title in titles)


def test_detectors_judge_what_was_made_for_them(here, offline, capsys):
    torch.manual_seed(0)
    save_model(CNN().eval(), 'mine.safetensors')
    made = '--data synthetic --device cpu --images 30 --eps 1 --out noise.safetensors'
    status, *said = run(capsys, 'attack', 'fgsm', '--model', 'mine.safetensors', *made.split())
    assert status == 0 and Path('noise.safetensors').exists(), said
    for args, message in [
        (['--model', 'gfz', '--data', 'synthetic'], 'was made with --model'),
        (['--model', 'mine.safetensors'], 'was made with --data synthetic'),
    ]:
        refused(capsys, message, 'detect', '--result', 'noise.safetensors', *args)


def test_one_training_that_fails_does_not_stop_the_others(here, offline, capsys):
    Path('cnn.checkpoint').write_bytes(b'cut short')
    options = '--data synthetic --device cpu --images 20 --epochs 1 --no-progress --folder .'
    status, out, errors = run(capsys, 'train', 'cnn', 'dbx', *options.split())
    assert status == 2 and 'corrupt or truncated' in errors
    assert 'DBX after 1 epochs' in out and Path('dbx.safetensors').exists()


def test_a_study_killed_or_spread_over_processes_ends_in_the_same_numbers(tmp_path, fashion):
    args = 'reproduce --preset quick --models cnn --attacks FGS Truncated-DeepFool --device cpu'.split()
    few = Splits(*[part.first(500) for part in fashion])  # all that it looks at
    killed = Command(*args, '--out', tmp_path / 'killed', splits=few)
    while len(list(tmp_path.glob('killed/stages/*.safetensors'))) < 5 and killed.is_alive():
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / 'killed/tables.md').exists()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob('killed/stages/*.safetensors')}
    command = ['torchrun', '--standalone', '--no-python', '--nproc-per-node', '2', 'genrobust']
    spread = start(*command, *args, '--out', tmp_path / 'spread')
    again, straight = (
        Command(*args, '--out', tmp_path / folder, splits=few) for folder in ('killed', 'straight')
    )
    for process in (again, straight, spread):
        out, errors = process.communicate()
        assert out.count('Written to') == 1, errors or out
    assert again.exitcode == straight.exitcode == spread.returncode == 0
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items())
    for file in ('images', 'clean', 'detectors'):
        first, *others = (
            (tmp_path / folder / f'{file}.csv').read_text()
            for folder in ('straight', 'killed', 'spread')
        )
        assert first.count('\n') > 1 and others == [first, first], file
    assert (
        len(list(tmp_path.glob('straight/stages/*')))
        == len(list(tmp_path.glob('spread/stages/*')))
        == 4 + 2 * 5
    )


@every_attack
def test_every_attack_is_on_the_command_line_with_all_its_parameters(attack, capsys):
    parameters = dict(list(inspect.signature(attack).parameters.items())[3:])
    given = cli._given(
        cli._parser().parse_args(
            ['attack', attack.__name__, '--model', 'gfz', '--out', 'x.safetensors', '--no-progress']
        ),
        attack,
    )
    assert given == {k: parameters[k].default for k in given}
    assert all(
        k in ('bounds', 'allow_training', 'logits_of')
        or parameters[k].annotation in (torch.Tensor, torch.Tensor | None)
        for k in parameters
        if k not in given
    )
    with pytest.raises(SystemExit):
        cli.main(['attack', attack.__name__, '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert ' '.join(attack.__doc__.split()) in text
    for name in given:
        if name != 'progress':
            assert ' '.join(docments(attack)[name].split()) in text, name


@pytest.fixture
def small(tmp_path, offline):
    "Attacks on drawn images and small models: `small(name, *options)` gives the result and its table"

    def attack(name, model, *args):
        save_model(model, tmp_path / 'model.safetensors')
        files = '--model', tmp_path / 'model.safetensors', '--out', tmp_path / 'new/a.safetensors'
        assert cli.main([str(arg) for arg in ('attack', name, *files, *COMMON, *args)]) == 0
        table, result = sorted((tmp_path / 'new').iterdir())
        assert (table.name, result.name) == ('a.csv', 'a.safetensors')
        return AttackResult.load(result), pd.read_csv(table)

    return attack


def test_an_attack_is_that_of_the_library(small, drawn, capsys):
    model = BayesClassifier('GFZ', hidden=50, n_samples=2).eval()
    options = '--images 60 --steps 3 --p inf --eps .02 --no-random-start --seed 7 --batch-size 16'
    result, frame = small('pgd', model, *options.split(), '--draws', 4)
    clf = cli.load_pretrained(result.settings['model'], 'cpu')
    how = dict(steps=3, eps=0.02, random_start=False, seed=7, batch_size=16)
    expected = attacks.pgd(clf, drawn.test.x[:60], drawn.test.y[:60], **how)
    assert torch.equal(result.x_adv, expected.x_adv)
    assert expected.settings.items() <= result.settings.items()
    assert torch.equal(torch.tensor(frame.success), expected.success)
    assert frame.image.tolist() == list(range(60))
    attacked = frame[~frame.initially_wrong]
    assert attacked.share.isin([0, 0.25, 0.5, 0.75, 1]).all()
    assert frame[frame.initially_wrong].share.isna().all()
    assert (frame.worst | ~frame.majority).all()
    out = capsys.readouterr().out
    for text in (
        'a dry run',
        f'{len(attacked)} of 60 images',
        f'{attacked.success.mean():.1%} [',
        f'{attacked.share.mean():.1%} [',
        'mean of 4 draws',
        'a.safetensors, ',
    ):
        assert text in out, (text, out)


def test_images_of_the_target_are_left_out_and_no_noise_needs_no_draws(small, drawn):
    result, frame = small('fgsm', CNN().eval(), '--images', 30, '--target', 3)
    assert frame.image.tolist() == (drawn.test.y[:30] != 3).nonzero().flatten().tolist()
    assert (result.target == 3).all() and 'share' not in frame and 'target' in frame


def test_every_class_in_turn(small, drawn):
    result, _ = small('fgsm', CNN().eval(), '--images', 8, '--one-vs-all')
    assert result.settings['attack'] == 'one_vs_all(fgsm)' and result.target is None


def test_no_image_left_is_an_error(small, drawn, here, capsys):
    target = drawn.test.y[0].item()
    one = f'attack fgsm --model gfz --images 1 --target {target} --out a.safetensors'.split()
    refused(capsys, 'no image is left', *one, *COMMON)
    assert not list(here.iterdir())


def test_nothing_to_attack_is_no_error(small, drawn, capsys):
    wrong = CNN().eval()
    with torch.no_grad():
        list(wrong.parameters())[-1].copy_(1e4 * torch.eye(10)[(drawn.test.y[0] + 1) % 10])
    assert small('deepfool', wrong, '--images', 1)[1].initially_wrong.all()
    assert 'attacked        0 of 1' in capsys.readouterr().out
    assert cli._rate(pd.Series([], dtype=float)) == '-'


def test_an_interrupted_attack_writes_nothing(tmp_path, few):
    options = '--data synthetic --images 200 --batch-size 2 --device cpu --model gfz'
    out = tmp_path / 'a.safetensors'
    process = Command('attack', 'deepfool', *options.split(), '--out', out, splits=few)
    assert 'deepfool on GFZ' in process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate()[1] == 'genrobust: interrupted\n' and process.exitcode == 130
    assert not list(tmp_path.iterdir())


def test_detect_knows_a_model_by_its_weights(here, offline, trained, capsys):
    "Not by its path: however that is spelled, and whatever lies there now"
    save_model(trained, 'm.safetensors')
    (here / 'other').mkdir()
    shutil.copy('m.safetensors', 'other/copy.safetensors')
    os.symlink('m.safetensors', 'link.safetensors')
    attack = 'attack random_noise --model m.safetensors --eps 0.5 --images 20 --out a.safetensors'
    assert run(capsys, *attack.split(), *COMMON)[0] == 0
    result = AttackResult.load('a.safetensors')
    weights = cli.load_pretrained('m.safetensors', 'cpu').state_dict()
    assert result.settings['weights'] == digest(weights)

    def command(model, result='a.safetensors'):
        return ['detect', '--model', model, '--result', result, *SIZES, *COMMON]

    for name in ('m', './m', here / 'm', 'other/copy', 'link'):
        assert run(capsys, *command(f'{name}.safetensors'))[0] == 0, name
    del result.settings['weights']
    result.save('old.safetensors')
    assert run(capsys, *command('m.safetensors', 'old.safetensors'))[0] == 0
    refused(capsys, 'was made with --model', *command('./m.safetensors', 'old.safetensors'))
    save_model(CNN(hidden=50, seed=1), 'm.safetensors')
    refused(capsys, 'was made with --model m.safetensors', *command('m.safetensors'))
    assert run(capsys, *command('other/copy.safetensors'))[0] == 0


class Read(Exception):
    "Data were asked for: all checks that come before have passed"


@pytest.fixture
def unread(monkeypatch):
    "No data: whoever asks for them raises `Read`"

    def load(*args):
        raise Read

    monkeypatch.setattr(cli, 'load', load)


@pytest.mark.parametrize('data', ['mnist', 'kmnist', 'fashion_mnist'])
def test_weights_are_for_the_data_they_were_trained_on(data, here, unread, capsys):
    for name, info in dict(mine=dict(data=data), unknown={}).items():
        save_model(CNN(hidden=9), f'{name}.safetensors', **info)
    others = [name for name in ('mnist', 'kmnist', 'fashion_mnist') if name != data]
    for attack in ('fgsm', 'zoo'):

        def command(model, name, attack=attack):
            return f'attack {attack} --model {model} --data {name} --out a.safetensors'.split()

        for other in others:
            refused(capsys, f'not for {other}', *command('mine.safetensors', other))
        for model, name in (('mine', data), ('mine', 'synthetic'), ('unknown', data)):
            with pytest.raises(Read):
                run(capsys, *command(f'{model}.safetensors', name))
        refused(capsys, 'no data set', *command('mine.safetensors', 'imagenet'))
        if data != 'fashion_mnist':
            refused(capsys, f'not for {data}', *command('gfz', data))


def something(kind, path):
    "Put something at a path that no command may replace"
    if kind == 'text':
        path.write_text('mine')
    elif kind == 'nothing':
        path.touch()
    elif kind == 'detector':
        save_tensors(path, dict(mean=torch.zeros(1)), detector='kl')
    elif kind == 'model':
        save_model(CNN(hidden=9), path)
    elif kind == 'link to the model':
        path.symlink_to('m.safetensors')
    elif kind == 'link to the result':
        path.symlink_to('r.safetensors')
    elif kind == 'pipe':
        os.mkfifo(path)


@pytest.mark.parametrize(
    'kind',
    ['text', 'nothing', 'detector', 'model', 'link to the model', 'link to the result', 'pipe'],
)
@pytest.mark.parametrize(
    'command, out',
    [
        (['train', 'cnn'], 'x.safetensors'),
        (['train', 'gfz', '--dropout', '.1'], 'x.safetensors'),
        (['attack', 'fgsm', '--model', 'm.safetensors'], 'x.safetensors'),
        (['attack', 'deepfool', '--model', './m.safetensors', '--one-vs-all'], 'x.csv'),
        (['detect', '--model', 'm.safetensors', '--result', 'r.safetensors'], 'x.csv'),
    ],
)
def test_what_stands_at_out_is_not_replaced_by_something_else(
    kind, command, out, here, unread, capsys
):
    if kind == 'link to the result' and command[0] == 'attack' and out == 'x.safetensors':
        pytest.skip('an attack replaces results')
    save_model(CNN(hidden=9), 'm.safetensors')
    save_result('r.safetensors')
    something(kind, here / out)

    def standing():
        return {path.name: path.is_file() and path.read_bytes() for path in here.iterdir()}

    before = standing()
    asked = 'x.csv' if command[0] == 'detect' else 'x.safetensors'
    given = [*command, *COMMON, '--out', asked]
    refused(capsys, 'something else already', *given)
    assert standing() == before
    (here / out).unlink()
    with pytest.raises(Read):
        run(capsys, *given)


@pytest.mark.parametrize('command', [['train', 'cnn'], ['attack', 'fgsm', '--model', 'cnn']])
def test_out_that_cannot_be_written_is_found_out_first(command, here, unread, capsys):
    (here / 'folder.safetensors').mkdir()
    (here / 'file').touch()
    (here / 'away.safetensors').symlink_to('/proc/none/a.safetensors')
    for out, message in [
        ('folder.safetensors', 'a folder'),
        ('file/x.safetensors', 'cannot write'),
        ('/proc/new/x.safetensors', 'cannot write'),
        ('away.safetensors', 'cannot write'),
        ('z' * 244 + '.safetensors', '256 bytes'),
        ('é' * 122 + '.safetensors', '256 bytes'),
        ('new/' + 'z' * 256 + '/x.safetensors', '256 bytes'),
        ('x.txt', '.safetensors'),
        ('', '.safetensors'),
    ]:
        refused(capsys, message, *command, '--data', 'synthetic', '--out', out)
    assert len(list(here.iterdir())) == 3


@pytest.mark.parametrize('out', ['z' * 243 + '.safetensors', 'new/' + 'é' * 121 + '.safetensors'])
def test_a_name_of_255_bytes_is_written(out, here, offline, capsys):
    common = [*COMMON, '--images', 20]
    assert run(capsys, 'train', 'cnn', '--epochs', 1, '--out', out, *common)[0] == 0
    shutil.move(out, 'm.safetensors')
    assert run(capsys, 'attack', 'fgsm', '--model', 'm.safetensors', '--out', out, *common)[0] == 0
    assert {path.suffix for path in (here / out).parent.iterdir() if len(path.name) > 100} == {
        '.safetensors',
        '.checkpoint',
        '.csv',
    }


HUGE = str(10**30)


@pytest.mark.parametrize(
    'command',
    [
        ['train', 'cnn'],
        ['train', 'dbx', 'cnn_at'],
        ['attack', 'fgsm', '--model', 'cnn', '--out', 'a.safetensors'],
        ['attack', 'zoo', '--model', 'cnn', '--out', 'a.safetensors', '--one-vs-all'],
        ['detect', '--model', 'cnn', '--result', 'r.safetensors'],
    ],
    ids=' '.join,
)
def test_numbers_that_make_no_sense_are_one_error_before_any_work(command, here, unread, capsys):
    save_result('r.safetensors')
    options = dict(
        train=f"""--seed={HUGE} --seed={2**62} --seed=-1 --images=0 --images=-1 --images={10**9}
            --images={HUGE} --images=1e3 --epochs=0 --epochs={HUGE} --batch-size=0
            --batch-size={HUGE} --lr=nan --lr=inf --lr=1e999 --lr=-1 --patience=0 --dropout=nan
            --dropout=1 --warmup={HUGE} --warmup=-1 --scarce=10 --scarce={'9' * 5000}""",
        attack=f"""--seed={HUGE} --seed={2**63} --images=0 --images=-1 --images={10**9}
            --images={HUGE} --draws=-1 --draws={HUGE} --batch-size=0 --batch-size={HUGE}""",
        detect=f"""--seed={HUGE} --seed={2**63} --fpr=nan --fpr=0 --fpr=1 --fpr=inf --fpr=1e-320
            --n-train=0 --n-train={HUGE} --n-valid=0 --n-valid=-5 --n-clean=0 --n-clean={HUGE}""",
    )
    own = dict(
        fgsm=f' --eps=nan --eps=inf --eps=-1 --target=10 --target=-1 --target={HUGE}',
        zoo=f' --lr=nan --max-queries=0 --max-queries={HUGE} --c=nan --target=1',
    )
    for option in (options[command[0]] + own.get(command[1], '')).split():
        name = option.partition('=')[0].strip('-').split('-')[-1]
        refused(capsys, name, *command, '--data', 'synthetic', option)
    assert [path.name for path in here.iterdir()] == ['r.safetensors']
    with pytest.raises(Read):
        run(capsys, *command, '--data', 'synthetic', '--seed', 2**46)


@pytest.mark.skipif(sys.platform == 'darwin', reason='its file names are UTF-8')
def test_names_that_no_encoding_holds(here, offline, trained, monkeypatch):
    "Bytes that are not UTF-8, newlines, bars and letters that ASCII lacks: files are written, and told on one line each"
    folder = os.fsdecode(b'b\xffd|\n\xc3\xa9')
    model, result = f'{folder}/m.safetensors', f'{folder}/a.safetensors'
    commands = [
        [*'train cnn --images 20 --epochs 1 --out'.split(), f'{folder}/cnn.safetensors'],
        [*'attack random_noise --eps .5 --images 20 --model'.split(), model, '--out', result],
        ['detect', '--model', model, '--result', result, *SIZES],
    ]
    save_model(trained, model)
    for encoding in ('ascii', 'utf-8', 'latin-1'):
        said = io.BytesIO()
        monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(said, encoding=encoding))
        assert [cli.main([*command, *COMMON]) for command in commands] == [0, 0, 0]
        lines = said.getvalue().decode(encoding).splitlines()
        assert len([line for line in lines if 'b\\udcffd|\\n' in line]) == 3
        assert not any(line.startswith(('é', '\\xe9')) for line in lines)
    assert {path.suffix for path in Path(folder).iterdir()} >= {
        '.safetensors',
        '.checkpoint',
        '.csv',
    }


def test_an_error_is_one_line_whatever_is_in_it(unread, capsys):
    refused(
        capsys, 'a\\nb', 'attack', 'fgsm', '--model', 'a\nb.safetensors', '--out', 'x.safetensors'
    )
    refused(capsys, '\\udcff', 'train', os.fsdecode(b'\xff'))
    refused(capsys, '\\x1b', 'detect', '--model', 'cnn', '--result', '\x1b[2J')


@pytest.mark.parametrize(
    'error, message',
    [
        (MemoryError(), 'out of memory'),
        (torch.cuda.OutOfMemoryError('CUDA out of memory.\nTried'), 'out of memory'),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 'smaller batch'),
        (RuntimeError('value cannot be converted to type float without overflow'), 'too large'),
    ],
    ids=repr,
)
def test_memory_that_runs_out_is_no_traceback(error, message, monkeypatch, capsys, here):
    def load(*args):
        raise error

    monkeypatch.setattr(cli, 'load', load)
    for command in (
        ['train', 'cnn'],
        ['attack', 'pgd', '--model', 'cnn', '--out', 'a.safetensors'],
    ):
        refused(capsys, message, *command, '--data', 'synthetic')


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch, here):
    def load(*args):
        raise RuntimeError('a bug')

    monkeypatch.setattr(cli, 'load', load)
    with pytest.raises(RuntimeError, match='a bug'):
        cli.main(['train', 'cnn', '--data', 'synthetic'])


@pytest.mark.parametrize('command', ['train', 'attack', 'detect'])
def test_a_write_that_fails_names_its_file(command, here, offline, trained, capsys):
    "As on a full disk, here by a limit on the size of files"
    save_model(trained, 'm.safetensors')
    attack = 'attack random_noise --eps .5 --images 20 --model m.safetensors --out'.split()
    detect = 'detect --model m.safetensors --result a.safetensors --out full.csv'.split()
    assert run(capsys, *attack, 'a.safetensors', *COMMON)[0] == 0
    given, out = dict(
        train=(
            'train cnn --images 20 --epochs 1 --out full.safetensors'.split(),
            'full.checkpoint',
        ),
        attack=([*attack, 'full.safetensors'], 'full.safetensors'),
        detect=([*detect, *SIZES], 'full.csv'),
    )[command]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        refused(capsys, out, *given, *COMMON)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(here.glob('full*'))


def test_closed_full_and_broken_streams_are_no_traceback(tmp_path):
    "Standard output or error that is closed, full, or whose reader has gone, with and without a buffer"
    data = '--data synthetic --no-progress'
    train = f'train cnn --images 20 --epochs 1 {data} --folder'.split()
    attack = f'attack fgsm --model cnn --images 3 --draws 0 {data} --out'.split()
    # Python closes what it has opened: no fork does; of the images it draws twenty, not 70,000
    code = """import sys
from genrobust import cli, data
few = data.synthetic(20)
cli.load, cli.class_names = lambda *_: data.Splits(few, few, few), lambda name: []
sys.exit(cli.main())"""

    def start(args, redirections='', unbuffered='', **kw):
        run = f'exec "$@" {redirections}'
        command = ['sh', '-c', run, 'sh', sys.executable, '-c', code, *map(str, args)]
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED=unbuffered)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return subprocess.Popen(command, env=env, text=True, **pipes | kw)

    gone, write = os.pipe()
    os.close(gone)
    silent = [
        start(args, unbuffered=unbuffered, stdout=write)
        for unbuffered, args in (
            ('', ['attack', 'zoo', '--help']),
            ('1', [*train, tmp_path / 'trained']),
            ('', [*attack, tmp_path / 'attacked.safetensors']),
            ('1', [*attack, tmp_path / 'unbuffered.safetensors']),
        )
    ]
    for process in silent:
        assert process.communicate()[1] == '' and process.returncode in (0, 141), process.args
    os.close(write)
    nonsense, quiet = ['train', 'nonsense'], '>&- 2>&-'
    closed = {
        (redirections, *args): start(args, redirections)
        for redirections, args in (
            ('>&-', nonsense),
            (quiet, nonsense),
            ('>&-', [*attack, tmp_path / 'out.safetensors']),
            ('2>&-', [*attack, tmp_path / 'err.safetensors']),
            (f'<&- {quiet}', [*attack, tmp_path / 'all.safetensors']),
        )
    }
    for (redirections, *args), process in closed.items():
        out, errors = process.communicate()
        assert process.returncode == (2 if 'nonsense' in args else 0), (redirections, args, errors)
        is_said = 'nonsense' in args and '2>' not in redirections
        assert errors.count('genrobust: error: no model') == is_said
        assert 'Traceback' not in errors
    assert {'out', 'err', 'all'} <= {p.stem for p in tmp_path.glob('*.safetensors')}
    if sys.platform != 'linux':
        return  # there is no /dev/full
    full = [
        start(args, '> /dev/full')
        for args in (['--help'], [*attack, tmp_path / 'full.safetensors'])
    ]
    for process in full:
        errors = process.communicate()[1]
        assert (
            process.returncode == 2 and 'standard output' in errors and errors.count('\n') == 1
        ), errors


def test_every_way_to_start_it():
    ways = [
        ['genrobust'],
        [sys.executable, '-m', 'genrobust'],
        [sys.executable, '-m', 'genrobust.cli'],
    ]
    versions = [start(*way, '--version') for way in ways]
    refusals = [start(*way, 'train', 'nonsense') for way in ways]
    spread = start(
        *'torchrun --standalone --nproc-per-node 2 -m genrobust.cli train nonsense'.split()
    )
    for process in versions:
        assert process.communicate()[0] == f'genrobust {cli.__version__}\n'
        assert process.returncode == 0
    for process in refusals:
        assert process.communicate()[0].startswith('genrobust: error: no model')
        assert process.returncode == 2
    assert 'genrobust: error: no model' in spread.communicate()[0] and spread.returncode != 0


def test_no_command_opens_a_window(monkeypatch):
    "A backend that only a notebook has, inherited from it"
    monkeypatch.setenv('MPLBACKEND', 'module://not_here.backend_inline')
    monkeypatch.setattr(sys, 'argv', ['genrobust', 'train', 'nonsense'])
    assert cli.main() == 2 and os.environ['MPLBACKEND'] == 'agg'


def test_help_waits_for_no_plot_and_no_table():
    "What draws, tabulates, downloads or fits is imported where it is used"
    heavy = 'IPython matplotlib pandas scipy seaborn sklearn sympy torchvision'.split()
    code = 'import sys; from genrobust import cli; cli._parser(); print(*sys.modules, sep="\\n")'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert {'genrobust.data', 'genrobust.results', 'genrobust.statistics'} <= set(modules)
    assert not set(heavy) & set(modules)
