"""act(gate) * up: the activation rounded to its type, then the product.

On the CPU, torch takes the erf of gelu from one of several libraries, by the processor and the
tensor's layout: contiguous float32, and with AVX-512 contiguous bfloat16 too, is oneDNN's,
anything else its own. They differ in the last bits, so the reference is float64.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from kernels.activation import ACTIVATIONS, act_mul_torch, act_mul_triton
from kernels.ops import ActMul
from tests.interpreter import INTERPRETED
from tests.kernels.rounding import DEVICE

IMPLEMENTATIONS = [act_mul_torch, act_mul_triton]
TRANSFORMERS_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with DEVICE:
        torch.manual_seed(0)
        yield


def every_finite(dtype: torch.dtype) -> Tensor:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite()]


def is_rounded_from_near(output: Tensor, gate: Tensor, activation: str) -> Tensor:
    """Whether each output is the rounding of a number as near the true one as float32 gets.

    Each library has its own exp and erf. Rounding is monotonic, so an output is the rounding of
    a number within `slack` of the true one if it lies between the roundings of both ends.

    gelu, gelu_tanh  act(x) = x / 2 * (1 + f), and f near -1 cancels: the error is absolute. The
                     coarsest erf in use (Abramowitz and Stegun 7.1.26, in oneDNN and in torch
                     on the CPU) is wrong by 2.5 units of 2^-24; rounding z and its square, the
                     exponential, f and the sum adds less than a dozen. Half of that is below 8.
    silu             x / (1 + e^-x) cancels nothing: the error is relative, a few units of 2^-24.
                     Below -88.7, e^-x overflows in float32, and the output is 0.
    relu, relu2      exact in float32
    """
    x = gate.double()
    exact = ACT2FN[TRANSFORMERS_NAMES[activation]](x)
    match activation:
        case "gelu" | "gelu_tanh":
            slack = 8 * 2**-24 * x.abs()
        case "silu":
            slack = 8 * 2**-24 * exact.abs() + 2**-128 * x.abs()
        case _:
            slack = torch.zeros_like(x)
    low, high = ((exact + side * slack).to(output.dtype) for side in (-1, 1))
    return (low <= output) & (output <= high)


def gates_of_16_bits(dtype: torch.dtype, activation: str) -> Tensor:
    """Return every finite number whose square, if `activation` squares, is finite too."""
    gate = every_finite(dtype)
    if activation == "relu2":
        gate = gate[gate.float() ** 2 <= torch.finfo(dtype).max]
    return gate


def without_extremes(gate: Tensor) -> Tensor:
    """Return the numbers that oneDNN's gelu of bfloat16, used with AVX-512, neither flushes to zero
    (x / 2 is subnormal) nor makes infinite (2 x overflows float32).
    """
    size = gate.double().abs()
    return gate[(size == 0) | ((size >= 2**-125) & (size < 2.0**127))]


def strided(x: Tensor) -> Tensor:
    """Return `x` with gaps between its elements, which sends torch's CPU to another kernel."""
    return torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_every_number_of_16_bits_is_activated_as_well_as_float32_allows(
    activation: str, dtype: torch.dtype
) -> None:
    gate = gates_of_16_bits(dtype, activation)
    output = act_mul_triton(gate, torch.ones_like(gate), activation)
    assert is_rounded_from_near(output, gate, activation).all()
    gate = without_extremes(gate)
    for laid_out in (gate, strided(gate)):
        output = act_mul_torch(laid_out, torch.ones_like(gate), activation)
        assert is_rounded_from_near(output, gate, activation).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_formula_is_not_as_near_as_float32_allows(
    activation: str, dtype: torch.dtype
) -> None:
    """The bound finds a wrong kernel, even tanh where erf belongs."""
    other = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "silu": "gelu", "relu": "silu"}
    gate = gates_of_16_bits(dtype, activation)
    wrong = act_mul_torch(gate, torch.ones_like(gate), other.get(activation, "relu"))
    assert not is_rounded_from_near(wrong, gate, activation).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_torch_op_is_transformers_own_activation_times_up(
    activation: str, dtype: torch.dtype
) -> None:
    gate = gates_of_16_bits(dtype, activation)
    expected = ACT2FN[TRANSFORMERS_NAMES[activation]](gate)
    assert torch.equal(act_mul_torch(gate, torch.ones_like(gate), activation), expected)


@pytest.mark.skipif(INTERPRETED, reason="compares with torch's CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_numbers_of_16_bits_differ_from_torch_on_cuda(
    activation: str, dtype: torch.dtype
) -> None:
    """The last bit of float32 now and then decides the last of 16 bits."""
    gate = gates_of_16_bits(dtype, activation)
    expected = ACT2FN[TRANSFORMERS_NAMES[activation]](gate)
    activated = act_mul_triton(gate, torch.ones_like(gate), activation)
    most_differing = {"silu": 2, "gelu": len(gate) // 200, "gelu_tanh": 50, "relu": 0, "relu2": 0}
    assert (activated != expected).sum() <= most_differing[activation]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_activation_is_rounded_before_the_product(
    implementation: ActMul, activation: str
) -> None:
    gate, up = torch.randn(2, 16, 300).bfloat16()
    activated = ACT2FN[TRANSFORMERS_NAMES[activation]](gate)
    product = implementation(gate, up, activation)
    assert (product == activated * up).float().mean() > 0.999
    rounded_once = ACT2FN[TRANSFORMERS_NAMES[activation]](gate.float()) * up.float()
    if activation != "relu":  # which rounds nothing
        assert (product == rounded_once.bfloat16()).float().mean() < 0.9


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 1023), (3, 1024), (2, 1, 1500), (5,), (0, 8)])
def test_the_product_is_right_for_any_shape(
    implementation: ActMul, activation: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    gate, up = torch.randn(shape, dtype=dtype) * 4, torch.randn(shape, dtype=dtype)
    product = implementation(gate, up, activation)
    expected = ACT2FN[TRANSFORMERS_NAMES[activation]](gate.double()) * up.double()
    assert product.shape == gate.shape
    assert product.dtype == dtype
    eps = torch.finfo(dtype).eps
    # The cancellation in 1 + tanh and 1 + erf is torch's too: it is absolute, in float32.
    allowed = 2 * eps * expected.abs() + 1e-6 * up.double().abs() + torch.finfo(dtype).tiny * eps
    assert ((product.double() - expected).abs() <= allowed).all()


def halves_of_a_fused_projection() -> list[Tensor]:
    return list(torch.randn(1, 7, 2 * 1100).bfloat16().chunk(2, dim=-1))


def test_the_kernel_treats_halves_of_a_fused_projection_like_contiguous_tensors(
    activation: str,
) -> None:
    gate, up = halves_of_a_fused_projection()
    product = act_mul_triton(gate, up, activation)
    assert product.is_contiguous()
    assert torch.equal(product, act_mul_triton(gate.clone(), up.clone(), activation))


def test_the_torch_op_activates_halves_of_a_fused_projection(activation: str) -> None:
    """The result may differ in a last bit from that of contiguous tensors (see above)."""
    gate, up = halves_of_a_fused_projection()
    activated = act_mul_torch(gate, torch.ones_like(up), activation)
    product = act_mul_torch(gate, up, activation)
    assert is_rounded_from_near(activated, gate, activation).all()
    assert product.is_contiguous()
    assert torch.equal(product, activated * up)


def test_far_from_zero_nothing_overflows_on_the_way(activation: str) -> None:
    gate = torch.tensor([[-3e38, -90.0, -88.72, -88.0, 0.0, 88.0, 90.0, 3e18]])
    product = act_mul_triton(gate, torch.ones_like(gate), activation)
    expected = act_mul_torch(gate, torch.ones_like(gate), activation)
    assert torch.allclose(product, expected, rtol=1e-5, atol=1e-37)
