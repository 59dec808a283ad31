"""The linear of one tiling compiles for every GPU, spills nothing, and loads 16 bytes at a time."""

from typing import Any

import pytest

from kernels.invariant_linear import FEW, INNER_BYTES, MANY, Tiling
from tests.kernels.compiling import SHARED_LIMIT, compile_everywhere, disassemble, positions

pytestmark = pytest.mark.slow

SHAPES = {
    "Llama-3.1-8B q, k, v": (4096, 6144),
    "Llama-3.1-8B down": (14336, 4096),
    "Llama-3.1-8B logits": (4096, 128256),
}


def linear(name: str, tiling: Tiling, dtype: str = "bf16") -> dict[str, Any]:
    (inputs, outputs), itemsize = SHAPES[name], 4 if dtype == "fp32" else 2
    return {
        "kernel": "kernels.invariant_linear._invariant_linear_kernel",
        "arguments": dict.fromkeys(["output_ptr", "x_ptr", "weight_ptr"], f"*{dtype}")
        | {"num_rows": "i32", "x_stride": "i32"},
        "constants": {
            "bias_ptr": None,
            "INPUTS": inputs,
            "OUTPUTS": outputs,
            "ROWS": tiling.rows,
            "COLUMNS": tiling.columns,
            "INNER": INNER_BYTES // itemsize,
            "PRECISION": "ieee" if dtype == "fp32" else None,
        },
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        "divisible": {"x_stride"},
    }


@pytest.mark.parametrize("tiling", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_it_compiles_and_spills_nothing(dtype: str, tiling: Tiling) -> None:
    kernel = linear("Llama-3.1-8B q, k, v", tiling, dtype)
    for target, resources in compile_everywhere(**kernel).items():
        # float32, which the library already computes well enough, may lack two registers.
        assert resources.stack <= (8 if dtype == "fp32" else 0), target
        assert resources.shared <= SHARED_LIMIT[target], target


@pytest.mark.parametrize("name", SHAPES)
def test_weights_and_rows_are_loaded_16_bytes_at_a_time(name: str) -> None:
    for tiling, product in {FEW: r"HGMMA\.64x64x16", MANY: r"HGMMA\.64x128x16"}.items():
        instructions = disassemble(**linear(name, tiling), target=90)
        copies = positions(instructions, r"LDGSTS")
        bytes_at_once = (tiling.rows + tiling.columns) * INNER_BYTES
        assert len(copies) >= bytes_at_once // (16 * 32 * tiling.warps)
        assert copies == positions(instructions, r"LDGSTS\.E\.(BYPASS\.)?(LTC128B\.)?128")
        assert positions(instructions, product)


@pytest.mark.parametrize("target", [80, 120])
def test_one_instruction_adds_up_in_both_tilings(target: int) -> None:
    """Where a tile's size does not choose the instruction, rows cannot differ between tilings."""
    for tiling in (FEW, MANY):
        instructions = disassemble(**linear("Llama-3.1-8B down", tiling), target=target)
        products = positions(instructions, r"HMMA")
        assert products == positions(instructions, r"HMMA\.16816\.F32\.BF16")
        assert products
