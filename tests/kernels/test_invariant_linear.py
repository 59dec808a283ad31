"""A row's result is right, and the same to the last bit alone and in company."""

from collections.abc import Iterator

import pytest
import torch

from engine.linear.invariant import InvariantProduct
from kernels.invariant_linear import invariant_linear_torch, invariant_linear_triton
from tests.kernels.rounding import DEVICE

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
IMPLEMENTATIONS = [invariant_linear_torch, invariant_linear_triton]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with DEVICE:
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 16, 33, 64, 200])
def test_a_row_is_the_same_to_the_bit_alone_and_in_company(
    num_rows: int, dtype: torch.dtype
) -> None:
    """The rows stand at other places among other rows, as in steps of other requests."""
    weight, bias = torch.randn(130, 300).to(dtype), torch.randn(130).to(dtype)
    x = torch.randn(200, 300).to(dtype)
    together = invariant_linear_triton(x, weight, bias)
    for first in {0, 200 - num_rows, (200 - num_rows) // 2}:
        some = invariant_linear_triton(x[first : first + num_rows], weight, bias)
        assert torch.equal(some, together[first : first + num_rows])
    last = invariant_linear_triton(x[-1:], weight, bias)
    assert torch.equal(last, together[-1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 80), (0, 16), (70, 72)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_of_any_shape_is_rounded_once(
    implementation: InvariantProduct, shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(50, shape[-1]).to(dtype)
    bias = torch.randn(50).to(dtype) if with_bias else None
    result = implementation(x, weight, bias)
    assert result.shape == (*shape[:-1], 50)
    assert result.dtype == dtype
    exact = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    eps = torch.finfo(dtype).eps
    allowed = eps / 2 * exact.abs() + 1e-4
    assert ((result.double() - exact).abs() <= allowed).all()


def test_rows_need_not_be_contiguous() -> None:
    x, weight = torch.randn(7, 200)[:, 8:136], torch.randn(16, 128)
    contiguous = invariant_linear_triton(x.contiguous(), weight, None)
    assert torch.equal(invariant_linear_triton(x, weight, None), contiguous)
