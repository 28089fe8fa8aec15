"Files: written whole or not at all, refused when they changed, and cleaned up after."

import errno
import json
import math
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save

from genrobust import files
from genrobust.data import Images, synthetic
from genrobust.files import (
    beside,
    claimed,
    digest,
    grow_rows,
    load_tensors,
    read_rows,
    save_tensors,
    writable,
    write_rows,
    write_whole,
)
from genrobust.models import (
    CNN,
    BayesClassifier,
    load_models,
    load_pretrained,
    pretrained_names,
    save_model,
    seeded,
)
from genrobust.training import fit

NUMBERS = dict(
    x=torch.arange(6.0).view(2, 3),
    half=torch.ones(3).half(),
    bf=torch.ones(2).bfloat16(),
    yes=torch.tensor(True),
    none=torch.empty(0, 4),
    whole=torch.arange(3),
)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def with_byte(content, place, value):
    return content[:place] + bytes([value]) + content[place + 1 :]


def start(code, folder):
    "A Python process in a folder, which prints a line as soon as it is ready"
    process = subprocess.Popen(
        [sys.executable, '-u', '-c', code], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline()
    return process


SLOW_WRITE = """
import os, time
from genrobust import files
def wait(_):
    print('writing')
    time.sleep(60)
files.os.fsync = wait
files.write_whole('a.txt', 'new')
"""

# Tensors


def test_tensors_of_every_kind_come_back(tmp_path):
    shared = torch.rand(3)
    kinds = dict(
        NUMBERS,
        transposed=torch.rand(2, 3).T,
        last=torch.rand(1, 2, 3, 3).to(memory_format=torch.channels_last),
        a=shared,
        b=shared,
        weight=torch.nn.Parameter(torch.rand(2)),
        bytes=torch.rand(4).to(torch.float8_e4m3fn),
    )
    save_tensors(tmp_path / 'a', kinds, digest='of something else', metadata=[1], path_='p')
    again, metadata = load_tensors(tmp_path / 'a')
    assert list(again) == sorted(kinds)
    assert metadata == dict(digest='of something else', metadata=[1], path_='p')
    for name, value in kinds.items():
        assert again[name].dtype == value.dtype and again[name].shape == value.shape
        assert torch.equal(
            again[name].view(-1).view(torch.uint8),
            value.detach().contiguous().view(-1).view(torch.uint8),
        )
    again['x'].add_(1)


def test_every_changed_byte_is_noticed(tmp_path):
    "Each byte of a file, with one bit, all bits and to white space"
    save_tensors(
        tmp_path / 'a',
        {**NUMBERS, '0' * 32: torch.ones(1)},
        accuracy=0.9143,
        nested=dict(threshold=[1, 2.5]),
    )
    whole = (tmp_path / 'a').read_bytes()
    load_tensors(tmp_path / 'a')
    for place, byte in enumerate(whole):
        for value in {byte ^ 1, byte ^ 255, 9, 32} - {byte}:
            (tmp_path / 'a').write_bytes(with_byte(whole, place, value))
            with pytest.raises(ValueError, match='corrupt or truncated'):
                load_tensors(tmp_path / 'a')
    for content in (whole[:-1], whole + b'0', whole[1:], b''):
        (tmp_path / 'a').write_bytes(content)
        with pytest.raises(ValueError, match='corrupt or truncated'):
            load_tensors(tmp_path / 'a')


def test_the_same_content_gives_the_same_bytes(tmp_path):
    "Whatever the order it was given in; a hash table of the library orders several metadata at random"
    for n in range(20):
        order = (lambda items: dict(reversed(items))) if n % 2 else dict
        tensors = order([('a', torch.ones(2)), ('b', torch.zeros(3))])
        metadata = order([('x', 1), ('y', order([('z', [2]), ('a', 0)]))])
        save_tensors(tmp_path / f'{n}', tensors, **metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_files_of_before_are_read_and_verified(tmp_path):
    old = save(NUMBERS, dict(genrobust=json.dumps(dict(accuracy=0.9)), digest=digest(NUMBERS)))
    (tmp_path / 'a').write_bytes(old)
    tensors, metadata = load_tensors(tmp_path / 'a')
    assert metadata == dict(accuracy=0.9) and digest(tensors) == digest(NUMBERS)
    (tmp_path / 'a').write_bytes(with_byte(old, len(old) - 1, old[-1] ^ 1))
    with pytest.raises(ValueError, match='corrupt or truncated'):
        load_tensors(tmp_path / 'a')
    assert all(load_pretrained(name, 'cpu').info for name in pretrained_names())


def test_a_digest_is_what_it_was():
    assert (
        digest(dict(a=torch.arange(3.0), b=torch.tensor(True)))
        == '5ec7c31e8779544a1b31513ba983886b'
    )


RIGHT = digest(NUMBERS)
HOSTILE = '[' * 10_000 + ']' * 10_000, '{"a":' * 10_000 + '1' + '}' * 10_000, '9' * 5000
HOSTILE += '{', '', '3', '[]', 'null', '"text"'
HOSTILE = [dict(genrobust=text, **about) for text in HOSTILE for about in ({}, dict(digest=RIGHT))]
HOSTILE += [
    dict(genrobust=text)
    for text in (
        '{"digest": 1, "metadata": {}}',
        '{"digest": "", "metadata": {}}',
        '{"metadata": {}}',
        '{"digest": null}',
        f'{{"digest": "{RIGHT}"}}',
    )
]
HOSTILE += [dict(genrobust='{}', digest='?'), dict(digest=RIGHT), {}, None]


@pytest.mark.parametrize('texts', HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_metadata_are_one_error(texts, tmp_path):
    file, few = tmp_path / 'a.safetensors', synthetic(20)
    file.write_bytes(save(NUMBERS, texts))
    for load in (load_tensors, load_pretrained):
        with pytest.raises(ValueError, match='a.safetensors'):
            load(file)
    with pytest.raises(ValueError, match='a.safetensors'):
        fit(CNN(hidden=20), few, few, epochs=1, checkpoint=file, device='cpu', progress=False)


def test_a_header_that_is_no_text_is_one_error(tmp_path):
    whole = save(dict(x=torch.ones(1)), dict(genrobust='{"a": "bcd"}'))
    (tmp_path / 'a').write_bytes(whole.replace(b'bcd', b'\xff\xfe\xff'))
    with pytest.raises(ValueError, match='corrupt or truncated'):
        load_tensors(tmp_path / 'a')


# Models, from files whose digest is right

CNN_STATE = CNN(hidden=20).state_dict()
CONFIGS = [
    None,
    [],
    'cnn',
    {},
    dict(name=['cnn']),
    dict(name='gpt'),
    dict(name='cnn'),
    dict(name='cnn', hidden=[20]),
    dict(name='cnn', hidden='20'),
    dict(name='cnn', hidden=10**9),
    dict(name='cnn', hidden=10**30),
    dict(name='cnn', hidden=-20),
    dict(name='cnn', hidden=20, n_classes=10**9),
    dict(name='cnn', hidden=20, dropout=[0.1]),
    dict(name='cnn', hidden=20, dropout=2),
    dict(name='cnn', hidden=20, colour='red'),
    dict(name='cnn', hidden=20, seed=-1),
    dict(name='gfz', hidden=20, latent=10**9),
]


@pytest.mark.parametrize('config', CONFIGS, ids=range(len(CONFIGS)))
def test_a_model_of_another_configuration_is_one_error(config, tmp_path):
    save_tensors(tmp_path / 'a.safetensors', CNN_STATE, config=config, info={})
    with pytest.raises(ValueError, match='a.safetensors does not hold a model'):
        load_pretrained(tmp_path / 'a.safetensors', 'cpu')


def test_a_model_without_what_belongs_to_it_is_one_error(tmp_path):
    config = dict(name='cnn', hidden=20)
    for metadata in (
        dict(config=config),
        dict(info={}),
        {},
        dict(config=config, info=[1]),
        dict(config=config, info=None),
    ):
        save_tensors(tmp_path / 'a.safetensors', CNN_STATE, **metadata)
        with pytest.raises(ValueError, match='a.safetensors does not hold a model'):
            load_pretrained(tmp_path / 'a.safetensors', 'cpu')
    for state in ({}, dict(list(CNN_STATE.items())[1:]), {**CNN_STATE, 'more': torch.ones(1)}):
        save_tensors(tmp_path / 'a.safetensors', state, config=config, info={})
        with pytest.raises(ValueError, match='a.safetensors does not hold a model'):
            load_pretrained(tmp_path / 'a.safetensors', 'cpu')
    save_tensors(
        tmp_path / 'a.safetensors',
        BayesClassifier('DFX', hidden=20).state_dict(),
        config=dict(name='dfx', hidden=20, n_samples=[1]),
        info={},
    )
    with pytest.raises(ValueError, match='n_samples'):
        load_pretrained(tmp_path / 'a.safetensors', 'cpu')


@pytest.mark.parametrize('seed', [-1, 1.5, '1', None, 2**63, 10**30, [1], torch.nan])
def test_a_seed_is_a_whole_number(seed):
    few = Images(torch.zeros(1), torch.zeros(1))  # are not looked at
    with pytest.raises(ValueError, match='seed must be'):
        fit(CNN(hidden=20), few, few, seed=seed, progress=False)
    with pytest.raises(ValueError, match='seed must be'), seeded(seed):
        pass
    with pytest.raises(ValueError, match='seed must be'):
        CNN(hidden=20, seed=seed)


def test_the_largest_seeds_train():
    few = synthetic(20)
    fit(CNN(hidden=20), few, few, epochs=1, seed=92233720368547, device='cpu', progress=False)
    with pytest.raises(ValueError, match='seed must be'):
        fit(CNN(hidden=20), few, few, epochs=1, seed=92233720368548, device='cpu', progress=False)


# Writing


def test_a_kill_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path):
    write_whole(tmp_path / 'a.txt', 'old')
    killed = start(SLOW_WRITE, tmp_path)
    assert len(names(tmp_path)) == 2
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert (tmp_path / 'a.txt').read_text() == 'old' and len(names(tmp_path)) == 2
    write_whole(tmp_path / 'b.txt', 'another')
    assert len(names(tmp_path)) == 3, 'only the leavings of its own file'
    write_whole(tmp_path / 'a.txt', 'new')
    assert names(tmp_path) == ['a.txt', 'b.txt']


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    writer = start(SLOW_WRITE, tmp_path)
    (temporary,) = tmp_path.iterdir()
    write_whole(tmp_path / 'a.txt', 'ours')
    assert temporary.exists() and (tmp_path / 'a.txt').read_text() == 'ours'
    writer.kill()
    writer.communicate()


def test_without_locks_nothing_is_removed_and_all_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, '_lock', lambda file: False)
    left = tmp_path / f'a.txt.{"0" * 16}.tmp'
    left.touch()
    write_whole(tmp_path / 'a.txt', 'new')
    assert names(tmp_path) == ['a.txt', left.name]


def test_files_of_the_user_are_no_leavings(tmp_path):
    mine = [
        'a.txt.tmp',
        'a.txt.backup.tmp',
        'a.txt.0123456789abcdef',
        'b.txt.0123456789abcdef.tmp',
        'a.txt.0123456789ABCDEF.tmp',
        'axtxt.0123456789abcdef.tmp',
    ]
    for name in mine:
        (tmp_path / name).touch()
    write_whole(tmp_path / 'a.txt', '')
    assert names(tmp_path) == sorted([*mine, 'a.txt'])
    write_whole(tmp_path / '[a]*.txt', '')
    (tmp_path / '[a]*.txt.0123456789abcdef.tmp').touch()
    write_whole(tmp_path / '[a]*.txt', '')
    assert names(tmp_path) == sorted([*mine, 'a.txt', '[a]*.txt'])


def test_a_write_reaches_the_disk_before_the_rename(tmp_path, monkeypatch):
    "The order in which file, name and folder are forced to the disk"
    order = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        order.append('folder' if stat.S_ISDIR(os.fstat(descriptor).st_mode) else 'file')
        fsync(descriptor)

    def note_replace(*paths):
        order.append('rename')
        replace(*paths)

    monkeypatch.setattr(files.os, 'fsync', note_fsync)
    monkeypatch.setattr(files.os, 'replace', note_replace)
    write_whole(tmp_path / 'a.txt', 'new')
    assert order == ['file', 'rename', 'folder']


def test_links_are_followed_and_permissions_kept(tmp_path):
    (tmp_path / 'there').mkdir()
    (tmp_path / 'link').symlink_to('there/a.txt')
    mask = os.umask(0o027)
    try:
        write_whole(tmp_path / 'link', 'first')
        assert stat.S_IMODE((tmp_path / 'there/a.txt').stat().st_mode) == 0o640
    finally:
        os.umask(mask)
    for mode in (0o600, 0o444, 0o755):
        (tmp_path / 'there/a.txt').chmod(mode)
        write_whole(tmp_path / 'link', 'again')
        assert stat.S_IMODE((tmp_path / 'there/a.txt').stat().st_mode) == mode
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'there/a.txt').read_text() == 'again'
    assert names(tmp_path / 'there') == ['a.txt'] and names(tmp_path) == ['link', 'there']


@pytest.mark.parametrize(
    'name',
    ['z' * 255, 'ä' * 127, 'z' * 100, 'z' * 101, '.hidden', ' ', 'a\nb'],
    ids=lambda name: name[:3] + str(len(name)),
)
def test_every_name_that_fits_works(name, tmp_path):
    for content in ('one', 'two'):
        write_whole(tmp_path / name, content)
    assert names(tmp_path) == [name] and (tmp_path / name).read_text() == 'two'
    assert len({beside(tmp_path / n, '.previous').name for n in (name, name[:-1] + 'y')}) == 2


@pytest.mark.skipif(sys.platform == 'darwin', reason='its file names are UTF-8')
def test_names_and_texts_that_are_no_utf_8_work(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b'/\xff'))
    assert writable(folder) == folder
    save_model(CNN(hidden=20), folder / 'a.safetensors', said=str(folder))
    assert load_pretrained(folder / 'a.safetensors', 'cpu').info['said'] == str(folder)
    write_whole(folder / 'a.csv', f'{folder},1')
    assert (folder / 'a.csv').read_text().endswith('\\udcff,1')


def test_an_error_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    write_whole(tmp_path / 'a', 'old')
    with monkeypatch.context() as patched:
        patched.setattr(files.os, 'fsync', full)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/a'") as raised:
            write_whole(tmp_path / 'a', 'new')
    assert raised.value.errno == errno.ENOSPC
    assert (tmp_path / 'a').read_text() == 'old'
    assert names(tmp_path) == ['a']
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        write_whole(tmp_path, '')
    with pytest.raises(OSError, match=f'{tmp_path}/a/b'):
        write_whole(tmp_path / 'a' / 'b', '')
    with pytest.raises(OSError, match=f'cannot write to the folder {tmp_path}/a'):
        writable(tmp_path / 'a')


@pytest.mark.parametrize('name', ['NA', 'nan', 'null', 'None'])
def test_a_model_that_is_called_as_pandas_calls_nothing_is_found_again(name, tmp_path):
    rows = write_rows(tmp_path / 'rows.csv', [dict(model=name, share=math.nan)])
    pd.testing.assert_frame_equal(read_rows(tmp_path / 'rows.csv', model=name), rows)


def test_a_device_stays_one():
    write_whole('/dev/null', 'nothing')
    assert stat.S_ISCHR(os.stat('/dev/null').st_mode)
    if sys.platform == 'linux':
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            write_whole('/dev/full', 'something')


# Claims


def make_all(paths):
    "What a process does that shares the work; each file says who made it"
    for path in claimed(paths):
        if not path.exists():
            time.sleep(0.02)
            write_whole(path, f'{path.name} {os.getpid()}')


def start_process(paths):
    child = os.fork()
    if not child:
        make_all(paths)
        os._exit(0)
    return child


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='starts processes by fork')
def test_of_four_processes_one_is_killed_twenty_times_and_nothing_is_missing(tmp_path):
    paths, rng = [tmp_path / f'{n:03}' for n in range(600)], random.Random(0)
    running = [start_process(paths) for _ in range(4)]
    for kills in range(20):
        while sum(path.exists() for path in paths) < 4 * kills:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        killed = running.pop(rng.randrange(4))
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        running.append(start_process(paths))
    assert not all(path.exists() for path in paths)  # they were killed at work
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in running] == 4 * [0]
    texts = [path.read_text().split() for path in paths]
    assert [name for name, _ in texts] == [path.name for path in paths]
    assert len({process for _, process in texts}) > 3
    assert not list(tmp_path.glob('*.lock'))


def test_a_claimed_file_is_skipped_or_waited_for(tmp_path):
    a, b = tmp_path / 'a', tmp_path / 'b'
    first = claimed([a, b])
    assert next(first) == a
    assert list(claimed([a, b], wait=False)) == [b]  # each claim ends where the next begins
    assert next(first) == b and list(claimed([b], wait=False)) == []
    first.close()
    assert list(claimed([a, b])) == [a, b] and not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='locks are of another kind')
def test_a_lock_that_was_removed_is_no_claim(tmp_path):
    "A holds; B waits; A leaves, and removes the lock; B has it, and C may not"
    path, has, leave = tmp_path / 'x', threading.Event(), threading.Event()

    def wait():
        for _ in claimed([path]):
            has.set()
            leave.wait()

    first = claimed([path])
    next(first)
    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.2)  # B waits by now; were it late, this would test less, not fail
    first.close()
    assert has.wait(10) and list(claimed([path], wait=False)) == []
    leave.set()
    waiting.join()
    assert list(claimed([path], wait=False)) == [path] and list(tmp_path.iterdir()) == []


def test_two_processes_that_grow_one_table_lose_no_row(tmp_path):
    file, seen, others = tmp_path / 'rows.csv', [], []

    def rows_of(first, stop):
        seen.append(first)
        if not others:  # another begins while this one is at work
            others.append(threading.Thread(target=grow, args=(20,)))
            others[0].start()
            time.sleep(0.2)
        return dict(n=range(first, stop))

    def grow(images):
        grow_rows(file, images, 5, rows_of, say=lambda text: None)

    grow(10)
    others[0].join()
    assert list(pd.read_csv(file).n) == list(range(20)) and seen == [0, 5, 10, 15]


def test_a_model_is_for_its_data_set_and_has_a_name_of_its_own(tmp_path):
    clf = CNN(hidden=20)
    save_model(clf, tmp_path / 'a.safetensors', data='mnist')
    for data in (None, 'mnist', 'synthetic'):
        load_pretrained(tmp_path / 'a.safetensors', 'cpu', data)
    with pytest.raises(ValueError, match='not for fashion_mnist: they were trained on mnist'):
        load_pretrained(tmp_path / 'a.safetensors', 'cpu', 'fashion_mnist')
    bayes = BayesClassifier('GFZ', hidden=20, latent=4)
    for n in (2, 3):
        (tmp_path / str(n)).mkdir()
        bayes.n_samples = n
        save_model(bayes, tmp_path / str(n) / 'm.safetensors')
        assert load_pretrained(tmp_path / str(n) / 'm.safetensors', 'cpu').n_samples == n
    with pytest.raises(ValueError, match='two models of the same weights are called m-'):
        load_models([tmp_path / str(n) / 'm.safetensors' for n in (2, 3)])
    with pytest.raises(ValueError, match='n_samples'):
        bayes.n_samples = 0


def test_weights_beyond_float16_are_not_saved_as_infinite(tmp_path):
    clf = CNN(hidden=20)
    next(clf.parameters()).data.flatten()[0] = 1e5
    with pytest.raises(ValueError, match='too large for float16'):
        save_model(clf, tmp_path / 'a.safetensors')
    assert not list(tmp_path.iterdir())
