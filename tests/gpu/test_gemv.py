"""Linears of few rows on the device: the product, early starts, and the choice at load."""

import pytest
import torch
from torch import Tensor, nn

from engine.device.timer import CudaTimer
from engine.linear.gemv import GemvLinear, use_gemv
from engine.step.graphs import CudaCapture
from kernels.gemv import MAX_ROWS, can_prefetch, gemv_triton
from kernels.norm import NormForm, norm_triton
from kernels.ops import TRITON
from tests.gpu.shapes import SHAPES, Shape

CUDA = torch.device("cuda")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=CUDA, dtype=dtype)


def linears_of(shape: Shape) -> list[tuple[int, int]]:
    """Return [outputs, inputs] of the linears of a layer, and of a part of the logits."""
    heads = shape.num_heads * shape.head_dim
    return [
        (heads + 2 * shape.num_kv_heads * shape.head_dim, shape.hidden),
        (shape.hidden, heads),
        (2 * shape.intermediate, shape.hidden),
        (shape.hidden, shape.intermediate),
        (4099, shape.hidden),
    ]


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    exact = x.double() @ weight.double().T
    sizes = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    bound = exact.abs() * torch.finfo(y.dtype).eps + sizes * 1e-6
    assert ((y.double() - exact).abs() <= bound).all()


@each_dtype
@each_shape
def test_it_is_the_product(shape: Shape, dtype: torch.dtype) -> None:
    for outputs, inputs in linears_of(shape):
        weight, bias = randn(outputs, inputs, dtype=dtype), randn(outputs, dtype=dtype)
        for rows in (1, 2, 3, 4, 7, MAX_ROWS):
            x = randn(rows, inputs, dtype=dtype)
            check(gemv_triton(x, weight), x, weight)
            check(gemv_triton(x, weight, bias), x, weight, bias)


@each_dtype
def test_prefetching_changes_no_bit(dtype: torch.dtype) -> None:
    weight, x = randn(1024, 8192, dtype=dtype), randn(1, 8192, dtype=dtype)
    if not can_prefetch(weight):
        pytest.skip("kernels do not start early on this GPU")
    torch.cuda.synchronize()
    assert torch.equal(gemv_triton(x, weight, prefetches=True), gemv_triton(x, weight))


@pytest.mark.parametrize("prefetches", [False, True])
def test_a_chain_of_kernels_that_start_early_waits_for_each_input(prefetches: bool) -> None:
    """Each kernel starts while the one ahead of it still computes what it reads."""
    weights = [randn(2048, 2048, dtype=torch.bfloat16) / 45 for _ in range(24)]
    if prefetches and not can_prefetch(weights[0]):
        pytest.skip("kernels do not start early on this GPU")
    norm, start = torch.ones(2048, device=CUDA).bfloat16(), randn(1, 2048, dtype=torch.bfloat16)

    def chain() -> Tensor:
        x = start
        for weight in weights:
            normed = norm_triton(x, norm, None, NormForm(1e-5))
            x = gemv_triton(normed, weight, prefetches=prefetches)
        return x

    torch.cuda.synchronize()
    one_by_one = start
    for weight in weights:
        normed = norm_triton(one_by_one, norm, None, NormForm(1e-5))
        torch.cuda.synchronize()
        one_by_one = gemv_triton(normed, weight)
        torch.cuda.synchronize()
    assert torch.equal(chain(), one_by_one)
    graph, result = CudaCapture()(chain)
    for _ in range(200):
        graph.replay()
    assert torch.equal(result, one_by_one)


def test_the_timer_tells_the_time_of_the_device_alone() -> None:
    timer = CudaTimer(CUDA)
    words = torch.ones(64 << 20, device=CUDA)
    whole, half = timer(words.sum), timer(words[: 32 << 20].sum)
    assert whole is not None
    assert half is not None
    assert half < whole < 4 * half
    assert timer(lambda: [words[:64].sum() for _ in range(50)]) is not None


def test_work_that_waits_for_the_device_has_no_time() -> None:
    words = torch.ones(1024, device=CUDA)
    assert CudaTimer(CUDA)(lambda: words.sum().item()) is None


def test_the_choice_is_made_and_computes_the_same() -> None:
    linears = [nn.Linear(4096, 6144, False), nn.Linear(4096, 6144, False), nn.Linear(640, 64)]
    model = nn.Sequential(*linears).to(CUDA, torch.bfloat16).requires_grad_(False)
    xs = {rows: randn(rows, 4096, dtype=torch.bfloat16) for rows in (1, 2, 5, 8, 9)}
    expected = {rows: linears[0](x) for rows, x in xs.items()}
    use_gemv(model, TRITON, CudaTimer(CUDA))
    print([module.rows if isinstance(module, GemvLinear) else () for module in model])
    for rows, x in xs.items():
        torch.testing.assert_close(model[0](x), expected[rows], rtol=0.02, atol=0.02)
