"The pretended GPU does what one does."

import pytest
import torch

from genrobust.numerics import no_tf32


def on_gpu(*shape):
    return torch.rand(*shape, device='cuda')


REFUSED = dict(
    sum=lambda: on_gpu(3) + torch.rand(3),
    product=lambda: on_gpu(3, 3) @ torch.rand(3, 3),
    labels=lambda: torch.nn.functional.cross_entropy(on_gpu(2, 3), torch.tensor([0, 1])),
    layer=lambda: torch.nn.Linear(3, 3)(on_gpu(2, 3)),
    index=lambda: torch.rand(3)[torch.tensor([0], device='cuda')],
    in_place=lambda: torch.zeros(3).add_(on_gpu(3)),
    scalar_in_place=lambda: torch.zeros(()).add_(on_gpu(())),
    generator=lambda: torch.rand(3, device='cuda', generator=torch.Generator()),
    generator_in_place=lambda: on_gpu(3).normal_(generator=torch.Generator()),
    numpy=lambda: on_gpu(3).numpy(),
    cat=lambda: torch.cat([on_gpu(3), torch.rand(3)]),
    gather=lambda: on_gpu(2, 3).gather(1, torch.zeros(2, 1, dtype=torch.long)),
)


@pytest.mark.parametrize('name', REFUSED)
def test_what_a_gpu_refuses(name):
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[name]()


IN_FLOAT64 = dict(
    double=lambda: on_gpu(3).double(),
    made=lambda: torch.zeros(3, dtype=torch.float64, device='cuda'),
    moved=lambda: torch.rand(3, dtype=torch.float64).to('cuda'),
    on_its_way=lambda: on_gpu(3).to('cpu', torch.float64),
)


@pytest.mark.parametrize('name', IN_FLOAT64)
def test_what_a_gpu_without_float64_refuses(gpu, name):
    IN_FLOAT64[name]()
    gpu.has_float64 = False
    with pytest.raises(TypeError, match='float64'):
        IN_FLOAT64[name]()
    assert on_gpu(3).cpu().double().float().to('cuda').is_cuda


WAITS = dict(
    item=lambda x: x[0, 0].item(),
    branch=lambda x: bool((x > 2).any()),
    nonzero=lambda x: x.nonzero(),
    boolean=lambda x: x[x > 0.5],
    boolean_put=lambda x: x.__setitem__(x > 0.5, x[x > 0.5]),  # twice
    cpu=lambda x: x.cpu(),
    cuda=lambda x: torch.zeros(3).to('cuda'),
    tensor=lambda x: torch.tensor([1.0, 2.0], device='cuda'),
    index=lambda x: x[torch.tensor([0, 2])],
    equal=lambda x: torch.equal(x, x),
    print=lambda x: f'{x[0, 0]:.2f}',
)


@pytest.mark.parametrize('name', WAITS)
def test_what_waits(gpu, name):
    x = on_gpu(3, 3)
    gpu.waits.clear()
    WAITS[name](x)
    expected = 2 if name == 'boolean_put' else 1
    assert sum(gpu.waits.values()) == expected, gpu.report()
    assert all('test_device.py' in line for _, line in gpu.waits)


def test_what_does_not_wait(gpu):
    x = on_gpu(3, 3)
    k = torch.arange(3, device='cuda')
    x[x > 0.5] = 0
    x[k] = torch.where(x > 0.2, x, 1.0)[k]
    y = torch.nn.functional.dropout(x.requires_grad_(False) + torch.tensor(2.0))
    (y @ x).sum().add_(1).clamp(max=3)
    assert not gpu.waits, gpu.report()


def test_gradients_stay_on_the_gpu():
    layer, x = torch.nn.Conv2d(1, 2, 3).to('cuda'), on_gpu(2, 1, 5, 5).requires_grad_()
    layer(x).square().sum().backward()
    assert {t.grad.device.type for t in (x, *layer.parameters())} == {'cuda'}


@pytest.mark.filterwarnings('ignore')
def test_tf32_is_a_matter_of_switches(gpu):
    x, layer = on_gpu(2, 1, 9, 9), torch.nn.Conv2d(1, 2, 3)
    exact = layer(x.cpu())
    rounded = layer.to('cuda')(x).cpu()
    assert gpu.rounded and 1e-6 < (exact - rounded).abs().max() < 1e-2
    a, b = on_gpu(9, 9), on_gpu(9, 9)
    fast = a @ b
    with no_tf32():
        gpu.rounded.clear()
        assert torch.equal((a @ b).cpu(), a.cpu() @ b.cpu()) and torch.equal(layer(x).cpu(), exact)
        assert not gpu.rounded
    assert torch.equal(fast, a @ b) and not torch.equal(fast.cpu(), a.cpu() @ b.cpu())


def test_random_numbers_are_its_own():
    before = torch.get_rng_state()
    torch.cuda.manual_seed(3)
    first = on_gpu(3)
    torch.cuda.manual_seed(3)
    assert torch.equal(first, on_gpu(3)) and torch.equal(before, torch.get_rng_state())
