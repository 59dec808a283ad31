"""act(gate) * up, to the last bit of what torch computes in two steps."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from kernels.activation import ACTIVATIONS, act_mul_torch, act_mul_triton
from tests.kernels.rounding import DEVICE, ulps

IMPLEMENTATIONS = [act_mul_torch, act_mul_triton]
TRANSFORMERS_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

ActMul = Callable[[Tensor, Tensor, str], Tensor]
pytestmark = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with DEVICE:
        torch.manual_seed(0)
        yield


def every_finite(dtype: torch.dtype) -> Tensor:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_every_number_of_16_bits_is_activated_as_transformers_does(
    activation: str, dtype: torch.dtype
) -> None:
    """Where the two take exp or erf from different libraries, a last bit of float32 now and
    then decides one of 16 bits; in 1 + erf(x) and 1 + tanh(x) it is a last bit of the 1.
    """
    gate = every_finite(dtype)
    if activation == "relu2":
        gate = gate[gate.float() ** 2 <= torch.finfo(dtype).max]
    expected = ACT2FN[TRANSFORMERS_NAMES[activation]](gate)
    one = torch.ones_like(gate)
    assert torch.equal(act_mul_torch(gate, one, activation), expected)
    activated = act_mul_triton(gate, one, activation)
    cancelled = (activated.float() - expected.float()).abs() <= 2**-24 * gate.float().abs()
    assert (cancelled | (ulps(activated, expected) <= 1)).all()
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
def test_any_shape(
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_halves_of_a_fused_projection(implementation: ActMul, activation: str) -> None:
    fused = torch.randn(1, 7, 2 * 1100).bfloat16()
    gate, up = fused.chunk(2, dim=-1)
    product = implementation(gate, up, activation)
    assert product.is_contiguous()
    assert torch.equal(product, implementation(gate.clone(), up.clone(), activation))


def test_far_from_zero_nothing_overflows_on_the_way(activation: str) -> None:
    gate = torch.tensor([[-3e38, -90.0, -88.72, -88.0, 0.0, 88.0, 90.0, 3e18]])
    product = act_mul_triton(gate, torch.ones_like(gate), activation)
    expected = act_mul_torch(gate, torch.ones_like(gate), activation)
    assert torch.allclose(product, expected, rtol=1e-5, atol=1e-37)
