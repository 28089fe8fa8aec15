"""A GPU that is not there: PyTorch's `cuda:0`, whose numbers lie in main memory.

Loaded before PyTorch (`pytest -p pretended_gpu`), it gives the CUDA build of PyTorch a device that
needs no card and no driver. Within `PretendedGPU()` code takes the branches that it takes on a GPU,
and raises there where it would on one: tensors of both devices in one operation, a generator of the
other device, numpy. The kernels are the CPU's, so numbers are right; TF32 is imitated where it is
switched on, and every wait of the processor for the GPU is counted. It says nothing of speed,
memory, or the order in which a GPU adds up.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from unittest.mock import patch

# What autograd and `torch.device` ask of a backend, before any tensor is there
SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
constexpr auto kind = DeviceType::CUDA;
struct Guard final : impl::NoOpDeviceGuardImpl<kind> {
  Device getDevice() const override { return Device(kind, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
};
extern "C" void plug_in() {
  impl::device_guard_impl_registry[static_cast<size_t>(kind)].store(new Guard());
}
namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
};
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, REGISTRY_PREFERRED, CUDAHooks)
}
"""


def _library():
    "Compile what C++ has to know, once for each PyTorch, and load it"
    torch = Path(find_spec('torch').origin).parent
    key = hashlib.blake2b(f'{SOURCE} {torch} {os.stat(torch / "version.py")}'.encode()).hexdigest()
    path = Path(tempfile.gettempdir()) / f'genrobust-gpu-{os.getuid()}-{key[:16]}.so'
    if not path.exists():
        own = path.with_suffix(f'.{os.getpid()}')
        link = [f'-I{torch}/include', f'-L{torch}/lib', f'-Wl,-rpath,{torch}/lib']
        link += ['-lc10', '-ltorch_cpu']
        command = ['g++', '-shared', '-fPIC', '-std=c++20', '-x', 'c++', '-', '-o', own, *link]
        if which('g++') is None:
            raise OSError('there is no g++')
        made = subprocess.run(command, input=SOURCE, text=True, capture_output=True)
        if made.returncode:
            raise RuntimeError(made.stderr[-2000:])
        own.rename(path)
    return ctypes.CDLL(str(path))


WHY_NOT, is_hopeless = None, False  # why there can be no such device here; for any PyTorch
try:
    if sys.platform != 'linux':
        raise OSError('only on Linux')
    if 'torch' in sys.modules:
        raise OSError('PyTorch was imported first: pytest -p pretended_gpu')
    _plug_in = _library().plug_in
except (OSError, RuntimeError) as e:
    WHY_NOT, is_hopeless = f'no pretended GPU: {e}', isinstance(e, OSError)

import torch  # noqa: E402
import torch._dynamo  # noqa: E402 F401, which looks at what is patched below
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

if WHY_NOT is None:
    if torch.version.cuda is None:
        WHY_NOT = 'no pretended GPU: this PyTorch is not built for CUDA'
    elif torch.cuda.is_available():
        WHY_NOT, is_hopeless = 'no pretended GPU: there is a real one', True
    else:
        _plug_in()

aten = torch.ops.aten
MOVES = aten._to_copy.default, aten.copy_.default
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXED = 'index', 'index_put', 'index_put_', '_index_put_impl_'
# Take a CPU tensor without dimensions, beside the operations that PyTorch tags as pointwise
TAKE_SCALARS = 'masked_fill', 'masked_fill_', 'fill_', *INDEXED
PRODUCTS = 'mm', 'addmm', 'bmm', 'baddbmm'
CONVOLUTIONS = 'convolution', 'convolution_backward'


def _map(change, value):
    "Arguments or results of an operation, with each tensor changed"
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)([_map(change, v) for v in value])
    return {k: _map(change, v) for k, v in value.items()} if type(value) is dict else value


def _tensors(value):
    "All that are among arguments"
    found = []
    _map(found.append, value)
    return found


class OnGPU(Tensor):
    "A tensor on `cuda:0`; its numbers are those of `inner`"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        form = dict(strides=inner.stride(), storage_offset=inner.storage_offset())
        form |= dict(dtype=inner.dtype, device='cuda:0')
        self = Tensor._make_wrapper_subclass(cls, inner.size(), **form)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return PretendedGPU.on.call(op, args, kwargs or {})

    def __repr__(self, **kwargs):
        return f'{self.detach().cpu()!r}'[:-1] + ", device='cuda:0')"

    def __format__(self, spec):
        return format(self.item() if self.ndim == 0 else repr(self), spec)

    def tolist(self):
        return self.detach().cpu().tolist()

    def numpy(self, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")


OnGPU.__module__ = 'torch'  # by which libraries know a tensor


def _round_to_tf32(t):
    "Ten bits of a float32's fraction are left"
    if t.dtype != torch.float32 or t.ndim < 2:
        return t
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _rounds(name):
    "Whether the switches let this operation use TF32"
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if name in PRODUCTS:
        return getattr(matmul, 'fp32_precision', '') == 'tf32'
    if name not in CONVOLUTIONS:
        return False
    conv = getattr(cudnn, 'conv', None)
    return cudnn.allow_tf32 if conv is None else conv.fp32_precision == 'tf32'


class _Generator:
    "Stands for `torch.cuda.default_generators[0]`"

    def __init__(self, cpu):
        self.get_state, self.set_state, self.manual_seed = (
            cpu.get_state,
            cpu.set_state,
            cpu.manual_seed,
        )


class PretendedGPU(TorchDispatchMode):
    """A context in which there is one GPU; `waits` and `rounded` (to TF32) are counted by line.

    Without `has_float64` it refuses such tensors, as MPS does."""

    on, is_real, has_float64 = None, False, True

    def __init__(self):
        super().__init__()
        self.random, self.waits, self.rounded = torch.Generator(), Counter(), Counter()

    def __enter__(self):
        random, none = self.random, lambda *args, **kwargs: None
        seed = random.manual_seed
        told = dict(
            is_available=lambda: True,
            is_initialized=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            get_device_name=lambda device=None: 'a pretended GPU',
            get_device_capability=lambda device=None: (9, 0),
            is_bf16_supported=lambda *args, **kwargs: True,
            mem_get_info=lambda device=None: (64 * 2**30, 80 * 2**30),
            manual_seed=seed,
            manual_seed_all=seed,
            get_rng_state=lambda device=None: random.get_state(),
            set_rng_state=lambda state, device=None: random.set_state(state),
            default_generators=(_Generator(random),),
            is_current_stream_capturing=lambda: False,
            _is_in_bad_fork=lambda: False,
            **dict.fromkeys(('_lazy_init', 'set_device', 'synchronize', 'empty_cache'), none),
        )
        self.patched = patch.multiple(torch.cuda, **told)
        self.patched.start()
        self.before = PretendedGPU.on, torch.__future__.get_overwrite_module_params_on_conversion()
        PretendedGPU.on = self
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        self.one_thread = torch.autograd.set_multithreading_enabled(False)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.one_thread.__exit__(None, None, None)
        torch._C._set_only_lift_cpu_tensors(False)
        PretendedGPU.on, overwrite = self.before
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        self.patched.stop()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return self.call(op, args, kwargs or {})

    def call(self, op, args, kwargs):
        "One operation, whose results are on the GPU if its tensors are or if it is told so"
        tensors = _tensors((args, kwargs))
        here = [t for t in tensors if isinstance(t, OnGPU)]
        to = kwargs.get('device')
        goes_here = bool(here) if to is None else torch.device(to).type == 'cuda'
        if not here and not goes_here:
            return op(*args, **kwargs)
        name = op._schema.name.removeprefix('aten::')
        if kwargs.get('generator') is not None and goes_here:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if here and len(here) < len(tensors) and op not in MOVES:
            self._refuse(op, name, args, tensors)
        if kind := self._wait(op, name, args, goes_here):
            self.waits[kind, _line()] += 1
        args, kwargs = _map(lambda t: t.inner if isinstance(t, OnGPU) else t, (args, kwargs))
        if _rounds(name):
            self.rounded[_line()] += 1
            args = _map(_round_to_tf32, args)
        if to is not None:
            kwargs['device'] = torch.device('cpu')
        found = self._compute(op, args, kwargs)
        if not self.has_float64 and torch.float64 in [t.dtype for t in _tensors(found)]:
            raise TypeError(f'Cannot convert to float64, which is not supported (aten::{name})')
        if not goes_here:
            return found
        known = {id(t.inner): t for t in here}  # what was changed in place
        return _map(lambda t: known[id(t)] if id(t) in known else OnGPU(t), found)

    def _compute(self, op, args, kwargs):
        "On the CPU, by the random numbers of this device"
        if torch.Tag.nondeterministic_seeded not in op.tags:
            return op(*args, **kwargs)
        own = torch.default_generator
        before = own.get_state()
        own.set_state(self.random.get_state())
        try:
            return op(*args, **kwargs)
        finally:
            self.random.set_state(own.get_state())
            own.set_state(before)

    def _refuse(self, op, name, args, tensors):
        "Raise where a GPU does not take a tensor of the CPU's among its own"
        index = _tensors(args[1]) if name in INDEXED and isinstance(args[0], OnGPU) else []
        scalars = torch.Tag.pointwise in op.tags or name in TAKE_SCALARS or '_foreach' in name
        for t in tensors:
            is_scalar = scalars and t.ndim == 0 and not (t is args[0] and name.endswith('_'))
            if not (isinstance(t, OnGPU) or is_scalar or any(t is k for k in index)):
                both = 'Expected all tensors to be on the same device, but found cuda:0 and cpu'
                raise RuntimeError(f'{both} (aten::{name}, {list(t.shape)} on the CPU)')

    def _wait(self, op, name, args, goes_here):
        "What makes the processor wait, or None"
        if op in MOVES:
            source = args[op is aten.copy_.default]
            target = isinstance(args[0], OnGPU) if op is aten.copy_.default else goes_here
            way = 'copy to the GPU' if target else 'copy to the CPU'
            return None if isinstance(source, OnGPU) == target else way
        if name not in INDEXED:
            return name if WAITING & set(op.tags) else None
        index = _tensors(args[1])
        if any(t.dtype in (torch.bool, torch.uint8) for t in index):
            is_fill = name != 'index' and args[2].numel() == 1 and not isinstance(args[2], OnGPU)
            return None if is_fill else 'boolean index'
        return 'index from the CPU' if any(not isinstance(t, OnGPU) for t in index) else None

    def report(self, most=20):
        "Waits by kind and line, those that are most frequent first"
        rows = [f'{n:6d}  {kind:20s}{line}' for (kind, line), n in self.waits.most_common(most)]
        return '\n'.join([*rows, f'{sum(self.waits.values())} waits'])


def _line():
    frame = sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        if file != __file__ and '/torch/' not in file and 'importlib' not in file:
            return f'{Path(file).name}:{frame.f_lineno}'
        frame = frame.f_back
    return 'a backward pass'


def _check():
    "An error unless this PyTorch does as is pretended"
    with PretendedGPU() as gpu:
        layer = torch.nn.Conv2d(1, 2, 3).to('cuda')
        x = torch.rand(2, 1, 5, 5).to('cuda').requires_grad_()
        layer(x).sum().backward()
        assert x.grad.is_cuda and layer.weight.grad.is_cuda and gpu.rounded and gpu.waits


if WHY_NOT is None:
    try:
        _check()
    except Exception as e:  # whatever has changed in PyTorch
        WHY_NOT = f'no pretended GPU on PyTorch {torch.__version__}: {type(e).__name__}: {e}'
if __name__ == '__main__':
    print(WHY_NOT or '', end='\n' if WHY_NOT else '')
    sys.exit(bool(WHY_NOT) and not is_hopeless)  # whether another PyTorch might do
