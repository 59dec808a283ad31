"""A linear whose result for a row depends on that row alone, to the last bit.

A library picks its kernel, and with it the order of its sums, by the number of rows. This one
adds up the inputs of every output in one order, with one kind of matrix instruction, whatever the
number of rows: a row gives the same bits alone, in a decode of 32 and in a prompt of 4,096. More
rows only share a tile, so that weights are read less often: which rows and columns an instruction
computes beside an output does not change how it adds up that output's 16 products.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiling(NamedTuple):
    """The rows and outputs of a program, and the buffers of each operand."""

    rows: int
    columns: int
    warps: int
    stages: int


FEW = Tiling(rows=64, columns=64, warps=4, stages=7)
"""The rows that Hopper's matrix units take at least, and outputs so few that the linears of an 8B
model with 4,096 outputs still keep 64 multiprocessors busy, each with 48 KB of weights on their
way."""
MANY = Tiling(rows=128, columns=128, warps=8, stages=3)
INNER_BYTES = 128
"""Of each row and column at once, in both tilings: they add up in the same steps."""


def tiling_for(num_rows: int) -> Tiling:
    return FEW if num_rows <= FEW.rows else MANY


def invariant_linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b, each row computed by itself and rounded once.

    x       [..., inputs]
    weight  [outputs, inputs]
    bias    [outputs] or None

    Returns [..., outputs] in x's type.
    """
    rows = [torch.mv(weight.float(), row.float()) for row in x.reshape(-1, x.shape[-1])]
    result = torch.stack(rows) if rows else x.new_empty(0, len(weight), dtype=torch.float32)
    if bias is not None:
        result += bias.float()
    return result.to(x.dtype).view(*x.shape[:-1], len(weight))


def invariant_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Do what `invariant_linear_torch` does, in one launch, with sums in another fixed order.

    Reads the weights once for every 64 rows, or every 128 where there are more.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    assert weight.is_contiguous()
    (num_rows, inputs), outputs = rows.shape, len(weight)
    output = x.new_empty(num_rows, outputs)
    if num_rows:
        tiling = tiling_for(num_rows)
        grid = triton.cdiv(num_rows, tiling.rows) * triton.cdiv(outputs, tiling.columns)
        _invariant_linear_kernel[(grid,)](
            output,
            rows,
            weight,
            bias,
            num_rows,
            rows.stride(0),
            INPUTS=inputs,
            OUTPUTS=outputs,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            INNER=INNER_BYTES // x.dtype.itemsize,
            PRECISION="ieee" if x.dtype == torch.float32 else None,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
    return output.view(*x.shape[:-1], outputs)


@triton.jit(do_not_specialize=["num_rows"])
def _invariant_linear_kernel(
    output_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    x_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs side by side have the same columns: the second to read them finds them in L2.
    row_blocks = (num_rows + ROWS - 1) // ROWS
    rows = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) // row_blocks * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < OUTPUTS
    inner = tl.arange(0, INNER)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_ptrs = weight_ptr + columns.to(tl.int64)[None, :] * INPUTS + inner[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in tl.range(0, INPUTS, INNER):
        is_inner = inner < INPUTS - begin
        if INPUTS % INNER == 0:
            x = tl.load(x_ptrs + begin, is_row[:, None], 0.0)
            w = tl.load(w_ptrs + begin, is_column[None, :], 0.0)
        else:
            x = tl.load(x_ptrs + begin, is_row[:, None] & is_inner[None, :], 0.0)
            w = tl.load(w_ptrs + begin, is_inner[:, None] & is_column[None, :], 0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, is_column, 0.0).to(tl.float32)[None, :]
    out_ptrs = output_ptr + rows.to(tl.int64)[:, None] * OUTPUTS + columns[None, :]
    tl.store(out_ptrs, acc.to(output_ptr.dtype.element_ty), is_row[:, None] & is_column[None, :])
