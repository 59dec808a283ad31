"""Plans of paged attention: how a step's queries and keys are cut into work items."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.attention.kv_cache import AttentionCall
from engine.attention.plan import FixedTables, GraphShape, StepSequences, TritonPlanner
from kernels.ops import TRITON
from kernels.paged_attention.mask import MaskSpec
from kernels.paged_attention.plan import (
    CHUNK_QUERIES,
    DECODE_SPLIT,
    MAX_SPLITS,
    PREFILL_SPLIT,
    STEP_QUERIES,
    PagedBatch,
    block_q_for,
    decode_capacity,
    plan_decode,
    plan_prefill,
    prefill_capacity,
)

chunks = st.lists(st.tuples(st.integers(1, 700), st.integers(0, 40_000)), min_size=1, max_size=20)


def plan(lens: list[tuple[int, int]], block_q: int) -> np.ndarray:
    query_lens, before = np.array(lens).T
    rows = np.cumsum(query_lens) - query_lens
    return plan_prefill(np.arange(len(lens)), query_lens, query_lens + before, rows, block_q)


@given(chunks, st.sampled_from([1, 18, 32, 128]))
def test_tiles_cover_every_query_once(lens: list[tuple[int, int]], block_q: int) -> None:
    items = plan(lens, block_q)
    assert items.dtype == np.int32
    covered = [
        (slot, row + i, position + i)
        for slot, row, num_queries, position, split, _ in items.tolist()
        for i in range(num_queries)
        if split == 0
    ]
    rows = np.cumsum([0] + [n for n, _ in lens])
    assert sorted(covered) == [
        (slot, rows[slot] + i, before + i)
        for slot, (n, before) in enumerate(lens)
        for i in range(n)
    ]
    assert items[:, 2].min() >= 1
    assert items[:, 2].max() <= block_q


@given(chunks, st.sampled_from([1, 18, 32, 128]))
def test_splits_of_a_tile_follow_one_another(lens: list[tuple[int, int]], block_q: int) -> None:
    items = plan(lens, block_q).tolist()
    while items:
        *tile, _, num_splits = items[0]
        assert items[:num_splits] == [[*tile, i, num_splits] for i in range(num_splits)]
        items = items[num_splits:]


@given(chunks, st.sampled_from([1, 18, 32, 128]))
def test_split_tiles_come_first_and_are_bounded(lens: list[tuple[int, int]], block_q: int) -> None:
    """Only the first units have scratch memory and counters."""
    num_splits = plan(lens, block_q)[:, 5]
    assert (np.diff((num_splits == 1).astype(int)) >= 0).all()
    assert (num_splits > 1).sum() * block_q <= STEP_QUERIES


def test_steps_with_more_chunks_split_each_chunk_less() -> None:
    lens = [(32, 40_000)] * (STEP_QUERIES // CHUNK_QUERIES)
    assert (plan(lens, 32)[:, 5] == 16).all()
    assert plan([*lens, (4000, 0)], 32)[0, 5] == 16
    assert (plan([*lens, (32, 40_000)], 32)[:, 5] == 14).all()
    assert (plan(lens * 16, 32)[:, 5] == 1).all()


def test_long_chunks_and_short_contexts_are_not_split() -> None:
    assert (plan([(CHUNK_QUERIES, 40_000)], 32)[:, 5] == 1).all()
    assert (plan([(32, PREFILL_SPLIT - 32)], 32)[:, 5] == 1).all()
    assert (plan([(32, PREFILL_SPLIT - 31)], 32)[:, 5] == 2).all()


@given(
    st.lists(st.tuples(st.integers(2, 256), st.integers(0, 40_000)), min_size=1, max_size=128),
    st.sampled_from([1, 18, 32, 128]),
)
def test_a_graphs_items_fit_whatever_chunks_it_gets(
    lens: list[tuple[int, int]], block_q: int
) -> None:
    num_tokens = sum(length for length, _ in lens)
    assert len(plan(lens, block_q)) <= prefill_capacity(num_tokens, block_q)


@given(
    st.lists(st.tuples(st.integers(2, 256), st.integers(0, 40_000)), max_size=40),
    st.integers(1, 20),
    st.integers(1, 200),
    st.sampled_from([1, 2, 4, 32]),
)
def test_padding_of_a_mixed_graph_is_tiles_without_keys(
    lens: list[tuple[int, int]], num_decodes: int, num_padding: int, group: int
) -> None:
    """Each row is in one item or one tile, and padding takes an item for `block_q` rows."""
    sequences = [*lens, *[(1, 77)] * num_decodes]
    lengths, starts = np.array([*sequences, *[(1, -1)] * num_padding]).T
    num_tokens = int(lengths.sum())
    step = StepSequences(np.arange(len(lengths)), starts, lengths)
    call = AttentionCall(torch.nn.Identity(), group, 1, 128, 128, MaskSpec())
    shape = len(sequences) + num_padding, 4
    planner = TritonPlanner([call], shape, num_tokens, torch.device("cpu"), False)
    arrays = planner.plan(step, np.zeros(shape), GraphShape(num_tokens, 1, prefills=True)).arrays
    block_q = block_q_for(group)
    decodes = arrays["decode"][: arrays["num_decode"][0]]
    tiles = arrays[f"prefill_{block_q}"][: arrays[f"num_prefill_{block_q}"][0]]
    covered = [
        row + i
        for _, row, num_queries, _, split, _ in [*decodes.tolist(), *tiles.tolist()]
        for i in range(num_queries)
        if split == 0
    ]
    assert sorted(covered) == list(range(num_tokens))
    assert len(decodes) == num_decodes
    nobodys = tiles[tiles[:, 3] < 0]
    assert len(nobodys) == -(-num_padding // block_q)
    assert (nobodys[:, 2] == -nobodys[:, 3]).all()


def test_a_graphs_items_fit_whatever_decodes_it_gets() -> None:
    nobodys = np.full(9, -1)
    for num_sequences in (1, 4, 7):
        positions = np.concatenate([np.full(num_sequences, 10**6), nobodys])
        items = plan_decode(positions, positions, positions)
        assert len(items) <= decode_capacity(len(positions), max_sequences=num_sequences)


@pytest.mark.parametrize("num_sequences", [1, 5, 8, 31])
def test_fixed_tables_have_counters_for_all_their_sequences(num_sequences: int) -> None:
    call = AttentionCall(torch.nn.Identity(), 32, 8, 128, 128, MaskSpec())
    tables = np.zeros((num_sequences, 256), dtype=np.int64)
    ones = np.ones(num_sequences, dtype=np.int64)
    step = StepSequences(np.arange(num_sequences), ones * 4095, ones)
    batch = FixedTables(TRITON, [call], tables, torch.device("cpu")).metadata(step)
    assert isinstance(batch, PagedBatch)
    assert batch.decode is not None
    assert len(batch.counters) >= len(batch.decode.items) * call.num_kv_heads


def test_where_keys_must_not_be_split_no_tile_has_two_splits() -> None:
    lens = np.array([5, 100])
    ends = np.array([9000, 4000])
    rows = np.array([0, 5])
    assert plan_prefill(np.arange(2), lens, ends, rows, 32)[:, 5].max() > 1
    items = plan_prefill(np.arange(2), lens, ends, rows, 32, may_split=False)
    assert (items[:, 5] == 1).all()
    assert len(items) == 1 + 4


def test_splits_of_a_decode_depend_on_its_position_alone() -> None:
    positions = np.array([-1, 0, 127, 128, 4000, 4095, 4096, 10**6])
    items = plan_decode(np.arange(8), positions, np.arange(8)[::-1])
    tiles = items[items[:, 4] == 0]
    assert tiles[:, 5].tolist() == [1, 1, 1, 2, 32, 32, 32, 32]
    assert tiles[:, 0].tolist() == list(range(8))
    assert tiles[:, 1].tolist() == list(range(8))[::-1]
    assert tiles[:, 3].tolist() == positions.tolist()
    assert (tiles[:, 2] == 1).all()
    assert DECODE_SPLIT * MAX_SPLITS == 4096


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 48, 128])
def test_tiles_are_as_many_rows_as_fit(group: int) -> None:
    assert 128 - group < block_q_for(group) * group <= 128
