"""Plan a step of paged attention: cut its queries into tiles and their keys into splits.

The kernel reads the plan from device memory, so that a captured CUDA graph serves any step of
its shape.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

MAX_SPLITS = 32
"""Most splits of the keys of a decode."""
DECODE_SPLIT = 128
"""Keys in a split of a decode, unless that makes more than `MAX_SPLITS` splits."""
PREFILL_SPLIT = 1024
"""Fewest keys in a split of a prefill tile."""
CHUNK_QUERIES, STEP_QUERIES = 512, 4096
"""Limits on queries x splits, for a chunk and for a step.

Larger batches already have enough tiles. The limit for a step also bounds the memory for
partials, and the number of programs of a captured step that find nothing to do.
"""
_TILE_ROWS = 128
"""Rows of a prefill tile: queries times the query heads that share a key/value head."""


@dataclass(frozen=True, slots=True)
class Work:
    """The tiles to compute, with one item for each of their splits.

    items      [capacity, 6] int32, on the device, of which the first `num_items` are used. The
               items of a tile follow one another; tiles with several splits come first.
               0  slot of the sequence
               1  row of the first query in the packed row
               2  number of queries, 1 to block_q
               3  position of the first query; minus the number of queries for padding rows,
                  whose output is zero
               4  index of the split in the tile, ascending
               5  number of splits of the tile
    num_items  [1] int32, on the device
    block_q    most queries of a tile
    """

    items: Tensor
    num_items: Tensor
    block_q: int


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """The work of a step, as every attention layer needs it. All tensors are on the device.

    slot_mapping  [num_tokens] int64
    block_tables  [num_slots, max_blocks] int32: the blocks of the sequence in each slot
    decode        work of the sequences with one query
    prefill       work of the sequences with several queries, by the `block_q` of a layer
    counters      [`num_counters`] int32, zero before and after every launch
    """

    slot_mapping: Tensor
    block_tables: Tensor
    decode: Work | None
    prefill: dict[int, Work]
    counters: Tensor


def plan_decode(slots: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the items, [n, 6] int32, of sequences with one query each.

    slots, positions, rows  [num_sequences]: of each sequence its slot, the position of its
                            query and the query's row
    """
    num_splits = np.minimum(np.maximum(positions, 0) // DECODE_SPLIT + 1, MAX_SPLITS)
    return _items(slots, rows, 1, positions, num_splits)


def plan_prefill(
    slots: np.ndarray,
    query_lens: np.ndarray,
    seq_lens: np.ndarray,
    rows: np.ndarray,
    block_q: int,
    may_split: bool = True,
) -> np.ndarray:
    """Return the items, [n, 6] int32, of chunks with several queries.

    The queries of a chunk are the last `query_lens` of its `seq_lens` positions, in the packed
    row from `rows` on. Tiles with many keys come before tiles with few, so that the last
    program to finish is a short one. Into how many splits keys are cut depends on the size of the
    chunk and of the step, unless `may_split` is False: then there is one.
    """
    num_tiles = -(-query_lens // block_q)
    chunk = np.repeat(np.arange(len(slots)), num_tiles)
    start = (np.arange(len(chunk)) - (np.cumsum(num_tiles) - num_tiles)[chunk]) * block_q
    num_queries = np.minimum(query_lens[chunk] - start, block_q)
    positions = (seq_lens - query_lens)[chunk] + start

    num_splits = np.minimum(
        -(-(positions + num_queries) // PREFILL_SPLIT),
        CHUNK_QUERIES // (num_tiles * block_q)[chunk],
    )
    num_splits = np.maximum(num_splits, 1) if may_split else np.ones_like(num_splits)
    if num_splits[num_splits > 1].sum() * block_q > STEP_QUERIES:
        num_splits = np.minimum(num_splits, max(STEP_QUERIES // (len(chunk) * block_q), 1))
    order = np.lexsort((-positions, num_splits == 1))
    columns = (slots[chunk], rows[chunk] + start, num_queries, positions, num_splits)
    return _items(*(column[order] for column in columns))


def plan_padding(slot: int, first_row: int, num_rows: int, block_q: int) -> np.ndarray:
    """Return the items, [n, 6] int32, of consecutive rows that belong to no sequence."""
    start = np.arange(0, num_rows, block_q)
    num_queries = np.minimum(num_rows - start, block_q)
    slots, splits = np.full_like(start, slot), np.ones_like(start)
    return _items(slots, first_row + start, num_queries, -num_queries, splits)


def _items(
    slots: np.ndarray,
    rows: np.ndarray,
    num_queries: np.ndarray | int,
    positions: np.ndarray,
    num_splits: np.ndarray,
) -> np.ndarray:
    first = np.cumsum(num_splits) - num_splits
    tiles = np.empty((len(slots), 6), dtype=np.int32)
    for column, values in enumerate((slots, rows, num_queries, positions, first, num_splits)):
        tiles[:, column] = values
    items = tiles.repeat(num_splits, axis=0)
    which = items[:, 4]
    np.subtract(np.arange(len(items), dtype=np.int32), which, out=which)
    return items


def block_q_for(group_size: int) -> int:
    """Return the queries of a prefill tile where `group_size` query heads share a KV head."""
    return max(_TILE_ROWS // group_size, 1)


def decode_capacity(num_rows: int, max_sequences: int) -> int:
    """Return how many items `num_rows` rows may need, all but `max_sequences` being padding."""
    return min(num_rows, max_sequences) * MAX_SPLITS + num_rows


def prefill_capacity(num_tokens: int, block_q: int) -> int:
    """Return how many items the chunks and the padding in `num_tokens` tokens may need.

    A chunk has 2 tokens or more, all the padding together counts as one chunk.
    """
    max_chunks = (num_tokens + 1) // 2
    max_tiles = max_chunks + num_tokens // block_q
    return min(max_chunks * (CHUNK_QUERIES // block_q), STEP_QUERIES // block_q) + max_tiles


def num_counters(max_decode_items: int, num_heads: int, num_kv_heads: int) -> int:
    """Return how many counters a step with `max_decode_items` decode items may need."""
    max_prefill_items = STEP_QUERIES // block_q_for(num_heads // num_kv_heads)
    return max(max_decode_items, max_prefill_items) * num_kv_heads
