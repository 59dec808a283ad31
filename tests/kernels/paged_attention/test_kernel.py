"""Paged attention in Triton against dense attention in float64, one query at a time.

Every slot of the cache that no sequence owns holds NaN or an infinity, and every entry of
the block tables that no sequence has yet is a block of those.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.paged_attention.launch import paged_attention_triton
from kernels.paged_attention.mask import NO_LIMIT, MaskSpec
from kernels.paged_attention.plan import (
    MAX_SPLITS,
    PagedBatch,
    Work,
    block_q_for,
    num_counters,
    plan_decode,
    plan_padding,
    plan_prefill,
)
from kernels.paged_attention.reference import AttentionMetadata, paged_attention_torch
from kernels.target import Target, using_target
from tests.kernels.paged_attention.dense import (
    DTYPES,
    Case,
    Sequence,
    attend,
    garbage,
    make_sequences,
)
from tests.thorough import THOROUGH

pytestmark = pytest.mark.slow  # interpreted; the engine's own tests run the kernel in the fast core
BLOCK_SIZE = 16

# -- the paged side -------------------------------------------------------------------


@dataclass
class Paged:
    """The sequences of a case in shuffled blocks of a cache, with their queries packed."""

    case: Case
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    batch: PagedBatch
    slots: np.ndarray
    query_lens: list[int]

    def run_torch(self) -> list[Tensor]:
        case = self.case
        slots = self.slots
        metadata = AttentionMetadata(
            query_lens=np.array(self.query_lens[:-1]),
            seq_lens=np.array([len(seq.key) for seq in case.sequences]),
            block_tables=self.batch.block_tables.numpy()[slots].astype(np.int64),
            slot_mapping=self.batch.slot_mapping,
            block_size=BLOCK_SIZE,
        )
        output = paged_attention_torch(
            self.query,
            self.key_cache,
            self.value_cache,
            metadata,
            case.spec,
            case.scale,
            case.softcap,
            case.sinks,
            case.k_scale,
            case.v_scale,
        )
        return list(output.split(self.query_lens))

    def run(self) -> list[Tensor]:
        """Return the output of each sequence; rows of no sequence come last."""
        case = self.case
        output = paged_attention_triton(
            self.query,
            self.key_cache,
            self.value_cache,
            self.batch,
            case.spec,
            case.scale,
            case.softcap,
            case.sinks,
            case.k_scale,
            case.v_scale,
        )
        assert output.dtype == self.query.dtype
        assert output.shape == (*self.query.shape[:2], self.value_cache.shape[-1])
        assert not self.batch.counters.any()
        return list(output.split(self.query_lens))


def page(case: Case, seed: int = 0, spare_items: int = 3, dummies: int = 0) -> Paged:
    """Put a case into a cache.

    spare_items  meaningless items after the real ones
    dummies      padding rows after the decodes
    """
    rng = np.random.default_rng(seed)
    seqs = case.sequences
    seq_lens = np.array([len(seq.key) for seq in seqs])
    query_lens = np.array([len(seq.query) for seq in seqs])
    num_blocks = -(-seq_lens // BLOCK_SIZE)
    free = rng.permutation(num_blocks.sum() + 3)  # the last ones are nobody's
    tables = np.full((len(seqs) + 4, num_blocks.max() + 2), free[-1], dtype=np.int32)
    slots = rng.permutation(len(tables))[: len(seqs)]
    for slot, n in zip(slots, num_blocks, strict=True):
        tables[slot, :n], free = free[:n], free[n:]

    key_cache, value_cache = (
        garbage((num_blocks.sum() + 3, BLOCK_SIZE, *x.shape[1:]), x.dtype, rng)
        for x in (seqs[0].key, seqs[0].value)
    )
    for seq, slot in zip(seqs, slots, strict=True):
        positions = np.arange(len(seq.key))
        where = tables[slot, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        for cache, x in ((key_cache, seq.key), (value_cache, seq.value)):
            as_bytes(cache).flatten(0, 1)[torch.from_numpy(where)] = as_bytes(x)

    queries = torch.cat([seq.query for seq in seqs])
    queries = torch.cat([queries, queries.new_full((dummies, *queries.shape[1:]), math.nan)])
    batch = make_batch(tables, slots, query_lens, seq_lens, queries, key_cache, dummies)
    return Paged(
        case=case,
        # Heads first in memory, as a transformers module makes them.
        query=queries.transpose(0, 1).contiguous().transpose(0, 1),
        key_cache=key_cache,
        value_cache=value_cache,
        batch=with_spare_items(batch, spare_items),
        slots=slots,
        query_lens=[*query_lens.tolist(), dummies],
    )


def make_batch(
    tables: np.ndarray,
    slots: np.ndarray,
    query_lens: np.ndarray,
    seq_lens: np.ndarray,
    queries: Tensor,
    key_cache: Tensor,
    dummies: int,
) -> PagedBatch:
    num_heads, num_kv_heads = queries.shape[1], key_cache.shape[2]
    block_q = block_q_for(num_heads // num_kv_heads)
    rows = np.cumsum(query_lens) - query_lens
    one = query_lens == 1
    last_rows = np.arange(query_lens.sum(), len(queries))
    decode = plan_decode(
        np.concatenate([slots[one], np.zeros(dummies, dtype=np.int64)]),
        np.concatenate([seq_lens[one] - 1, np.full(dummies, -1)]),
        np.concatenate([rows[one], last_rows]),
    )
    prefill = plan_prefill(slots[~one], query_lens[~one], seq_lens[~one], rows[~one], block_q)
    return PagedBatch(
        slot_mapping=torch.empty(0, dtype=torch.int64),
        block_tables=torch.from_numpy(tables),
        decode=work(decode, 1) if len(decode) else None,
        prefill={block_q: work(prefill, block_q)} if len(prefill) else {},
        counters=torch.zeros(num_counters(len(decode), num_heads, num_kv_heads), dtype=torch.int32),
    )


def work(items: np.ndarray, block_q: int) -> Work:
    return Work(torch.from_numpy(items), torch.tensor([len(items)], dtype=torch.int32), block_q)


def with_spare_items(batch: PagedBatch, count: int) -> PagedBatch:
    def spare(work: Work) -> Work:
        nonsense = torch.full((count, 6), 1 << 30, dtype=torch.int32)
        return dataclasses.replace(work, items=torch.cat([work.items, nonsense]))

    return dataclasses.replace(
        batch,
        decode=None if batch.decode is None else spare(batch.decode),
        prefill={block_q: spare(work) for block_q, work in batch.prefill.items()},
        counters=torch.cat([batch.counters, batch.counters]),
    )


def as_bytes(x: Tensor) -> Tensor:
    """View float8 as bytes, as float8 cannot be indexed on the CPU."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def error_bound(case: Case, dtype: torch.dtype) -> float:
    """Bound the rounding of weights, outputs, scores and sums."""
    unit = torch.finfo(dtype).eps / 2
    factor = 60 if dtype == torch.float32 else 2.5
    largest = max(float(seq.value.float().abs().max()) for seq in case.sequences)
    if case.v_scale is not None:
        largest *= float(case.v_scale.max())
    return unit * factor * largest


def check(case: Case, seed: int = 0, implementation: str = "triton") -> None:
    paged = page(case, seed)
    outputs = paged.run() if implementation == "triton" else paged.run_torch()
    for seq, output in zip(case.sequences, outputs, strict=False):
        error = float((output.double() - attend(case, seq)[0]).abs().max())
        bound = error_bound(case, output.dtype)
        assert error <= bound, f"{error:.2g} > {bound:.2g}"


MIXED = [(1, 40), (17, 17), (1, 1), (5, 33), (1, 300), (70, 150), (1, 129), (1, 128), (2, 2)]
"""Decodes of one and of several splits, and chunks, at and off borders of blocks and tiles."""
SHORT = [(1, 40), (1, 129), (5, 33), (1, 16), (20, 20)]

slow = pytest.mark.slow
one_dtype = pytest.mark.parametrize(
    "dtype", [DTYPES[1], *(pytest.param(dtype, marks=slow) for dtype in (DTYPES[0], DTYPES[2]))]
)

# -- shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_decodes_and_prefill_chunks_in_one_call(dtype: torch.dtype) -> None:
    check(Case(make_sequences(MIXED, dtype=dtype)))


@pytest.mark.parametrize(
    ("num_kv_heads", "group"),
    [(3, 1), (2, 2), (1, 1), (2, 3), (1, 7), (1, 16), pytest.param(1, 71, marks=slow)],
    ids=str,
)
def test_multi_head_grouped_query_and_multi_query_attention(num_kv_heads: int, group: int) -> None:
    check(Case(make_sequences(SHORT, num_kv_heads, group)))


@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [(16, 16), (80, 80), (24, 72), (192, 128)]
    + [pytest.param(dim, dim, marks=slow) for dim in (64, 96, 112, 128, 256)],
    ids=str,
)
def test_keys_and_values_may_have_any_sizes(head_dim: int, value_dim: int) -> None:
    sequences = make_sequences(SHORT, 1, 2, head_dim, value_dim, torch.bfloat16)
    check(Case(sequences, scale=head_dim**-0.5))


def test_a_batch_may_have_only_decodes_or_only_chunks() -> None:
    check(Case(make_sequences([(1, 70), (1, 9)])))
    check(Case(make_sequences([(7, 70), (33, 33)])))


@pytest.mark.parametrize(
    "queries", [1, 2, pytest.param(65, marks=slow), pytest.param(130, marks=slow)]
)
def test_the_last_queries_of_a_long_context(queries: int) -> None:
    """The keys make many splits, one of which is short."""
    check(Case(make_sequences([(queries, 2500)], 1, 2, 16)))


@slow
@pytest.mark.parametrize("length", [4095, 4096, 4097, 5000])
def test_a_decode_has_at_most_max_splits(length: int) -> None:
    [seq] = make_sequences([(1, length)], 1, 4, 16)
    decode = page(case := Case([seq]), spare_items=0).batch.decode
    assert decode is not None
    assert len(decode.items) == MAX_SPLITS
    check(case)


# -- which keys are seen --------------------------------------------------------------


@pytest.mark.parametrize(
    "window", [1, 17, 64, *(pytest.param(n, marks=slow) for n in (2, 16, 63, 65, 128, 299, 300))]
)
def test_a_window_hides_earlier_keys(window: int) -> None:
    check(Case(make_sequences(MIXED), MaskSpec(window=window)))


@pytest.mark.parametrize(
    "chunk", [1, 17, 64, *(pytest.param(n, marks=slow) for n in (2, 16, 63, 65, 128, 299, 300))]
)
def test_a_chunk_hides_the_keys_of_earlier_chunks(chunk: int) -> None:
    check(Case(make_sequences(MIXED), MaskSpec(chunk=chunk)))


@pytest.mark.parametrize(
    "spec", [MaskSpec(), MaskSpec(window=65), MaskSpec(chunk=65)], ids=["all", "window", "chunk"]
)
def test_prefill_chunks_may_start_anywhere_in_a_step(spec: MaskSpec) -> None:
    """The kernel masks scores only in steps that some query sees in part."""
    check(Case(make_sequences([(4, n) for n in range(100, 133)], head_dim=16), spec))


@pytest.mark.parametrize("spec", [MaskSpec(window=100), MaskSpec(chunk=300)], ids=str)
def test_what_no_query_sees_is_not_read(spec: MaskSpec) -> None:
    """Blocks before the first visible step may belong to another sequence by now."""
    case = Case(make_sequences([(1, 700), (5, 800)]), spec)
    paged = page(case)
    expected = paged.run()
    for seq, slot in zip(case.sequences, paged.slots, strict=True):
        first_query = len(seq.key) - len(seq.query)
        first_seen = max(first_query - spec.window + 1, first_query // spec.chunk * spec.chunk)
        unread = paged.batch.block_tables[slot, : first_seen // 128 * 128 // BLOCK_SIZE]
        assert len(unread)
        unread.fill_(paged.batch.block_tables[slot, -1])
    assert all(map(torch.equal, paged.run(), expected))


def test_a_window_and_chunks_combine() -> None:
    check(Case(make_sequences(MIXED), MaskSpec(window=10, chunk=24)))


@pytest.mark.parametrize("spec", [MaskSpec(window=100), MaskSpec(chunk=700)], ids=str)
def test_a_mask_may_leave_few_keys_of_a_long_context(spec: MaskSpec) -> None:
    """With fewer steps than splits, some splits have nothing to do."""
    check(Case(make_sequences([(1, 2500), (3, 2500), (1, 2101), (40, 2400)], 1, 2, 16), spec))


def test_a_window_of_one_is_the_value_itself() -> None:
    case = Case(make_sequences(SHORT, 2, 1), MaskSpec(window=1))
    for seq, output in zip(case.sequences, page(case).run(), strict=False):
        torch.testing.assert_close(output, seq.value[-len(seq.query) :])


# -- how scores are made --------------------------------------------------------------


@one_dtype
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap_bounds_the_scores(softcap: float, dtype: torch.dtype) -> None:
    check(Case(make_sequences(SHORT, dtype=dtype), softcap=softcap))


@one_dtype
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sinks_take_part_in_the_softmax(softcap: float | None, dtype: torch.dtype) -> None:
    sinks = torch.tensor([-3.0, 0.0, 1.5, 6.0]).to(dtype)
    check(Case(make_sequences(SHORT, 2, dtype=dtype), softcap=softcap, sinks=sinks))


def test_a_sink_of_minus_infinity_takes_nothing_and_a_huge_one_all() -> None:
    case = Case(make_sequences(SHORT, 2))
    plain = torch.cat(page(case).run())
    none = dataclasses.replace(case, sinks=torch.full((4,), -math.inf))
    torch.testing.assert_close(torch.cat(page(none).run()), plain)
    all_of_it = dataclasses.replace(case, sinks=torch.full((4,), 1e4))
    assert not torch.cat(page(all_of_it).run()).any()


@pytest.mark.parametrize("scale", [0.001, 1.0, 1 / math.sqrt(224)])
def test_scores_are_multiplied_by_the_models_scale(scale: float) -> None:
    check(Case(make_sequences(SHORT), scale=scale))


@one_dtype
@pytest.mark.parametrize("softcap", [None, 1000.0])
def test_scores_of_hundreds_neither_overflow_nor_vanish(
    dtype: torch.dtype, softcap: float | None
) -> None:
    """All keys are equal, so that rounding of the scores decides nothing."""
    key = torch.full((32,), 20.0, dtype=dtype)
    for sign in (1, -1):
        sequences = [
            Sequence(sign * key.expand_as(s.query), key.expand_as(s.key), s.value)
            for s in make_sequences(SHORT, dtype=dtype)
        ]
        check(Case(sequences, scale=32**-0.5, softcap=softcap))


# -- float8 caches --------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@one_dtype
def test_a_float8_cache_is_multiplied_by_its_scales(
    dtype: torch.dtype, implementation: str
) -> None:
    case = Case(
        make_sequences(SHORT, 2, dtype=dtype, cache_dtype=torch.float8_e4m3fn),
        k_scale=torch.tensor([0.75, 1.5]),
        v_scale=torch.tensor([0.01, 3.0]),
        softcap=30.0,
    )
    check(case, implementation=implementation)


@pytest.mark.parametrize("capability", [80, 90])
def test_every_float8_value_is_decoded_exactly(capability: int) -> None:
    """Capability 90 has an instruction for it, 80 has none. With a window of one key, the output
    is its value.
    """
    target = Target(capability, shared_bytes=99 << 10, num_sms=1)
    finite = [x for x in range(256) if x & 0x7F != 0x7F]
    value = torch.tensor(finite, dtype=torch.uint8).view(torch.float8_e4m3fn)
    [seq] = make_sequences([(4, 4)], 1, 1)
    seq = Sequence(seq.query, seq.key.to(value.dtype), value.expand(4, 1, -1))
    with using_target(target):
        [output, _] = page(Case([seq], MaskSpec(window=1))).run()
    assert torch.equal(output, value.float().expand_as(output))


@pytest.mark.parametrize("largest", [1e-20, 1.0, 1e30])
def test_queries_may_exceed_the_range_of_float16(largest: float) -> None:
    """Products with float8 keys are computed in float16, for which queries are scaled."""
    sequences = [
        dataclasses.replace(s, query=s.query * largest)
        for s in make_sequences(
            SHORT, dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, seed=3
        )
    ]
    check(Case(sequences, scale=0.25 / largest))


# -- each sequence for itself ---------------------------------------------------------


@pytest.mark.parametrize(
    "spec", [MaskSpec(), pytest.param(MaskSpec(window=300), marks=slow)], ids=str
)
def test_a_sequence_alone_is_to_the_bit_the_sequence_in_company(spec: MaskSpec) -> None:
    """Programs take different runs of splits, depending on the other sequences."""
    lens = [(1, 500), (3, 1100), (1, 129), (60, 60), (1, 40)]
    case = Case(make_sequences(lens, 2, 2, 16), spec)
    together = page(case).run()
    for i, seq in enumerate(case.sequences):
        own = dataclasses.replace(case, sequences=[seq])
        assert torch.equal(page(own, seed=i + 1).run()[0], together[i])


def test_the_number_of_programs_changes_no_bit() -> None:
    case = Case(make_sequences([(1, 700), (1, 129), (1, 400), (1, 40)], 2, 2, 16))
    outputs = []
    for num_sms in (1, 2, 5, 50):
        target = Target(capability=80, shared_bytes=163 << 10, num_sms=num_sms)
        with using_target(target):
            outputs.append(torch.cat(page(case).run()))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_how_a_prompt_is_cut_into_chunks_changes_nothing() -> None:
    [whole] = make_sequences([(180, 180)])
    case = Case([whole], MaskSpec(window=83))
    expected = page(case).run()[0]
    parts = []
    for start, end in [(0, 7), (7, 77), (77, 79), (79, 180)]:
        part = Sequence(whole.query[start:end], whole.key[:end], whole.value[:end])
        parts.append(page(dataclasses.replace(case, sequences=[part]), seed=start).run()[0])
    # To the bit on a GPU; numpy's products depend on where in a matrix a row is.
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("sick", range(3))
def test_a_sequence_of_nan_harms_no_other(sick: int) -> None:
    case = Case(make_sequences([(1, 200), (5, 33), (1, 9)]), softcap=10.0)
    healthy = page(case).run()
    poisoned = list(case.sequences)
    poisoned[sick] = Sequence(
        *(torch.full_like(x, math.nan) for x in vars(poisoned[sick]).values())
    )
    outputs = page(dataclasses.replace(case, sequences=poisoned)).run()
    assert outputs[sick].isnan().all()
    for i in {0, 1, 2} - {sick}:
        assert torch.equal(outputs[i], healthy[i])


# -- what a graph needs ---------------------------------------------------------------


def test_the_output_of_padding_rows_is_zero() -> None:
    case = Case(make_sequences(SHORT, 2), sinks=torch.zeros(4), softcap=3.0)
    *outputs, dummies = page(case, dummies=5).run()
    assert dummies.shape[0] == 5
    assert not dummies.any()
    assert all(map(torch.equal, outputs, page(case).run()))


@pytest.mark.parametrize("num_padding", [1, 64, 150])
def test_padding_rows_may_be_tiles(num_padding: int) -> None:
    """As in a captured step with chunks, whatever the mask."""
    spec = MaskSpec(window=9, chunk=16)
    case = Case(make_sequences(SHORT, 2), sinks=torch.zeros(4), softcap=3.0, spec=spec)
    paged = page(case, dummies=num_padding)
    expected = paged.run()
    block_q = block_q_for(2)
    (prefill,) = paged.batch.prefill.values()
    assert paged.batch.decode is not None
    items = [prefill.items.numpy()[: int(prefill.num_items)]]
    items.append(plan_padding(0, sum(paged.query_lens[:-1]), num_padding, block_q))
    paged.batch = dataclasses.replace(
        paged.batch,
        decode=dataclasses.replace(
            paged.batch.decode, num_items=paged.batch.decode.num_items - num_padding
        ),
        prefill={block_q: work(np.concatenate(items), block_q)},
    )
    outputs = paged.run()
    assert not outputs[-1].any()
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.parametrize("num_sms", [1, 3, 7, 1000])
def test_the_number_of_programs_changes_no_bit_of_a_chunk(num_sms: int) -> None:
    case = Case(make_sequences([(1, 3000), (70, 500), (1, 40), (300, 300), (33, 2100)], 2))
    expected = page(case).run()
    with using_target(Target(80, 163 << 10, num_sms)):
        assert all(map(torch.equal, page(case).run(), expected))


def test_a_batch_may_be_all_padding() -> None:
    [seq] = make_sequences([(1, 1)])
    paged = page(Case([seq]), dummies=3)
    assert paged.batch.decode is not None
    items = paged.batch.decode.items
    items[0] = items[1]
    assert not torch.cat(paged.run())[1:].any()


def test_a_batch_without_items_writes_nothing() -> None:
    paged = page(Case(make_sequences(MIXED)))
    assert paged.batch.decode is not None
    for work in (paged.batch.decode, *paged.batch.prefill.values()):
        work.num_items.zero_()
    paged.run()  # nonsense items and counters, were they touched, would show


def test_the_same_tensors_serve_another_step() -> None:
    """A graph is replayed with the same tensors; only their contents change."""
    first = page(Case(make_sequences([(1, 40), (1, 900), (1, 300)])), spare_items=70)
    second = page(Case(make_sequences([(1, 200), (1, 7), (1, 1000)], seed=1)), spare_items=70)
    expected = second.run()
    first.run()
    for name in ("items", "num_items"):
        target = getattr(first.batch.decode, name)
        source = getattr(second.batch.decode, name)
        target[: len(source)] = source[: len(target)]
    second.batch = dataclasses.replace(second.batch, decode=first.batch.decode)
    assert all(map(torch.equal, second.run(), expected))


def test_queries_may_be_part_of_a_fused_projection() -> None:
    """The rows of queries, keys and values lie side by side."""
    case = Case(make_sequences(SHORT, 2))
    paged = page(case)
    expected = paged.run()
    packed = torch.full((len(paged.query), 8, 32), math.nan)
    packed[:, :4] = paged.query
    paged.query = packed[:, :4]
    assert all(map(torch.equal, paged.run(), expected))


def test_a_cache_may_be_part_of_a_tensor_of_all_layers() -> None:
    """Keys lie beside values, in blocks that other layers share."""
    case = Case(make_sequences(SHORT, 2))
    paged = page(case)
    expected = paged.run()
    both = torch.stack([paged.key_cache, paged.value_cache], dim=1)
    paged.key_cache, paged.value_cache = both[:, 0], both[:, 1]
    assert all(map(torch.equal, paged.run(), expected))


# -- everything at once ---------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lens = []
    for _ in range(draw(st.integers(1, 5))):
        num_queries = draw(st.sampled_from([1, 1, 2, 17, 40]))
        lens.append((num_queries, num_queries + draw(st.integers(0, 400))))
    num_kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 3), (1, 7)]))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**16))
    head_dim = draw(st.sampled_from([16, 32, 48, 64, 80]))
    value_dim = draw(st.sampled_from([None, None, 32, 64]))
    is_float8 = draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(num_kv_heads * group, generator=generator)
    scales = torch.rand(2, num_kv_heads, generator=generator) + 0.5
    cache_dtype = torch.float8_e4m3fn if is_float8 else None
    return Case(
        make_sequences(lens, num_kv_heads, group, head_dim, value_dim, dtype, seed, cache_dtype),
        MaskSpec(
            window=draw(st.sampled_from([NO_LIMIT, NO_LIMIT, 1, 17, 150])),
            chunk=draw(st.sampled_from([NO_LIMIT, NO_LIMIT, 1, 16, 130])),
        ),
        scale=draw(st.sampled_from([head_dim**-0.5, 0.02])),
        softcap=draw(st.sampled_from([None, None, 1.0, 30.0])),
        sinks=draw(st.sampled_from([None, heads.to(dtype)])),
        k_scale=scales[0] if is_float8 else None,
        v_scale=scales[1] if is_float8 else None,
    )


def compare(case: Case, seed: int) -> None:
    paged = page(case, seed)
    for ours, theirs in zip(paged.run()[:-1], paged.run_torch(), strict=False):
        error = float((ours.double() - theirs.double()).abs().max())
        assert error <= 2 * error_bound(case, ours.dtype)


@pytest.mark.thorough
@settings(max_examples=20 * THOROUGH, deadline=None)
@given(cases(), st.integers(0, 2**16))
def test_any_batch_is_what_torch_says(case: Case, seed: int) -> None:
    compare(case, seed)
