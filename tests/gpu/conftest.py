"""Tests on a GPU: where there is one, part of `pytest tests`; elsewhere on one that is not there, by
`make test-gpu`, or `pytest -p pretended_gpu tests/gpu`."""

import sys
from collections import Counter
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from genrobust import data, training

WHY_NOT, SYNTHETIC = None, cache(data.synthetic)  # 70,000 garments are drawn for ten seconds
if 'pretended_gpu' in sys.modules:
    from pretended_gpu import WHY_NOT, PretendedGPU
elif torch.cuda.is_available():
    collect_ignore = ['test_device.py', 'test_waits.py']  # of the pretended GPU and its counts

    def PretendedGPU():
        return nullcontext(SimpleNamespace(is_real=True, rounded=Counter()))  # it does not tell
else:
    collect_ignore_glob = ['*']


def pytest_collection_modifyitems(items):
    for item in items if WHY_NOT else []:
        item.add_marker(pytest.mark.skip(reason=WHY_NOT))


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    "There is a GPU in every test here, and the user has asked for fast products"
    torch.manual_seed(0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    monkeypatch.setattr(data, 'synthetic', SYNTHETIC)
    with PretendedGPU() as device:
        if not device.is_real:  # nothing there records kernels
            monkeypatch.setattr(training, '_GraphedStep', training._Step)
        yield device
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=['cpu', 'cuda'])
def home(request):
    "Where a user's images are"
    return request.param
