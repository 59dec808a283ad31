"""Plan a step of paged attention: cut its queries into tiles and their keys into splits.

The kernel reads the plan from device memory, so that a captured CUDA graph serves any step of
its shape.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

MAX_SPLITS = 32
"""Of the keys of a decode."""
DECODE_SPLIT = 128
"""Keys in a split of a decode, as long as that makes no more than `MAX_SPLITS`."""
PREFILL_SPLIT = 1024
"""Keys in a split of a prefill tile, at least."""
CHUNK_QUERIES, STEP_QUERIES = 512, 4096
"""Times their splits, so many queries of a chunk are split, and so many of a step: what
has more has tiles enough, and the second bounds the memory for partials, and how many programs
of a captured step find nothing to do."""
_TILE_ROWS = 128
"""Of a prefill tile: queries times the heads that share keys."""


@dataclass(frozen=True, slots=True)
class Work:
    """Tiles to compute, by their splits.

    items      [capacity, 6] int32, on the device: the first `num_items` of them are real.
               Those of a tile follow one another; tiles with several splits come first.
               0  slot of the sequence
               1  row of the first query in the packed row
               2  number of queries, 1 to block_q
               3  position of the first query; -1: nobody's, its output is zero
               4  which split of the tile, ascending
               5  number of splits
    num_items  [1] int32, on the device
    """

    items: Tensor
    num_items: Tensor
    block_q: int


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """What every attention layer of one step needs to know.

    slot_mapping  [num_tokens] int64
    block_tables  [num_slots, max_blocks] int32: the blocks of each slot's sequence
    decode        sequences with one query
    prefill       sequences with several, by the `block_q` that a layer needs
    counters      [`num_counters`] int32: zero before and after every launch
    """

    slot_mapping: Tensor
    block_tables: Tensor
    decode: Work | None
    prefill: dict[int, Work]
    counters: Tensor


def plan_decode(slots: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Items, [n, 6] int32, for sequences with one query each, at `positions` and `rows`."""
    num_splits = np.minimum(np.maximum(positions, 0) // DECODE_SPLIT + 1, MAX_SPLITS)
    return _items(slots, rows, 1, positions, num_splits)


def plan_prefill(
    slots: np.ndarray,
    query_lens: np.ndarray,
    seq_lens: np.ndarray,
    rows: np.ndarray,
    block_q: int,
) -> np.ndarray:
    """Items, [n, 6] int32, for chunks: the last `query_lens` of `seq_lens`, from `rows` on.

    Tiles with many keys come before those with few, so that the last to finish is short.
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
    num_splits = np.maximum(num_splits, 1)
    if num_splits[num_splits > 1].sum() * block_q > STEP_QUERIES:
        num_splits = np.minimum(num_splits, max(STEP_QUERIES // (len(chunk) * block_q), 1))
    order = np.lexsort((-positions, num_splits == 1))
    columns = (slots[chunk], rows[chunk] + start, num_queries, positions, num_splits)
    return _items(*(column[order] for column in columns))


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
    """Queries in a prefill tile, where so many query heads share a key/value head."""
    return max(_TILE_ROWS // group_size, 1)


def decode_capacity(num_rows: int, max_sequences: int) -> int:
    """Items that so many rows may need, where no more than `max_sequences` are anybody's."""
    return min(num_rows, max_sequences) * MAX_SPLITS + num_rows


def prefill_capacity(num_tokens: int, block_q: int) -> int:
    """Items that chunks of so many tokens in all may need, each of two at least."""
    max_chunks = num_tokens // 2
    max_tiles = max_chunks + num_tokens // block_q
    return min(max_chunks * (CHUNK_QUERIES // block_q), STEP_QUERIES // block_q) + max_tiles


def num_counters(max_decode_items: int, num_heads: int, num_kv_heads: int) -> int:
    """Counters that steps of no more decode items may need."""
    max_prefill_items = STEP_QUERIES // block_q_for(num_heads // num_kv_heads)
    return max(max_decode_items, max_prefill_items) * num_kv_heads
