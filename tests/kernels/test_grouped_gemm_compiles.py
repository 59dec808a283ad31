"""The experts' kernels compile for every GPU at real shapes, without spills or narrow loads."""

from typing import Any

import pytest

from kernels.grouped_gemm import FEW, MANY, SOME, GateForm, Tiling, gate_constants
from tests.kernels.compiling import SHARED_LIMIT, compile_everywhere, disassemble, positions

pytestmark = pytest.mark.slow

SILU = GateForm("halves", "silu")
CLAMPED = GateForm("interleaved", "silu", limit=7.0, slope=1.702, shift=1.0)
PRODUCTS: dict[str, tuple[int, int, bool, GateForm | None]] = {
    "Mixtral-8x7B gate, up": (4096, 2 * 14336, False, SILU),
    "Mixtral-8x7B down": (14336, 4096, False, None),
    "Qwen3-30B-A3B gate, up": (2048, 2 * 768, False, SILU),
    "Qwen3-30B-A3B down": (768, 2048, False, None),
    "gpt-oss-20b gate, up": (2880, 2 * 2880, True, CLAMPED),
    "gpt-oss-20b down": (2880, 2880, True, None),
    "DeepSeek-V3 gate, up": (7168, 2 * 2048, False, SILU),
    "DeepSeek-V3 down": (2048, 7168, False, None),
}
"""Inputs, outputs, whether weights are transposed (and have a bias), and the gate."""
GATED = ["Mixtral-8x7B gate, up", "gpt-oss-20b gate, up"]


def grouped_linear(
    name: str, tiling: Tiling, dtype: str = "bf16", is_single: bool = False
) -> dict[str, Any]:
    """Return what `compile_everywhere` needs to compile this product in this tiling."""
    inputs, outputs, transposed, form = PRODUCTS[name]
    tensors = ["output_ptr", "x_ptr", "weight_ptr"] + ["bias_ptr"] * transposed
    indices = ["order_ptr", "blocks_ptr", "num_blocks_ptr"]
    return {
        "kernel": "kernels.grouped_gemm._grouped_linear_kernel",
        "arguments": dict.fromkeys(tensors, f"*{dtype}")
        | dict.fromkeys(indices, "*i32")
        | {"experts_ptr": "*i64", "pairs_per_row": "i32", "num_experts": "i32"},
        "constants": {
            **({} if transposed else {"bias_ptr": None}),
            "IS_SINGLE": is_single,
            "INPUTS": inputs,
            "OUTPUTS": outputs,
            "TRANSPOSED": transposed,
            **gate_constants(form),
            "ROWS": tiling.rows,
            "COLUMNS": tiling.columns,
            "INNER": tiling.inner // (2 if dtype == "fp32" else 1),
            "GROUP": tiling.group,
            "PRECISION": "ieee" if dtype == "fp32" else None,
        },
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }


def check(**kernel: Any) -> None:
    for target, resources in compile_everywhere(**kernel).items():
        assert resources.stack == 0, target
        assert resources.shared <= SHARED_LIMIT[target], target


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_few_rows_compile(name: str) -> None:
    """Three programs fit a multiprocessor of an H200, each with 32 KB of weights on their way."""
    kernel = grouped_linear(name, FEW)
    check(**kernel)
    hopper = compile_everywhere(**kernel)[90]
    assert 3 * (hopper.shared + 1024) <= 228 << 10
    assert 3 * hopper.registers * 32 * FEW.warps <= 1 << 16


@pytest.mark.parametrize("tiling", [SOME, MANY], ids=lambda tiling: f"{tiling.rows} rows")
@pytest.mark.parametrize("name", GATED)
def test_products_of_many_rows_compile(name: str, tiling: Tiling) -> None:
    check(**grouped_linear(name, tiling))


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_products_of_other_types_compile(dtype: str) -> None:
    for tiling in (FEW, MANY):
        check(**grouped_linear(GATED[0], tiling, dtype))


def test_the_products_of_a_single_token_compile() -> None:
    for name in GATED:
        check(**grouped_linear(name, FEW, is_single=True))


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("name", PRODUCTS)
def test_weights_and_rows_are_loaded_16_bytes_at_a_time(name: str, target: int) -> None:
    """They go to shared memory without a stop in registers, several tiles ahead of their use."""
    instructions = disassemble(**grouped_linear(name, FEW), target=target)
    copies = positions(instructions, r"LDGSTS")
    assert len(copies) >= (FEW.columns + FEW.rows) * FEW.inner * 2 // (16 * 32 * FEW.warps)
    assert copies == positions(instructions, r"LDGSTS\.E\.(BYPASS\.)?(LTC128B\.)?128")


@pytest.mark.parametrize("target", [90])
def test_products_of_many_rows_use_the_widest_matrix_instructions(target: int) -> None:
    instructions = disassemble(**grouped_linear(GATED[0], MANY), target=target)
    assert positions(instructions, r"HGMMA\.64x128x16")


@pytest.mark.parametrize("tiling", [FEW, MANY], ids=lambda tiling: f"{tiling.rows} rows")
@pytest.mark.parametrize("num_experts", [8, 128, 512])
def test_routing_compiles(num_experts: int, tiling: Tiling) -> None:
    check(
        kernel="kernels.grouped_gemm._route_kernel",
        arguments={"experts_ptr": "*i64", "num_pairs": "i32"}
        | dict.fromkeys(["order_ptr", "blocks_ptr", "num_blocks_ptr"], "*i32"),
        constants={
            "NUM_EXPERTS": num_experts,
            "BINS": 2 * num_experts,
            "ROWS": tiling.rows,
            "CHUNK": tiling.chunk,
            "BLOCK": 128,
        },
        num_warps=8,
    )


@pytest.mark.parametrize(("hidden", "top_k"), [(4096, 2), (2048, 8), (7168, 8), (2880, 4)])
def test_the_sum_of_experts_compiles(hidden: int, top_k: int) -> None:
    check(
        kernel="kernels.grouped_gemm._combine_kernel",
        arguments={
            "output_ptr": "*bf16",
            "x_ptr": "*bf16",
            "weights_ptr": "*fp32",
            "experts_ptr": "*i64",
        },
        constants={
            "NUM_EXPERTS": 128,
            "OUTPUTS": hidden,
            "TOP_K": top_k,
            "ROUNDS": False,
            "BLOCK": 1024,
        },
    )
