"""A candidate: linears of few rows in a kernel of our own, beside the library's.

At a few rows a linear is a read of its weights. The library's product reaches some 80% of
the memory's bandwidth there; what a decode step of one sequence loses beside its bound is
mostly this. The kernel turns the product round, so that the weights are the tall operand
of the matrix units and the rows their narrow one, and cuts the outputs so finely that each
processor has several streams of weights in flight.

It is measured by `bench.gpu` and serves nobody: it moves to `kernels/` if a card says so,
and goes if not.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 16
"""Of the narrow operand: what the matrix units take at least."""


class Tiling(NamedTuple):
    """Outputs and inputs of a weight tile, and how many tiles a program has in flight."""

    outputs: int
    inputs: int
    stages: int


def tiling_for(num_rows: int) -> Tiling:
    """16 KB a tile and 48 KB a program in flight, of which a processor runs three or more: over
    a microsecond of latency that is 140 KB, and its share of 4.8 TB/s is 36 KB.

    Every program reads all rows: with more of them tiles are taller, for fewer programs.
    """
    if num_rows <= 2:
        return Tiling(16, 512, 4)
    return Tiling(32, 256, 4) if num_rows <= 8 else Tiling(64, 128, 4)


def skinny_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, accumulated in float32: [rows, outputs] in x's dtype.

    x       [rows, inputs], at most `MAX_ROWS` rows, contiguous
    weight  [outputs, inputs], contiguous

    Reads the weights once. How a row is summed depends on neither the other rows nor their
    number, but for the tile's width.
    """
    (num_rows, num_inputs), num_outputs = x.shape, len(weight)
    assert num_rows <= MAX_ROWS, f"{num_rows} rows are not few"
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
