"""Linears of one to eight rows: matrix-vector products that read each weight once.

With so few rows a linear takes as long as reading its weights, so that everything here serves the
memory. A program reads a tile of weights while it multiplies the one before, 16 bytes a load, and
lets go of them at once. The first tile is asked for before the kernel waits for the one ahead of
it, whose result it multiplies; so is more of the weights, if asked, which then waits in the L2
cache. Products are summed in float32 by plain multiply-adds: the matrix units would need padded
rows, and weights that pass through shared memory.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import can_launch_ahead, dependent_launch, wait_for_kernel_ahead
from kernels.target import target_of

MAX_ROWS = 8
"""With more rows, the multiply-adds take longer than reading the weights."""
VECTOR_BYTES = 16
_OUTPUTS = 4
"""Outputs of a program. Each input that a thread loads is used for so many weights."""
_PROGRAMS_PER_SM = 8
_PREFETCHED_BYTES = 16 << 20
"""A third of Hopper's L2 cache. It is about what the memory delivers while attention runs."""


class Tiling(NamedTuple):
    """How a program is cut: rows, padded to a power of two, and warps beside each other.

    A warp reads 512 bytes of each output's weights at once.
    """

    rows: int
    num_warps: int

    @property
    def words(self) -> int:
        """Words of four bytes that the program reads of each output's weights at once."""
        return self.num_warps * 128


def tiling_for(num_rows: int) -> Tiling:
    """Choose the tiling for a number of rows.

    By its registers, a multiprocessor runs eight programs with one row and six with eight: 128 and
    48 KB of weights on the way, where its share of 4.8 TB/s over a microsecond of latency is 36 KB.
    At its end a program adds up the sums of all its threads, for each row: with many rows fewer
    threads take less time.
    """
    rows = triton.next_power_of_2(num_rows)
    return Tiling(rows, 4 if rows <= 2 else 2)


def can_gemv(weight: Tensor) -> bool:
    """Return whether `gemv_triton` takes this weight: whole vectors of 16 bytes in each row."""
    return (
        weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and weight.dim() == 2
        and weight.is_contiguous()
        and weight.numel() > 0
        and weight.shape[1] * weight.itemsize % VECTOR_BYTES == 0
        and weight.data_ptr() % VECTOR_BYTES == 0
    )


def can_prefetch(weight: Tensor) -> bool:
    """Return whether `gemv_triton` can prefetch from a weight that `can_gemv` accepts.

    Kernels have to start early, with all their programs on the device at once: one that starts
    later has nothing to wait for.
    """
    num_programs, rest = divmod(weight.shape[0], _OUTPUTS)
    most_programs = _PROGRAMS_PER_SM * target_of(weight.device).num_sms
    has_room = rest == 0 and num_programs <= most_programs
    is_dependent = can_launch_ahead(weight.device)
    return is_dependent and has_room and _prefetched_bytes(weight, tiling_for(1)) > 0


def _prefetched_bytes(weight: Tensor, tiling: Tiling) -> int:
    """Return how many bytes of each output's weights, behind the first tile, are prefetched."""
    behind_tile = weight.shape[1] * weight.itemsize - 4 * tiling.words
    share = _PREFETCHED_BYTES // weight.shape[0] // VECTOR_BYTES * VECTOR_BYTES
    return max(min(behind_tile, share), 0)


def gemv_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, prefetches: bool = False
) -> Tensor:
    """Return x @ weight.T + bias, summed in float32 and rounded once, [..., outputs] in x's type.

    x       [..., inputs], of one to `MAX_ROWS` rows
    weight  [outputs, inputs], of x's type
    bias    [outputs], of x's type, or None

    `prefetches` changes how it is computed on a GPU, not the result.
    """
    del prefetches
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return y.to(x.dtype)


def gemv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, prefetches: bool = False
) -> Tensor:
    """Do what `gemv_torch` does, for a contiguous x and a weight that `can_gemv` accepts.

    Reads the weights once. The order of a sum depends on the number of rows, not on what the
    other rows hold. With `prefetches`, which needs `can_prefetch`, up to 16 MB of the weights
    come to the L2 cache while the kernel ahead runs.
    """
    num_outputs, num_inputs = weight.shape
    num_rows = x.numel() // num_inputs
    assert 1 <= num_rows <= MAX_ROWS, f"{num_rows} rows"
    assert x.is_contiguous()
    assert x.dtype == weight.dtype
    output = x.new_empty(*x.shape[:-1], num_outputs)
    tiling = tiling_for(num_rows)
    _gemv_kernel[(triton.cdiv(num_outputs, _OUTPUTS),)](
        output,
        x,
        weight,
        bias,
        num_rows,
        num_outputs,
        num_inputs * x.itemsize // VECTOR_BYTES,
        _prefetched_bytes(weight, tiling),
        ROWS=tiling.rows,
        OUTPUTS=_OUTPUTS,
        WORDS=tiling.words,
        PREFETCHES=prefetches,
        num_warps=tiling.num_warps,
        num_stages=1,
        **dependent_launch(x.device),
    )
    return output


# One kernel for all shapes: only the number of rows, padded, causes a new compilation.
@triton.jit(do_not_specialize=["num_rows", "num_outputs", "num_vectors", "num_prefetched"])
def _gemv_kernel(
    output_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    num_outputs,
    num_vectors,
    num_prefetched,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
    PREFETCHES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    # Weights and inputs are handled as words of 32 bits. A word of two halves stays one register
    # until it is multiplied.
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    num_words = num_vectors * 4
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    words = tl.arange(0, WORDS)
    weights = weight_ptr.to(tl.pointer_type(tl.int32)) + words[None, :]
    # Behind the last output its weights are read again: a mask would take registers.
    weights += tl.minimum(outputs, num_outputs - 1)[:, None].to(tl.int64) * num_words
    inputs = x_ptr.to(tl.pointer_type(tl.int32)) + words
    is_output = outputs < num_outputs

    if PREFETCHES:
        for index in tl.static_range(OUTPUTS):
            start = (tl.program_id(0) * OUTPUTS + index).to(tl.int64) * num_words
            _prefetch(weight_ptr.to(tl.pointer_type(tl.int32)) + start + WORDS, num_prefetched)
    ahead = _load_weights(weights, words, 0, num_words)
    wait_for_kernel_ahead(DEPENDENT)
    sums = (tl.zeros([OUTPUTS, WORDS // 4], tl.float32),) * ROWS
    for begin in tl.range(0, num_words, WORDS):
        loaded = ahead
        ahead = _load_weights(weights, words, begin + WORDS, num_words)
        tl.debug_barrier()  # or else the assembler puts these loads behind the multiply-adds
        weight = _unpack(loaded, OUTPUTS, WORDS, dtype)
        added = ()
        for row in tl.static_range(ROWS):
            valid = (words < num_words - begin) & (row < num_rows)
            x = tl.load(inputs + row * num_words + begin, valid, other=0)
            x = _unpack(x[None, :], 1, WORDS, dtype)
            total = sums[row]
            for part in tl.static_range(len(weight)):
                total += weight[part] * x[part]
            added += (total,)  # type: ignore[assignment]
        sums = added

    total = tl.sum(_stack(sums, OUTPUTS, WORDS // 4, ROWS), axis=1)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + outputs, is_output, other=0.0).to(tl.float32)[:, None]
    rows = tl.arange(0, ROWS)
    places = output_ptr + rows[None, :] * num_outputs + outputs[:, None]
    tl.store(places, total.to(dtype), is_output[:, None] & (rows < num_rows)[None, :])


@triton.jit
def _load_weights(weights, words, begin, num_words):
    """Load words from `begin` on of each output, zeros behind its last."""
    valid = (words < num_words - begin)[None, :]
    return tl.load(weights + begin, valid, other=0, eviction_policy="evict_first")


@triton.jit
def _prefetch(pointer, num_bytes):
    """Have bytes, a multiple of 16, brought to the L2 cache; one thread asks for them."""
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred is_first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 is_first, thread, 0;
        @is_first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [pointer.to(tl.int64), num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _unpack(words, ROWS: tl.constexpr, WORDS: tl.constexpr, dtype: tl.constexpr):
    """Return the numbers in [ROWS, WORDS] words, as float32 tensors of [ROWS, WORDS / 4].

    A thread holds vectors of four words, and gets as many numbers of each tensor as vectors.
    """
    even, odd = tl.split(tl.reshape(words, [ROWS, WORDS // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (
        _widen(first, dtype) + _widen(second, dtype) + _widen(third, dtype) + _widen(fourth, dtype)
    )


@triton.jit
def _widen(words, dtype):
    """Return the one or two numbers in each word, the lower half first, in float32."""
    if dtype == tl.float32:
        numbers = (words.to(tl.float32, bitcast=True),)
    elif dtype == tl.bfloat16:
        low, high = words << 16, words & -65536
        numbers = (low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    else:
        low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
        low, high = low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)
        numbers = (low.to(tl.float32), high.to(tl.float32))
    return numbers


@triton.jit
def _stack(sums, OUTPUTS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Return a tuple of tensors [OUTPUTS, PARTS], one for each row, as [OUTPUTS, PARTS, ROWS].

    All rows are then summed over the threads in one go.
    """
    if ROWS == 1:
        stacked = sums[0]
    elif ROWS == 2:
        stacked = tl.join(sums[0], sums[1])
    elif ROWS == 4:
        stacked = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3]))
    else:
        even = tl.join(tl.join(sums[0], sums[4]), tl.join(sums[2], sums[6]))
        odd = tl.join(tl.join(sums[1], sums[5]), tl.join(sums[3], sums[7]))
        stacked = tl.join(even, odd)
    return tl.reshape(stacked, [OUTPUTS, PARTS, ROWS])
