"Data sets: where they are found, what is accepted, and that a download ends."

import gzip
import pwd
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from platformdirs import user_cache_dir
from torchvision import datasets as torchvision

from genrobust import data
from genrobust.data import (
    DataError,
    DataUnavailable,
    class_names,
    data_root,
    load,
    load_or_synthetic,
)

NAMES = [name for name, _ in torchvision.FashionMNIST.resources]

DOWNLOAD = data.download_url


def offline(*args, **kw):
    raise OSError('no network')


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(data, 'download_url', offline)


@pytest.fixture(scope='session')
def archives(fashion):
    "The folder of the four archives of Fashion-MNIST"
    for folder in (data_root() / 'FashionMNIST/raw', data_root() / 'raw', data_root()):
        if (folder / NAMES[0]).exists():
            return folder
    pytest.skip('Fashion-MNIST is not here as archives')


def put(archives, folder, change=lambda content: content, suffix='.gz'):
    "The four files in another folder, changed, under names with another suffix"
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / (name.removesuffix('.gz') + suffix)).write_bytes(
            change((archives / name).read_bytes())
        )


def packed_anew(content):
    return gzip.compress(gzip.decompress(content), 1)


@pytest.mark.parametrize(
    'folder, change, suffix',
    [
        ('FashionMNIST/raw', bytes, '.gz'),
        ('raw', bytes, '.gz'),
        ('.', bytes, '.gz'),
        ('FashionMNIST/raw', gzip.decompress, ''),
        ('raw', gzip.decompress, ''),
        ('.', gzip.decompress, '.gz'),
        ('.', packed_anew, '.gz'),
        ('raw', packed_anew, ''),
    ],
)
def test_the_four_files_are_accepted_wherever_they_lie(
    folder, change, suffix, archives, fashion, tmp_path
):
    "The official archives, unpacked ones, ones packed by another program, with or without the suffix that they should have"
    put(archives, tmp_path / folder, change, suffix)
    before = sorted(tmp_path.rglob('*'))
    found = load('fashion_mnist', tmp_path)
    for part, expected in zip(found, fashion):
        assert torch.equal(part.x, expected.x) and torch.equal(part.y, expected.y)
    assert sorted(tmp_path.rglob('*')) == before


def test_the_images_are_those_that_torchvision_reads(archives, fashion, tmp_path):
    put(archives, tmp_path / 'FashionMNIST/raw', gzip.decompress, '')
    test = torchvision.FashionMNIST(tmp_path, train=False)
    assert torch.equal(fashion.test.x[:, 0], test.data / 255)
    assert torch.equal(fashion.test.y, test.targets)


def test_mnist_and_fashion_mnist_are_told_apart(archives, tmp_path):
    "They bear the same names: in a folder of one, the other is missing; in its own folder, it is wrong"
    put(archives, tmp_path)
    with pytest.raises(DataUnavailable, match='MNIST: .* could not be downloaded'):
        load('mnist', tmp_path)
    put(archives, tmp_path / 'MNIST/raw')
    with pytest.raises(DataError, match='MNIST/raw/.*corrupt or truncated'):
        load('mnist', tmp_path)


def test_mnist_is_read_where_it_is(mnist):
    assert [len(part.y) for part in mnist] == [50_000, 10_000, 10_000]
    assert class_names('mnist')[3] == '3 - three'
    assert mnist.test.y[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize(
    'damage',
    [
        lambda b: b[:1000],
        lambda b: b'',
        lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:],
        lambda b: b'cut short',
        lambda b: b[:-8] + bytes(8),
    ],
    ids=['cut', 'empty', 'flipped', 'text', 'check sum'],
)
@pytest.mark.parametrize('folder', ['FashionMNIST/raw', '.'])
def test_a_damaged_file_is_named(folder, damage, archives, tmp_path):
    put(archives, tmp_path / folder)
    file = tmp_path / folder / NAMES[3]
    file.write_bytes(damage(file.read_bytes()))
    for ask in (load, lambda name, root: load_or_synthetic(root)):
        with pytest.raises(DataError, match=f'{NAMES[3]} is corrupt or truncated') as raised:
            ask('fashion_mnist', tmp_path)
        assert not isinstance(raised.value, DataUnavailable)
    (tmp_path / folder / NAMES[3].removesuffix('.gz')).write_bytes(
        gzip.decompress((archives / NAMES[3]).read_bytes())
    )
    assert len(load('fashion_mnist', tmp_path).test.y) == 10_000, 'the right file beside it will do'


def test_what_the_message_says_helps(archives, tmp_path, monkeypatch):
    monkeypatch.setenv('GENROBUST_DATA', str(tmp_path / 'new'))
    with pytest.raises(DataUnavailable, match='no network.* the folder that holds them'):
        load()
    assert not list(tmp_path.iterdir())
    put(archives, tmp_path / 'new')
    assert len(load().test.y) == 10_000


def test_home_and_its_absence(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('GENROBUST_DATA', '~/data')
    assert data_root() == tmp_path / 'data'
    with pytest.raises(DataUnavailable, match=f'expected {tmp_path}/elsewhere/FashionMNIST/raw'):
        load(root='~/elsewhere', download=False)
    monkeypatch.delenv('GENROBUST_DATA')
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    assert data_root() == Path(user_cache_dir('genrobust', appauthor=False))
    if sys.platform == 'linux':
        assert data_root() == tmp_path / '.cache/genrobust'
        monkeypatch.setenv('XDG_CACHE_HOME', '/cache')
        assert data_root() == Path('/cache/genrobust')


def test_the_folder_of_earlier_versions_is_found(tmp_path, monkeypatch):
    "On macOS and Windows, until there is one where these keep such files"
    new = tmp_path / 'Library/Caches/genrobust'
    monkeypatch.setattr('genrobust.data.user_cache_dir', lambda *args, **kwargs: str(new))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('GENROBUST_DATA', raising=False)
    assert data_root() == new
    (tmp_path / 'genrobust').mkdir()
    assert data_root() == tmp_path / 'genrobust'
    new.mkdir(parents=True)
    assert data_root() == new


def test_a_user_without_home(monkeypatch):
    "As in a container that runs under a number that /etc/passwd does not know"

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, 'getpwuid', unknown)
    monkeypatch.delenv('HOME')
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv('GENROBUST_DATA', '/data')
    assert data_root() == Path('/data')
    monkeypatch.delenv('GENROBUST_DATA')
    with pytest.raises(DataUnavailable, match='set GENROBUST_DATA'):
        data_root()


# Downloads


def serve(answer):
    "A server that hands every connection and what it was asked for to `answer`; its address"
    server = socket.create_server(('127.0.0.1', 0), backlog=100)

    def talk(connection):
        with connection, connection.makefile('rb') as lines:
            asked = lines.readline().split()[1].decode().rpartition('/')[2]
            try:
                answer(connection, asked)
            except OSError:
                pass  # the other side has gone

    def accept():
        while True:
            threading.Thread(target=talk, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f'http://127.0.0.1:{server.getsockname()[1]}/'


def silent(connection, _):
    time.sleep(60)


def endless_header(connection, _):
    connection.sendall(b'HTTP/1.1 200 OK\r\n')
    for n in range(10_000):
        connection.sendall(b'X: y\r\n'[n % 6 : n % 6 + 1])
        time.sleep(0.01)


def endless_trickle(connection, _):
    connection.sendall(b'HTTP/1.1 200 OK\r\n\r\n')
    while True:
        connection.sendall(b'.')
        time.sleep(0.01)


def wrong_file(connection, _):
    connection.sendall(b'HTTP/1.1 200 OK\r\n\r\n<html>please log in</html>')


def missing(connection, _):
    connection.sendall(b'HTTP/1.1 404 Not Found\r\n\r\n')


def cut(connection, _):
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n.')


def nonsense(connection, _):
    connection.sendall(b'what?\r\n\r\n')


@pytest.fixture
def impatient(no_network, monkeypatch):
    "The real download, which gives up after a second instead of fifteen"
    monkeypatch.setattr(data, 'download_url', lambda url, seconds: DOWNLOAD(url, seconds / 15))


@pytest.mark.parametrize(
    'answer',
    [silent, endless_header, endless_trickle, wrong_file, missing, cut, nonsense],
    ids=lambda f: f.__name__,
)
def test_a_download_ends_whatever_a_mirror_does(answer, impatient, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.FashionMNIST, 'mirrors', [serve(answer), serve(answer)])
    start = time.monotonic()
    with pytest.raises(DataUnavailable, match='could not be downloaded'):
        load('fashion_mnist', tmp_path)
    assert time.monotonic() - start < 10
    assert not list(tmp_path.iterdir())


def test_synthetic_images_come_when_no_mirror_answers(impatient, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.FashionMNIST, 'mirrors', [serve(silent)])
    said = []
    assert load_or_synthetic(tmp_path, said.append)[0] == 'synthetic'
    assert 'no more in time' in said[0]


def test_a_silent_mirror_is_asked_once(impatient, archives, fashion, tmp_path, monkeypatch):
    "What the next one has arrives whole, is kept, and is not asked for again"
    asked = []

    def note(connection, name):
        asked.append(name)
        time.sleep(60)

    def good(connection, name):
        connection.sendall(b'HTTP/1.1 200 OK\r\n\r\n' + (archives / name).read_bytes())

    monkeypatch.setattr(torchvision.FashionMNIST, 'mirrors', [serve(note), serve(good)])
    assert torch.equal(load('fashion_mnist', tmp_path).test.x, fashion.test.x)
    assert asked == NAMES[:1]
    assert sorted(path.name for path in (tmp_path / 'FashionMNIST/raw').iterdir()) == sorted(NAMES)
    assert len(load('fashion_mnist', tmp_path, download=False).test.y) == 10_000


def test_a_folder_that_cannot_be_written_to_is_told_before_the_download(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setattr(data, 'download_url', lambda *a, **k: pytest.fail('downloaded'))
    with pytest.raises(DataUnavailable, match='cannot write to the folder'):
        load('fashion_mnist', tmp_path / 'file')
