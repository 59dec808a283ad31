"""A candidate kernel for linears of few rows, which is not in use.

At few rows, a linear mainly reads its weights. The library's product reaches some 80% of the
memory bandwidth there, which is most of what a decode step of one sequence loses against its
bound. This kernel transposes the product, so that the weights are the tall operand of the matrix
units and the rows the narrow one, and cuts the outputs finely enough that each multiprocessor
has several streams of weights in flight.

`bench.gpu` compares it with the library's product. It moves to `kernels/` if it is faster on a
GPU, and is deleted if not.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 16
"""Rows of the narrow operand: the fewest that the matrix units accept."""


class Tiling(NamedTuple):
    """The outputs and inputs of a weight tile, and the tiles that a program has in flight."""

    outputs: int
    inputs: int
    stages: int


def tiling_for(num_rows: int) -> Tiling:
    """Choose tiles of 16 KB, with 48 KB in flight for each program.

    A multiprocessor runs three or more programs, so that 140 KB are in flight over a microsecond
    of latency; its share of 4.8 TB/s is 36 KB. Every program reads all rows, so that with more
    rows tiles are taller and programs fewer.
    """
    if num_rows <= 2:
        return Tiling(16, 512, 4)
    return Tiling(32, 256, 4) if num_rows <= 8 else Tiling(64, 128, 4)


def skinny_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T, accumulated in float32, as [rows, outputs] in x's dtype.

    x       [rows, inputs], at most `MAX_ROWS` rows, contiguous
    weight  [outputs, inputs], contiguous

    Reads the weights once. The sum of a row does not depend on the other rows, except that their
    number decides the width of tiles.
    """
    (num_rows, num_inputs), num_outputs = x.shape, len(weight)
    assert num_rows <= MAX_ROWS, f"{num_rows} rows are more than {MAX_ROWS}"
    output = x.new_empty(num_rows, num_outputs)
    tiling = tiling_for(num_rows)
    skinny_linear_kernel[(triton.cdiv(num_outputs, tiling.outputs),)](
        output,
        x,
        weight,
        num_rows,
        num_outputs,
        num_inputs,
        even=num_outputs % tiling.outputs == 0 and num_inputs % tiling.inputs == 0,
        max_rows=MAX_ROWS,
        tile_outputs=tiling.outputs,
        tile_inputs=tiling.inputs,
        precision="ieee" if x.dtype == torch.float32 else None,
        num_stages=tiling.stages,
        num_warps=4,
    )
    return output


@triton.jit  # type: ignore[untyped-decorator]
def skinny_linear_kernel(  # type: ignore[no-untyped-def]
    output,
    x,
    weight,
    num_rows,
    num_outputs,
    num_inputs,
    even: tl.constexpr,
    max_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
    precision: tl.constexpr,
):
    o = tl.program_id(0) * tile_outputs + tl.arange(0, tile_outputs)
    r = tl.arange(0, max_rows)
    i = tl.arange(0, tile_inputs)
    weights = weight + o[:, None].to(tl.int64) * num_inputs + i[None, :]
    inputs = x + r[None, :] * num_inputs + i[:, None]
    acc = tl.zeros([tile_outputs, max_rows], tl.float32)
    for begin in tl.range(0, num_inputs, tile_inputs):
        inside = i < num_inputs - begin
        if even:
            w = tl.load(weights + begin, eviction_policy="evict_first")
        else:
            valid = (o < num_outputs)[:, None] & inside[None, :]
            w = tl.load(weights + begin, valid, other=0.0, eviction_policy="evict_first")
        rows = tl.load(inputs + begin, (r < num_rows)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(w, rows, acc, input_precision=precision)
    valid = (o < num_outputs)[:, None] & (r < num_rows)[None, :]
    places = output + r[None, :].to(tl.int64) * num_outputs + o[:, None]
    tl.store(places, acc.to(output.dtype.element_ty), valid)
