"Training: checkpoints that are damaged or not its own, and what is refused before any work."

import os
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from genrobust.attacks import fgsm
from genrobust.data import Images, synthetic
from genrobust.files import digest, load_tensors, save_tensors
from genrobust.models import CNN
from genrobust.numerics import is_trusted
from genrobust.training import fit, make_optimiser, train_epoch


def train(epochs, checkpoint, **kw):
    clf, few = CNN(hidden=20), synthetic(40)
    how = dict(batch_size=20, checkpoint=checkpoint, device='cpu', progress=False)
    fit(clf, few, few, epochs, **how, **kw)
    return digest(clf.state_dict())


@pytest.mark.parametrize(
    'damage',
    [
        lambda b: b[: len(b) // 2],
        lambda b: b'',
        lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:],
        lambda b: bytes(len(b)),
    ],
    ids=['cut', 'empty', 'flipped', 'zeros'],
)
@pytest.mark.parametrize('done', [1, 2, 4])
def test_a_corrupt_checkpoint_falls_back_on_the_one_before(done, damage, tmp_path):
    straight, path = train(4, tmp_path / 'straight'), tmp_path / 'c.checkpoint'
    train(done, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(
        UserWarning, match='corrupt or truncated.*goes on from .*c.checkpoint.previous'
    ):
        assert train(4, path) == straight
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'c.checkpoint',
        'c.checkpoint.previous',
        'straight',
        'straight.previous',
    ]
    assert [
        len(load_tensors(p)[1]['history']) for p in (path, tmp_path / 'c.checkpoint.previous')
    ] == [4, 3]
    for file in (path, tmp_path / 'c.checkpoint.previous'):
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match='c.checkpoint is not a file.*corrupt or truncated'):
        train(4, path)


def test_a_checkpoint_that_is_deleted_is_begun_anew(tmp_path):
    train(2, tmp_path / 'c')
    (tmp_path / 'c').unlink()
    train(2, tmp_path / 'c', seed=1)
    assert [
        load_tensors(tmp_path / name)[1]['settings']['seed'] for name in ('c', 'c.previous')
    ] == [1, 1]


@pytest.mark.parametrize(
    'name',
    [
        pytest.param('z' * 255, id='long'),
        pytest.param(
            os.fsdecode(b'\xff'),
            id='bytes',
            marks=pytest.mark.skipif(sys.platform == 'darwin', reason='its file names are UTF-8'),
        ),
    ],
)
def test_a_checkpoint_has_any_name_that_fits(name, tmp_path):
    straight = train(2, None)
    train(1, tmp_path / name)
    assert train(2, tmp_path / name) == straight and len(list(tmp_path.iterdir())) == 2


EPOCH = dict(epoch=0, train_bound=0.0, bound=0.0, accuracy=0.0)
HISTORIES = [None, 3, 'ab', {}, [], [1], [{}]]
HISTORIES += [[EPOCH | other] for other in (dict(epoch=1), dict(train_bound='0'), dict(bound=[]))]


@pytest.mark.parametrize('history', HISTORIES, ids=range(len(HISTORIES)))
def test_a_checkpoint_without_a_history_is_one_error(history, tmp_path):
    train(1, tmp_path / 'c')
    tensors, metadata = load_tensors(tmp_path / 'c')
    save_tensors(tmp_path / 'c', tensors, **metadata | dict(history=history))
    with pytest.raises(ValueError, match='/c does not hold a training'):
        train(2, tmp_path / 'c')


def test_a_checkpoint_without_its_parts_is_one_error(tmp_path):
    train(1, tmp_path / 'c')
    tensors, metadata = load_tensors(tmp_path / 'c')
    for part in ('model', 'average', 'best'):
        save_tensors(
            tmp_path / 'c', {k: v for k, v in tensors.items() if not k.startswith(part)}, **metadata
        )
        with pytest.raises(ValueError, match='/c does not hold a training'):
            train(2, tmp_path / 'c')
    for name in ('config', 'settings'):
        for value in (None, [], 'text'):
            save_tensors(tmp_path / 'c', tensors, **metadata | {name: value})
            with pytest.raises(ValueError, match='/c is the checkpoint of another run'):
                train(2, tmp_path / 'c')


def test_fit_checks_its_arguments_before_the_images():
    few = Images(torch.zeros(1), torch.zeros(1))  # are not looked at
    for kw, message in [
        (dict(epochs=0), 'epochs'),
        (dict(epochs=1.5), 'epochs'),
        (dict(epochs='3'), 'epochs'),
        (dict(batch_size=None), 'batch_size'),
        (dict(lr='fast'), 'lr'),
        (dict(lr=torch.nan), 'lr'),
        (dict(warmup=0.5), 'warmup'),
        (dict(patience=0), 'patience'),
        (dict(patience='2'), 'patience'),
        (dict(checkpoint='/dev'), 'is a folder'),
        (dict(device='none'), 'cannot be used'),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(CNN(hidden=20), few, few, progress=False, **kw)
    with pytest.raises(OSError, match='cannot write to the folder /dev/null'):
        fit(CNN(hidden=20), few, few, progress=False, checkpoint='/dev/null/c')


def test_a_bar_leaves_one_line_for_each_epoch(capsys):
    few = synthetic(40)
    fit(CNN(hidden=20), few, few, epochs=2, batch_size=20, device='cpu')
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in lines] == ['epoch 0:', 'epoch 1:']


def test_adversarial_training_looks_at_its_first_batch():
    "And at that alone: what it makes of the next is clipped by the attack"
    model, first = CNN(hidden=5), torch.arange(6).split(3)
    refusal = pytest.raises(ValueError, match='within bounds')
    for wrong, expected in ((0, refusal), (3, nullcontext())):
        x = torch.rand(6, 1, 28, 28)
        x[wrong] += 1
        how = dict(batches=first, adversary=lambda *given: fgsm(*given).x_adv)
        given = model, *make_optimiser(model, 1e-3), Images(x, torch.arange(6))
        with expected:
            assert train_epoch(*given, **how) > 0
    assert not is_trusted()


def test_mixed_precision_where_pytorch_has_none(monkeypatch):
    "On MPS with PyTorch 2.4"
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda kind: False)
    images = Images(torch.rand(6, 1, 28, 28), torch.arange(6))
    how = dict(device='cpu', progress=False)
    with pytest.raises(ValueError, match='no mixed precision on cpu: train with amp=False'):
        fit(CNN(hidden=5), images, images, 1, amp=True, **how)
    fit(CNN(hidden=5), images, images, 1, **how)


def test_batch_norm_is_averaged_with_the_weights():
    clf, few = CNN(hidden=20), synthetic(60)
    clf.add_module('norm', torch.nn.BatchNorm1d(784))
    plain = clf.forward
    clf.forward = lambda x: plain(clf.norm(x.flatten(1)).view_as(x))
    fit(clf, few, few, 2, batch_size=20, device='cpu', progress=False)
    assert clf.norm.num_batches_tracked >= 6 and clf.norm.running_mean.abs().sum() > 0


def test_what_is_frozen_stays_and_what_was_loaded_is_trained():
    few, how = synthetic(40), dict(batch_size=20, device='cpu', progress=False)
    clf = CNN(hidden=20)
    clf.trunk.requires_grad_(False)
    before = {name: value.clone() for name, value in clf.state_dict().items()}
    fit(clf, few, few, 1, **how)
    moved = {name for name, value in clf.state_dict().items() if not value.equal(before[name])}
    assert moved and not any(name.startswith('trunk') for name in moved)
    whole = CNN(hidden=20).requires_grad_(False)
    start = digest(whole.state_dict())
    fit(whole, few, few, 1, **how)
    assert digest(whole.state_dict()) != start


def shifted(model, x, y, by=0.0):
    return (x + by).clamp(0, 1)


class Shift:
    def __call__(self, model, x, y):
        return x


def test_beside_a_checkpoint_an_adversary_can_be_told_from_others(tmp_path):
    train(1, tmp_path / 'c', adversary=partial(shifted, by=0.1))
    with pytest.raises(ValueError, match='adversary'):
        train(2, tmp_path / 'c', adversary=partial(shifted, by=0.2))
    for unknown in (Shift(), lambda model, x, y: x, partial(Shift())):
        with pytest.raises(ValueError, match='so that it is known'):
            train(1, tmp_path / 'd', adversary=unknown)
    assert not (tmp_path / 'd').exists()
    train(1, None, adversary=Shift())
