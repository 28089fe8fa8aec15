"The command, as a user runs it."
import os, signal, subprocess, sys, time

import pytest
import torch

from genrobust import data, results
from genrobust.models import BayesClassifier, load_tensors
from genrobust.results import Preset, reproduce

def genrobust(*args, **kw):
    "A process of its own, on one thread"
    command = [sys.executable, '-c', 'import sys; from genrobust.cli import main; sys.exit(main())', *map(str, args)]
    return subprocess.Popen(command, env=dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

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

@pytest.mark.parametrize('args, message', [
    (['train', 'gfx'], 'no factorisation'), (['reproduce', '--preset', 'huge'], 'invalid choice'), (['attack'], 'invalid choice'), (['reproduce', '--data', 'mnist'], 'no weights'),
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
    monkeypatch.setattr(results, '_stand_in', lambda name, *_: BayesClassifier(name, n_samples=2).eval())
    said = []
    folder = reproduce(Preset(clean=30, attacked=4, seeds=2, draws=2), out=tmp_path/'out', root=tmp_path, device='cpu', say=said.append)
    assert 'synthetic' in said[0] and 'no network' in said[0]
    assert sorted(p.name for p in folder.iterdir())==['accuracy.csv', 'examples.png', 'images.csv', 'seconds.csv', 'settings.json', 'tables.md']
    titles = [line for line in (folder/'tables.md').read_text().splitlines() if line.startswith('**')]
    assert len(titles)==4 and all('synthetic' in title for title in titles)
