"""The candidate for linears of few rows: the product, and what it compiles to."""

import pytest
import torch
import torch.nn.functional as F

from bench.gpu.skinny_linear import MAX_ROWS, skinny_linear, tiling_for
from tests.kernels.compiling import SHARED_LIMIT, compile_everywhere


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 16])
@pytest.mark.parametrize(("inputs", "outputs"), [(512, 64), (40, 19), (600, 130)])
def test_it_is_the_product(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    torch.testing.assert_close(skinny_linear(x, weight), F.linear(x, weight), atol=1e-4, rtol=1e-4)


def test_bfloat16_is_summed_in_float32() -> None:
    x, weight = torch.randn(3, 256).bfloat16(), torch.randn(32, 256).bfloat16()
    expected = F.linear(x.float(), weight.float())
    torch.testing.assert_close(skinny_linear(x, weight).float(), expected, atol=0.05, rtol=1e-2)


def test_a_row_is_the_same_beside_others() -> None:
    x, weight = torch.randn(8, 300), torch.randn(40, 300)
    together = skinny_linear(x, weight)
    for some in (slice(0, 3), slice(2, 6), slice(5, 8)):
        assert torch.equal(skinny_linear(x[some], weight), together[some])


def test_many_rows_are_refused() -> None:
    with pytest.raises(AssertionError, match="17 rows"):
        skinny_linear(torch.zeros(MAX_ROWS + 1, 16), torch.zeros(16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_it_compiles_for_every_gpu_without_spills(rows: int) -> None:
    outputs, inputs, stages = tiling_for(rows)
    compiled = compile_everywhere(
        "bench.gpu.skinny_linear.skinny_linear_kernel",
        dict.fromkeys(("output", "x", "weight"), "*bf16")
        | dict.fromkeys(("num_rows", "num_outputs", "num_inputs"), "i32"),
        {
            "even": True,
            "max_rows": MAX_ROWS,
            "tile_outputs": outputs,
            "tile_inputs": inputs,
            "precision": None,
        },
        num_stages=stages,
        divisible={"num_outputs", "num_inputs"},
    )
    for target, resources in compiled.items():
        assert resources.stack == 0, (target, resources)
        assert resources.shared <= SHARED_LIMIT[target], (target, resources)
