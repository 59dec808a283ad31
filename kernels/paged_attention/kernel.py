"""Paged attention in Triton: one launch for a step's decodes, one for its prefill chunks.

**Tiles.** A tile is a few consecutive queries of one sequence, with all the query heads that
share one key/value head: together they are the rows of a matrix. A program reads the keys that
these queries see, `block_n` at a time, with the online softmax of FlashAttention (Dao et al.
2022), in powers of two.

**Splits.** The keys of a tile may be cut into splits. Each split is computed on its own, into a
partial result. Partials are folded in the order of their splits, so that rounding does not
depend on which program is faster. How keys are cut depends on their sequence alone (except in
steps of very many short chunks, see `STEP_QUERIES`); how splits are assigned to programs
affects only the speed.

- Decode. The splits of all sequences and heads form one list, and every program takes an equal
  run of it, so that any mix of lengths keeps the memory busy to the end (Stream-K, Osama et al.
  2023). A tile within one run never leaves the registers.
- Prefill. A program takes one split after the other, from long ones to short ones. Only short
  chunks with a long context have several (Flash-Decoding, Dao et al. 2023).

The partials of a tile that several programs share go through device memory, and the last of
these programs folds them.

**Work in device memory.** The kernel reads everything that varies from step to step from device
memory, so that a captured CUDA graph serves any step of its shape. There are no more programs
than run at once, so that a shape's capacity costs nothing. What a program reads of the plan, it
reads before the kernel ahead has ended: that one must not write the plan or the block tables.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.dependent_launch import wait_for_kernel_ahead

_LOG2E = tl.constexpr(math.log2(math.e))
_NONE_SEEN = tl.constexpr(-1.0e30)
"""The largest score before any score is seen: finite, so that differences are finite too."""


class _Inputs(NamedTuple):
    query: Any
    query_row_stride: Any
    query_head_stride: Any
    key_cache: Any
    value_cache: Any
    block_tables: Any
    k_scale: Any


class _Scratch(NamedTuple):
    """Partials, [units, rows, block_v] and [units, 2, rows] float32; counters [units]."""

    acc: Any
    stats: Any
    counters: Any


class _Outputs(NamedTuple):
    output: Any
    sinks: Any
    v_scale: Any


class _Item(NamedTuple):
    """A work item, see `Work`."""

    slot: Any
    row: Any
    num_queries: Any
    position: Any
    split: Any
    num_splits: Any


class _Tile(NamedTuple):
    """The queries of a tile, their key/value head, and the keys that they see.

    A step is a block of `block_n` keys. A unit is one split of one tile and head, and has its
    own rows in the scratch memory; `unit` is the first unit of the tile and head.
    """

    row: Any
    num_queries: Any
    position: Any
    head: Any
    unit: Any
    first_step: Any
    last_step: Any
    split_steps: Any
    num_splits: Any


class _Operands(NamedTuple):
    """The queries of a tile, the addresses of its keys and values, and the factors of scores."""

    query: Any
    k_base: Any
    v_base: Any
    table: Any
    factor: Any
    row_factors: Any


class _Partial(NamedTuple):
    """A softmax over some keys: the weighted sum of values, the largest score, the weights' sum."""

    acc: Any
    peak: Any
    total: Any


@triton.jit
def attend_kernel(
    output,
    query,
    key_cache,
    value_cache,
    block_tables,
    items,
    num_items,
    counters,
    partial_acc,
    partial_stats,
    sinks,
    k_scale,
    v_scale,
    query_row_stride,
    query_head_stride,
    S: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    inputs = _Inputs(
        query,
        query_row_stride,
        query_head_stride,
        key_cache,
        value_cache,
        block_tables,
        k_scale,
    )
    scratch = _Scratch(partial_acc, partial_stats, counters)
    outputs = _Outputs(output, sinks, v_scale)
    num_units = tl.load(num_items) * S.num_kv_heads
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if S.runs:
        unit = (program.to(tl.int64) * num_units // num_programs).to(tl.int32)
        end = ((program + 1).to(tl.int64) * num_units // num_programs).to(tl.int32)
        item = _load_item(items, unit, unit < end, S)
        if DEPENDENT:
            _prefetch_table(unit, item, inputs, S)
        wait_for_kernel_ahead(DEPENDENT)
        while unit < end:
            unit = _attend_units(unit, end, item, inputs, scratch, outputs, S)
            item = _load_item(items, unit, unit < end, S)
    else:
        unit = program
        item = _load_item(items, unit, unit < num_units, S)
        wait_for_kernel_ahead(DEPENDENT)
        # What is hoisted out of this loop would have no registers in the loop over the keys.
        for begin in tl.range(0, num_units, num_programs, disable_licm=True):
            if unit < num_units:
                _attend_units(unit, unit + 1, item, inputs, scratch, outputs, S)
            unit = _unit_of_round(begin // num_programs + 1)
            item = _load_item(items, unit, unit < num_units, S)


@triton.jit
def _unit_of_round(number):
    """Return the program's unit in a round of all programs, of which the first has number 0.

    Every other round goes to the programs in reverse order, as units become ever shorter.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    mirrored = num_programs - 1 - program
    return number * num_programs + tl.where(number % 2 == 0, program, mirrored)


@triton.jit
def _load_item(items, unit, valid, S: tl.constexpr):
    """Load the item of a unit, or of another split of its tile."""
    fields = items + unit // S.num_kv_heads * 6
    return _Item(
        tl.load(fields, valid, 0),
        tl.load(fields + 1, valid, 0),
        tl.load(fields + 2, valid, 0),
        tl.load(fields + 3, valid, 0),
        tl.load(fields + 4, valid, 0),
        tl.load(fields + 5, valid, 1),
    )


@triton.jit
def _prefetch_table(unit, item, inputs, S: tl.constexpr):
    """Bring the ids of the blocks that a run begins with into the L2 cache."""
    tile, start = _find_tile(unit, item, S)
    step = tile.first_step + start * tile.split_steps
    table = inputs.block_tables + item.slot.to(tl.int64) * S.table_stride
    address = (table + step * S.block_n // S.block_size).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [address], tl.int32, False, 1
    )


@triton.jit
def _attend_units(unit, end, item, inputs, scratch, outputs, S: tl.constexpr):
    """Compute the units from `unit` up to `end` that share its tile and head.

    Returns the unit after them. Units are ordered by tile, then head, then split.
    """
    tile, start = _find_tile(unit, item, S)
    end = tl.minimum(end, tile.unit + item.num_splits)
    stop = tl.minimum(end - tile.unit, tile.num_splits)
    if start < stop:
        operands = _find_operands(inputs, item.slot, tile, S)
        if S.runs:
            part = _attend_run(operands, tile, start, stop, scratch, S)
        else:
            part = _attend_split(operands, tile, start, S)
        _finish(part, tile, start, stop, scratch, outputs, S)
    return end


@triton.jit
def _find_tile(unit, item, S: tl.constexpr):
    """Return the tile that a unit is part of, and which of its splits the unit is."""
    tile_unit = (unit // S.num_kv_heads - item.split) * S.num_kv_heads
    head = (unit - tile_unit) // item.num_splits
    first_unit = tile_unit + head * item.num_splits
    first_key = 0
    if S.window is not None:
        first_key = tl.maximum(first_key, item.position - S.window + 1)
    if S.chunk is not None:
        first_key = tl.maximum(first_key, item.position // S.chunk * S.chunk)
    first_step = first_key // S.block_n
    last_step = (item.position + item.num_queries + S.block_n - 1) // S.block_n
    # A window may leave so few keys that there are fewer splits than items.
    num_steps = last_step - first_step
    split_steps = tl.maximum((num_steps + item.num_splits - 1) // item.num_splits, 1)
    num_splits = tl.maximum((num_steps + split_steps - 1) // split_steps, 1)
    tile = _Tile(
        item.row,
        item.num_queries,
        item.position,
        head,
        first_unit,
        first_step,
        last_step,
        split_steps,
        num_splits,
    )
    return tile, unit - first_unit


@triton.jit
def _find_operands(inputs, slot, tile, S: tl.constexpr):
    m = tl.arange(0, S.block_m)
    d = tl.arange(0, S.block_d)
    q_head = tile.head * S.group + m % S.group
    rows = (tile.row + m // S.group).to(tl.int64) * inputs.query_row_stride
    rows += q_head * inputs.query_head_stride
    valid = (m < tile.num_queries * S.group)[:, None] & (d < S.head_dim)[None, :]
    query = tl.load(inputs.query + rows[:, None] + d[None, :], mask=valid, other=0.0)
    factor = tl.full([], S.factor, tl.float32)
    row_factors = tl.full([S.block_m], 1.0, tl.float32)
    if S.is_float8 and query.dtype != tl.float32:
        query, row_factors = _to_float16(query)
    if S.as_bits:
        factor *= 256
    if inputs.k_scale is not None:
        factor *= tl.load(inputs.k_scale + tile.head)
    return _Operands(
        query,
        inputs.key_cache + tile.head * S.key_head_stride,
        inputs.value_cache + tile.head * S.value_head_stride,
        inputs.block_tables + slot.to(tl.int64) * S.table_stride,
        factor,
        row_factors,
    )


@triton.jit
def _to_float16(query):
    """Divide each row by a power of two, so that it fits float16; return the rows and powers.

    A GPU converts float8 to float16 in one instruction, and to bfloat16 in four.
    """
    query = query.to(tl.float32)
    largest = tl.max(tl.abs(query), 1)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where(power > 0, power, 1.0)
    return (query / power[:, None]).to(tl.float16), power


@triton.jit
def _attend_run(operands, tile, start, stop, scratch, S: tl.constexpr):
    """Compute splits `start` to `stop` in one loop, so that the loads never pause.

    If the run contains the first split of the tile, return its splits folded into one partial.
    Otherwise store each partial in the scratch memory.
    """
    begin = tile.first_step + start * tile.split_steps
    end = tl.minimum(tile.first_step + stop * tile.split_steps, tile.last_step)
    split_end = begin + tile.split_steps
    folded = _nothing(S)
    part = _nothing(S)
    for step in tl.range(begin, end):
        part = _attend_keys(operands, tile, step, part, S)
        if (step + 1 == split_end) | (step + 1 == end):
            if start == 0:
                folded = _fold(folded, part)
            else:
                split = (step - tile.first_step) // tile.split_steps
                _store_partial(scratch, tile, split, part, S)
            part = _nothing(S)
            split_end += tile.split_steps
    return folded


@triton.jit
def _attend_split(operands, tile, split, S: tl.constexpr):
    begin = tile.first_step + split * tile.split_steps
    end = tl.minimum(begin + tile.split_steps, tile.last_step)
    part = _nothing(S)
    for step in tl.range(begin, end):
        part = _attend_keys(operands, tile, step, part, S)
    return part


@triton.jit
def _attend_keys(operands, tile, step, part, S: tl.constexpr):
    """Add the keys of one step to `part`."""
    k_pos = step * S.block_n + tl.arange(0, S.block_n)
    # Slots past the end hold garbage, perhaps NaN. Read the last key instead; it is masked.
    at = tl.minimum(k_pos, tile.position + tile.num_queries - 1)
    block = tl.load(operands.table + at // S.block_size).to(tl.int64)
    k_rows = block * S.key_block_stride + at % S.block_size * S.key_slot_stride
    v_rows = block * S.value_block_stride + at % S.block_size * S.value_slot_stride

    query = operands.query
    keys = _load_rows(operands.k_base, k_rows, S.head_dim, S.block_d)
    keys = _decoded(keys, query.dtype, S)
    scores = tl.dot(query, keys.T, input_precision=S.precision)
    scores, factor = _scored(scores, k_pos, operands, tile, step, S)
    peak = tl.maximum(part.peak, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - peak[:, None])
    keep = tl.exp2(part.peak - peak)
    total = part.total * keep + tl.sum(weights, 1)
    acc = part.acc * keep[:, None]
    acc = _add_values(acc, weights.to(query.dtype), operands.v_base, v_rows, S)
    return _Partial(acc, peak, total)


@triton.jit
def _add_values(acc, weights, v_base, v_rows, S: tl.constexpr):
    if S.is_float8:
        # Matrix units want consecutive keys side by side, and only 16-bit values can be
        # transposed fast. So float8 values come in pairs, and `acc` holds the first values of
        # all pairs before the second values.
        pairs = _load_rows(v_base, v_rows, S.value_dim // 2, S.block_v // 2)
        first = _decoded((pairs & 0xFF).to(tl.uint8), weights.dtype, S)
        second = _decoded(((pairs >> 8) & 0xFF).to(tl.uint8), weights.dtype, S)
        acc_first, acc_second = _halves(acc)
        acc_first = tl.dot(weights, first, acc_first, input_precision=S.precision)
        acc_second = tl.dot(weights, second, acc_second, input_precision=S.precision)
        acc = tl.permute(tl.join(acc_first, acc_second), (0, 2, 1))
        acc = tl.reshape(acc, [S.block_m, S.block_v])
    else:
        values = _load_rows(v_base, v_rows, S.value_dim, S.block_v)
        acc = tl.dot(weights, values, acc, input_precision=S.precision)
    return acc


@triton.jit
def _halves(acc):
    """Split the columns of `acc` into two halves, in a way that moves no register."""
    halves = tl.reshape(acc, [acc.shape[0], 2, acc.shape[1] // 2])
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def _load_rows(base, rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    pointers = base + rows[:, None] + columns[None, :]
    mask = (columns < DIM)[None, :] if DIM < BLOCK else None
    return tl.load(pointers, mask=mask, other=None if mask is None else 0)


@triton.jit
def _decoded(x, dtype: tl.constexpr, S: tl.constexpr):
    """Convert values of a float8_e4m3 cache to `dtype`, by way of float16.

    On a GPU without an instruction for it, moving the bits makes a 256th of the value. Only
    float32 has a fast conversion to bfloat16.
    """
    if S.is_float8:
        if S.as_bits:
            x = x.to(tl.uint16)
            x = (((x & 0x80) << 8) | ((x & 0x7F) << 7)).to(tl.float16, bitcast=True)
        else:
            x = x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        if dtype != tl.float16:
            x = x.to(tl.float32).to(dtype)
    return x


@triton.jit
def _scored(scores, k_pos, operands, tile, step, S: tl.constexpr):
    """Return the masked scores, and the factor that they still have to be multiplied by."""
    q_pos = tile.position + tl.arange(0, S.block_m) // S.group
    factor = operands.factor
    if S.is_float8:
        scores *= operands.row_factors[:, None]
    if S.cap is not None:
        # This is cap * tanh. exp2 must not overflow, and NaN must propagate.
        scores = tl.minimum(scores * factor, 80.0, propagate_nan=tl.PropagateNan.ALL)
        scores = S.cap - 2 * S.cap / (1 + tl.exp2(scores))
        factor = 1.0
    if S.runs:
        scores = _mask(scores, q_pos, k_pos, S)
    else:
        last_query = tile.position + tile.num_queries - 1
        partly = (step + 1) * S.block_n > tile.position + 1
        if S.window is not None:
            partly |= step * S.block_n <= last_query - S.window
        if S.chunk is not None:
            partly |= step * S.block_n < last_query // S.chunk * S.chunk
        if partly:
            scores = _mask(scores, q_pos, k_pos, S)
    return scores, factor


@triton.jit
def _mask(scores, q_pos, k_pos, S: tl.constexpr):
    visible = k_pos[None, :] <= q_pos[:, None]
    if S.window is not None:
        visible &= k_pos[None, :] > (q_pos - S.window)[:, None]
    if S.chunk is not None:
        visible &= k_pos[None, :] >= (q_pos // S.chunk * S.chunk)[:, None]
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _nothing(S: tl.constexpr):
    """Return the partial of no keys."""
    return _Partial(
        tl.full([S.block_m, S.block_v], 0.0, tl.float32),
        tl.full([S.block_m], _NONE_SEEN, tl.float32),
        tl.full([S.block_m], 0.0, tl.float32),
    )


@triton.jit
def _fold(first, second):
    """Return the softmax over the keys of both partials.

    The multiplications and additions are fused by hand, so that they are rounded alike wherever
    the compiler inlines them.
    """
    peak = tl.maximum(first.peak, second.peak)
    keep = tl.exp2(first.peak - peak)
    take = tl.exp2(second.peak - peak)
    takes = tl.broadcast_to(take[:, None], second.acc.shape)
    acc = tl.fma(second.acc, takes, first.acc * keep[:, None])
    return _Partial(acc, peak, tl.fma(second.total, take, first.total * keep))


@triton.jit
def _finish(part, tile, start, stop, scratch, outputs, S: tl.constexpr):
    """Write the output, or store the partial for the last of the tile's programs to merge."""
    if (start == 0) & (stop == tile.num_splits):
        _write_output(outputs, tile, tl.arange(0, S.block_m), part, S)
    else:
        if (start == 0) | (not S.runs):
            _store_partial(scratch, tile, start, part, S)
        # The barrier puts the stores of all threads before the atomic, which releases them to
        # later programs and acquires those of earlier ones: the last program sees all partials.
        # No other program touches them, or the counter, in this launch. The upper half of the
        # counter is the number of first splits that are folded into one partial.
        tl.debug_barrier()
        count = stop - start
        count += tl.where(start == 0, count << 16, 0)
        arrived = tl.atomic_add(scratch.counters + tile.unit, count, sem="acq_rel") + count
        if (arrived & 0xFFFF) == tile.num_splits:
            tl.store(scratch.counters + tile.unit, 0)
            _merge(tile, arrived >> 16, scratch, outputs, S)


@triton.jit
def _merge(tile, num_folded, scratch, outputs, S: tl.constexpr):
    """Fold the partials of the tile, the first of which covers `num_folded` splits."""
    MERGE_N: tl.constexpr = S.merge_n
    num_rows = tile.num_queries * S.group
    for begin in tl.range(0, num_rows, S.merge_m):
        m = begin + tl.arange(0, S.merge_m)
        part = _load_partial(scratch, tile, 0, m, m < num_rows, S)
        for splits in tl.range(num_folded, tile.num_splits, S.merge_n):
            for i in tl.static_range(MERGE_N):
                valid = (m < num_rows) & (splits + i < tile.num_splits)
                part = _fold(part, _load_partial(scratch, tile, splits + i, m, valid, S))
        _write_output(outputs, tile, m, part, S)


@triton.jit
def _store_partial(scratch, tile, split, part, S: tl.constexpr):
    m = tl.arange(0, S.block_m)
    valid = m < tile.num_queries * S.group
    rows = (tile.unit.to(tl.int64) + split) * (S.block_q * S.group)
    acc = scratch.acc + (rows + m)[:, None] * S.block_v
    if S.is_float8:
        v = tl.arange(0, S.block_v // 2)[None, :]
        first, second = _halves(part.acc)
        tl.store(acc + v, first, valid[:, None])
        tl.store(acc + S.block_v // 2 + v, second, valid[:, None])
    else:
        v = tl.arange(0, S.block_v)[None, :]
        tl.store(acc + v, part.acc, valid[:, None])
    stats = scratch.stats + rows * 2 + m
    tl.store(stats, part.peak, valid)
    tl.store(stats + S.block_q * S.group, part.total, valid)


@triton.jit
def _load_partial(scratch, tile, split, m, valid, S: tl.constexpr):
    """Load a partial past the L1 cache, which does not see what other programs store."""
    v = tl.arange(0, S.block_v)
    rows = (tile.unit.to(tl.int64) + split) * (S.block_q * S.group)
    acc = scratch.acc + (rows + m)[:, None] * S.block_v + v[None, :]
    stats = scratch.stats + rows * 2 + m
    return _Partial(
        tl.load(acc, valid[:, None], other=0.0, cache_modifier=".cg"),
        tl.load(stats, valid, other=_NONE_SEEN, cache_modifier=".cg"),
        tl.load(stats + S.block_q * S.group, valid, other=0.0, cache_modifier=".cg"),
    )


@triton.jit
def _write_output(outputs, tile, m, part, S: tl.constexpr):
    v = tl.arange(0, S.block_v)
    q_head = tile.head * S.group + m % S.group
    keep = 1.0
    total = part.total
    if outputs.sinks is not None:
        sink = tl.load(outputs.sinks + q_head).to(tl.float32) * _LOG2E
        peak = tl.maximum(part.peak, sink)
        keep = tl.exp2(part.peak - peak)
        total = total * keep + tl.exp2(sink - peak)
    norm = keep / tl.where(total == 0, 1.0, total)
    if outputs.v_scale is not None:
        norm *= tl.load(outputs.v_scale + tile.head)
    if S.as_bits:
        norm *= 256
    rows = (tile.row + m // S.group).to(tl.int64) * (S.num_kv_heads * S.group) + q_head
    offsets = rows[:, None] * S.value_dim + v[None, :]
    valid = (m < tile.num_queries * S.group)[:, None] & (v < S.value_dim)[None, :]
    dtype = outputs.output.dtype.element_ty
    if S.is_float8:
        first, second = _halves(part.acc)
        first, second = (first * norm[:, None]).to(dtype), (second * norm[:, None]).to(dtype)
        output = tl.interleave(first, second)
    else:
        output = (part.acc * norm[:, None]).to(dtype)
    tl.store(outputs.output + offsets, output, valid)
