"Tests on a GPU that is not there: `make test-gpu`, or `pytest -p pretended_gpu tests/gpu`."

import sys

import pytest

if 'pretended_gpu' not in sys.modules:  # PyTorch has been imported without it
    collect_ignore_glob = ['*']
else:
    from pretended_gpu import WHY_NOT, PretendedGPU

    def pytest_collection_modifyitems(items):
        for item in items if WHY_NOT else []:
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))

    @pytest.fixture(autouse=True)
    def gpu(tmp_path):
        "There is a GPU in every test here"
        import torch

        torch.manual_seed(0)
        with PretendedGPU() as device:
            yield device

    @pytest.fixture(params=['cpu', 'cuda'])
    def home(request):
        "Where a user's images are"
        return request.param
