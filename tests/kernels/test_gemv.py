"""Linears of few rows: the product, beside float64, and the instructions that read the weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.gemv import (
    MAX_ROWS,
    Tiling,
    can_gemv,
    can_prefetch,
    gemv_torch,
    gemv_triton,
    tiling_for,
)
from kernels.target import Target, using_target
from tests.kernels.compiling import compile_everywhere, disassemble, positions

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def made(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    sizes = (rows, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(*size).to(dtype) for size in sizes)
    return x, weight, bias


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check a result against float64: float32 sums, rounded once."""
    exact = x.double() @ weight.double().T
    sizes = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    rounding = exact.abs() * torch.finfo(y.dtype).eps + sizes * 1e-6
    assert ((y.double() - exact).abs() <= rounding).all()


@each_dtype
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_it_is_the_product(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = made(rows, 1536, 10, dtype)
    check(gemv_triton(x, weight, bias), x, weight, bias)
    check(gemv_torch(x, weight, bias), x, weight, bias)


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 1), (40, 3), (1024, 4), (1032, 7), (2056, 13)])
def test_sizes_need_not_be_multiples_of_tiles(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    for rows in (1, 3, 8):
        x, weight, _ = made(rows, inputs, outputs, dtype)
        check(gemv_triton(x, weight), x, weight, None)


@pytest.mark.slow
def test_a_row_is_the_same_beside_other_rows() -> None:
    x, weight, _ = made(8, 1100, 9, torch.float32)
    whole = gemv_triton(x, weight)
    for row in range(8):
        others = torch.randn_like(x)
        others[row] = x[row]
        assert torch.equal(gemv_triton(others, weight)[row], whole[row])


def test_the_result_has_the_shape_of_the_input() -> None:
    x, weight, bias = made(6, 64, 5, torch.float32)
    for shape in [(1, 6), (6,), (2, 3), (1, 2, 3)]:
        y = gemv_triton(x.view(*shape, 64), weight, bias)
        assert y.shape == (*shape, 5)
        assert torch.equal(y.view(6, 5), gemv_triton(x, weight, bias))


@pytest.mark.parametrize("rows", [0, 9])
def test_other_numbers_of_rows_are_refused(rows: int) -> None:
    with pytest.raises(AssertionError, match=f"{rows} rows"):
        gemv_triton(torch.zeros(rows, 16), torch.zeros(4, 16))


def test_weights_without_whole_vectors_of_16_bytes_are_not_taken() -> None:
    assert can_gemv(torch.zeros(3, 8, dtype=torch.bfloat16))
    assert can_gemv(torch.zeros(3, 4))
    assert not can_gemv(torch.zeros(3, 6))
    assert not can_gemv(torch.zeros(3, 12, dtype=torch.bfloat16))
    assert not can_gemv(torch.zeros(8, 8).T)
    assert not can_gemv(torch.zeros(100)[1:97].view(12, 8))
    assert not can_gemv(torch.zeros(8, 8, dtype=torch.float64))
    assert not can_gemv(torch.zeros(0, 8))


@pytest.mark.parametrize(
    ("shape", "capability", "expected"),
    [
        pytest.param((4096, 4096), 90, True, id="attention out"),
        pytest.param((4096, 14336), 90, True, id="down"),
        pytest.param((28672, 4096), 90, False, id="more programs than run at once"),
        pytest.param((4096, 1024), 90, False, id="no more than the first tile"),
        pytest.param((4098, 4096), 90, False, id="a program with fewer outputs"),
        pytest.param((4096, 4096), 80, False, id="kernels do not start early"),
    ],
)
def test_weights_are_prefetched_by_programs_that_all_wait(
    shape: tuple[int, int], capability: int, expected: bool
) -> None:
    weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with using_target(Target(capability, 227 << 10, 132)):
        assert can_prefetch(weight) == expected


# -- what it compiles to -------------------------------------------------------------------


def compiled(rows: int, dtype: str, target: int, prefetches: bool = False) -> dict[str, Any]:
    """Return the arguments of a compilation, which are the same for every size of linear."""
    tiling = tiling_for(rows)
    return {
        "kernel": "kernels.gemv._gemv_kernel",
        "arguments": dict.fromkeys(("output_ptr", "x_ptr", "weight_ptr", "bias_ptr"), f"*{dtype}")
        | dict.fromkeys(("num_rows", "num_outputs", "num_vectors", "num_prefetched"), "i32"),
        "constants": {
            "ROWS": tiling.rows,
            "OUTPUTS": 4,
            "WORDS": tiling.words,
            "PREFETCHES": prefetches,
            "DEPENDENT": target >= 90,
        },
        "num_warps": tiling.num_warps,
        "num_stages": 1,
    }


EACH_SIZE = [1, 2, 4, 8]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", EACH_SIZE)
def test_nothing_spills_and_enough_is_on_the_way(rows: int, dtype: str) -> None:
    for dependent, targets in ((90, {90, 100, 120}), (80, {80})):
        resources = compile_everywhere(**compiled(rows, dtype, dependent), targets=targets)
        for target, used in resources.items():
            assert used.stack == 0, (target, used)
            assert bytes_on_the_way(used.registers, tiling_for(rows)) >= 36 << 10, (target, used)


def bytes_on_the_way(registers: int, tiling: Tiling) -> int:
    """Return the weights that a multiprocessor waits for: two tiles of each program it has."""
    threads = 32 * tiling.num_warps
    return (64 << 10) // (registers * threads) * 2 * 4 * 4 * tiling.words


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefetching_spills_nothing(dtype: str) -> None:
    resources = compile_everywhere(**compiled(1, dtype, 90, True), targets={90, 100, 120})
    assert all(used.stack == 0 for used in resources.values())
    assert all(used.registers <= 64 for used in resources.values()), "eight programs at once"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [80, 90, 100, 120])
@pytest.mark.parametrize("rows", EACH_SIZE)
def test_all_weights_are_read_16_bytes_at_a_time(rows: int, dtype: str, target: int) -> None:
    code = disassemble(**compiled(rows, dtype, target), target=target)
    weights = positions(code, r"LDG\.E\.EF")
    assert weights == positions(code, r"LDG\.E\.EF\.128")
    assert len(weights) == 8, "the first tile and the next one, four outputs each"
    assert len(positions(code, r"LDG\.E\.128")) == rows, "16 bytes of each row"
    # The next tile is asked for before any weight is multiplied.
    assert weights[-1] < positions(code, r"FFMA|FMUL")[0]


@pytest.mark.slow
@pytest.mark.parametrize("target", [90, 100, 120])
@pytest.mark.parametrize("prefetches", [False, True])
@pytest.mark.parametrize("rows", EACH_SIZE)
def test_only_weights_are_read_before_the_wait(rows: int, prefetches: bool, target: int) -> None:
    code = disassemble(**compiled(rows, "bf16", target, prefetches), target=target)
    (wait,) = positions(code, "ACQBULK")
    (release,) = positions(code, "PREEXIT")
    weights = positions(code, r"LDG\.E\.EF")
    others = positions(code, r"LDG\.E\.(?!EF)")
    assert [at < wait for at in weights] == [True] * 4 + [False] * 4
    assert wait < release < min(others)
    assert wait < min(positions(code, "STG"))
    asked = positions(code, r"UBLKPF\.L2")
    assert len(asked) == 4 * prefetches
    assert all(at < wait for at in asked)
