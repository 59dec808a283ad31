"""A packed linear computes the same as the linear it was made from."""

import pytest
import torch
from torch import nn

from engine.linear.packed import PackedLinear, pack_linears

SHAPES = [(1, 1), (7, 1), (30, 42), (576, 192), (576, 1536), (64, 1003)]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
                reason="this processor has no bfloat16, so no bfloat16 weights are packed",
            ),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
@torch.inference_mode()
def test_a_packed_linear_agrees_with_float64(
    num_in: int, num_out: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(num_in, num_out, bias, dtype=dtype)
    packed = PackedLinear(linear)
    exact = nn.Linear(num_in, num_out, bias, dtype=torch.float64)
    exact.load_state_dict(linear.state_dict())
    for shape in [(1,), (5,), (1, 3), (2, 3, 17), (33,), (300,)]:
        x = torch.randn(*shape, num_in, dtype=dtype)
        y, expected = packed(x), exact(x.double())
        assert y.dtype == dtype
        assert y.shape == expected.shape
        scale = linear.weight.double().norm(dim=1).max() * x.double().norm(dim=-1).max() + 1
        # The bound of a sum of independent rounding errors.
        assert (y - expected).abs().max() <= torch.finfo(dtype).eps * num_in**0.5 * scale


@torch.inference_mode()
def test_inputs_with_any_strides_are_accepted() -> None:
    linear = nn.Linear(24, 40)
    x = torch.randn(2, 9, 48)
    for view in (x[:, ::2, :24], x[..., ::2], torch.randn(24, 5).t()):
        torch.testing.assert_close(PackedLinear(linear)(view), linear(view))


@torch.inference_mode()
def test_an_input_of_no_rows_gives_no_rows() -> None:
    assert PackedLinear(nn.Linear(8, 3))(torch.empty(1, 0, 8)).shape == (1, 0, 3)


def test_the_weight_can_still_be_read() -> None:
    linear = nn.Linear(30, 42)
    assert torch.equal(PackedLinear(linear).weight, linear.weight)


class _Shift(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def test_only_plain_linears_are_packed() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.Sequential(shared, nn.ReLU()),
        shared,
        _Shift(4, 4),
        nn.LayerNorm(4),
        nn.Linear(4, 4, dtype=torch.float64),
    )
    x = torch.randn(3, 4)
    expected = model[:4](x)
    pack_linears(model)
    kinds = [type(module) for module in model]
    assert kinds == [nn.Sequential, PackedLinear, _Shift, nn.LayerNorm, nn.Linear]
    inner = model[0]
    assert isinstance(inner, nn.Sequential)
    assert inner[0] is model[1]
    with torch.inference_mode():
        torch.testing.assert_close(model[:4](x), expected)
