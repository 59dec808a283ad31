"""The sampling kernels compiled for GPUs that are not here fit their registers and memory."""

from typing import Any

import pytest

from kernels.fused_sampling.launch import BLOCK, CHUNK, HELD, HELD_REGISTERS, KEPT
from tests.kernels.compiling import SHARED_LIMIT, compile_everywhere

LOGITS = {"logits_ptr": "*bf16", "row_stride": "i32"}
REQUEST = {"parameters_ptr": "*i32", "counts_ptr": "*i32"}
SCRATCH = {
    "partials_ptr": "*i64",
    "scores_ptr": "*fp32",
    "scores_stride": "i32",
    "candidate_ids_ptr": "*i32",
    "candidate_ids_stride": "i32",
}
CHOSEN = {"ids_ptr": "*i64", "logprobs_ptr": "*fp32"}
TOP = {"top_ids_ptr": "*i64", "top_logprobs_ptr": "*fp32"}
SIZES = {"vocab_size": "i32", "num_chunks": "i32", "num_top": "i32"}
DIVISIBLE = frozenset({"row_stride", "scores_stride", "candidate_ids_stride", "vocab_size"})


def check(
    kernel: str,
    arguments: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    maxnreg: int | None = None,
) -> None:
    compiled = compile_everywhere(
        f"kernels.fused_sampling.{kernel}",
        arguments,
        constants,
        num_warps,
        divisible=DIVISIBLE,
        maxnreg=maxnreg,
    )
    for target, resources in compiled.items():
        assert resources.stack == 0, (target, resources)
        assert resources.shared <= SHARED_LIMIT[target]


def chunks(vocab_size: int) -> int:
    """Return the number of chunks of a row, rounded up to a power of 2."""
    return 1 << (-(-vocab_size // CHUNK) - 1).bit_length()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("logprobs", [False, True])
def test_the_greedy_kernel_of_chunks_fits_every_gpu(dtype: str, logprobs: bool) -> None:
    arguments = {**LOGITS, "partials_ptr": "*i64", "vocab_size": "i32", "logits_ptr": dtype}
    check("greedy_passes.greedy_chunk_kernel", arguments, {"LOGPROBS": logprobs, "CHUNK": CHUNK}, 8)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [49_152, 128_256, 256_000])
def test_the_greedy_kernel_of_rows_fits_every_gpu(vocab_size: int) -> None:
    arguments = {"partials_ptr": "*i64", "num_chunks": "i32", **CHOSEN}
    check("greedy_passes.greedy_row_kernel", arguments, {"CHUNKS": chunks(vocab_size)}, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_the_pass_over_chunks_fits_every_gpu(dtype: str) -> None:
    arguments = {**LOGITS, **REQUEST, **SCRATCH, "vocab_size": "i32", "logits_ptr": dtype}
    check("chunk_pass.chunk_kernel", arguments, {"CHUNK": CHUNK, "KEPT": KEPT}, 8)


SHAPES = [
    (49_152, 64, "*bf16"),
    (128_256, 0, "*bf16"),
    (128_256, 64, "*fp32"),
    (256_000, 0, "*fp32"),
    (256_000, 64, "*bf16"),
]


def of_rows(vocab_size: int, top: int, dtype: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the arguments and constants of a pass over rows."""
    arguments = {**LOGITS, **REQUEST, **SCRATCH, **CHOSEN, **SIZES, "logits_ptr": dtype}
    constants: dict[str, Any] = {"CHUNKS": chunks(vocab_size), "KEPT": KEPT, "TOP": top}
    if top:
        return arguments | TOP, constants
    return arguments, constants | dict.fromkeys(TOP)


@pytest.mark.slow
@pytest.mark.parametrize(("vocab_size", "top", "dtype"), SHAPES)
def test_the_pass_over_rows_fits_every_gpu(vocab_size: int, top: int, dtype: str) -> None:
    arguments, constants = of_rows(vocab_size, top, dtype)
    check("row_pass.row_kernel", arguments, constants | {"HELD": HELD}, 4, HELD_REGISTERS)


@pytest.mark.slow
@pytest.mark.parametrize(("vocab_size", "top", "dtype"), SHAPES)
def test_the_pass_over_whole_rows_fits_every_gpu(vocab_size: int, top: int, dtype: str) -> None:
    arguments, constants = of_rows(vocab_size, top, dtype)
    check("whole_row_pass.whole_row_kernel", arguments, constants | {"BLOCK": BLOCK}, 8)
