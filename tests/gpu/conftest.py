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
    def gpu():
        "There is a GPU in every test here, and the user has asked for fast products"
        import torch

        torch.manual_seed(0)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision('high')
        with PretendedGPU() as device:
            yield device
        torch.set_float32_matmul_precision(before)

    @pytest.fixture(params=['cpu', 'cuda'])
    def home(request):
        "Where a user's images are"
        return request.param
