"""Paged attention against dense attention in float64, one query at a time.

Every slot of the cache that no sequence owns holds NaN or an infinity. The tolerance is
the dtype's unit roundoff times the largest value, twice: probabilities and outputs are
rounded. Where scores are rounded too, their size adds to it.
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

from kernels.paged_attention.mask import NO_LIMIT, MaskSpec
from kernels.paged_attention.reference import AttentionMetadata, paged_attention_torch
from kernels.store_kv import store_kv_torch
from tests.kernels.paged_attention.dense import (
    DTYPES,
    EVERYTHING,
    Case,
    Sequence,
    attend,
    garbage,
    make_sequences,
)
from tests.thorough import THOROUGH

# -- the paged side -------------------------------------------------------------------


@dataclass(frozen=True)
class Paged:
    """The case's sequences in blocks all over a cache, and its queries packed."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    metadata: AttentionMetadata

    def run(self, case: Case) -> list[Tensor]:
        """Each sequence's outputs."""
        output = paged_attention_torch(
            self.query, self.key_cache, self.value_cache, self.metadata,
            case.spec, case.scale, case.softcap, case.sinks,
        )  # fmt: skip
        assert output.dtype == self.query.dtype
        assert output.shape == (*self.query.shape[:2], self.value_cache.shape[-1])
        return list(output.split(self.metadata.query_lens.tolist()))


def page(case: Case, seed: int = 0) -> Paged:
    rng, block_size = np.random.default_rng(seed), case.block_size
    seqs = case.sequences
    seq_lens = np.array([len(seq.key) for seq in seqs])
    query_lens = np.array([len(seq.query) for seq in seqs])
    num_blocks = -(-seq_lens // block_size)
    free = rng.permutation(num_blocks.sum() + 3)  # some blocks are nobody's
    tables = rng.integers(-5, 10**6, (len(seqs), num_blocks.max() + rng.integers(3)))
    for table, n in zip(tables, num_blocks, strict=True):
        table[:n], free = free[:n], free[n:]

    shape = num_blocks.sum() + 3, block_size
    key_cache, value_cache = (
        garbage((*shape, *x.shape[1:]), x.dtype, rng) for x in (seqs[0].key, seqs[0].value)
    )
    mapping = []
    for seq, table in zip(seqs, tables, strict=True):
        positions = np.arange(len(seq.key))
        slots = torch.from_numpy(
            table[positions // block_size] * block_size + positions % block_size
        )
        store_kv_torch(seq.key, seq.value, key_cache, value_cache, slots)
        mapping.append(slots[len(seq.key) - len(seq.query) :])
    # Heads first in memory, as a transformers module makes them.
    query = torch.cat([seq.query for seq in seqs]).transpose(0, 1).contiguous().transpose(0, 1)
    metadata = AttentionMetadata(query_lens, seq_lens, tables, torch.cat(mapping), block_size)
    return Paged(query, key_cache, value_cache, metadata)


def check(case: Case, seed: int = 0) -> None:
    for seq, output in zip(case.sequences, page(case, seed).run(case), strict=True):
        expected, largest = attend(case, seq)
        unit = torch.finfo(output.dtype).eps / 2
        if output.dtype == torch.float32:
            factor = 20 + 4 * largest  # sums of many products
        elif case.softcap is not None or case.sinks is not None:
            factor = 2 + largest
        else:
            factor = 2
        tolerance = unit * factor * float(seq.value.abs().max())
        error = float((output.double() - expected).abs().max())
        assert error <= tolerance, f"{error:.2g} > {tolerance:.2g}"


MIXED = [(1, 40), (17, 17), (1, 1), (5, 33), (1, 100), (17, 50), (1, 16), (1, 17), (32, 64), (5, 5)]
"""Decodes and chunks, at and off block borders, equal query lengths apart from each other."""

# -- everything at once ---------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lens = []
    for _ in range(draw(st.integers(1, 6))):
        num_queries = draw(st.sampled_from([1, 1, 2, 7, 16, 30]))
        lens.append((num_queries, num_queries + draw(st.integers(0, 70))))
    num_kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 1)]))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**16))
    head_dim = draw(st.sampled_from([32, 48, 64, 80, 96, 128]))
    value_dim = draw(st.sampled_from([None, None, 32, 64, 128]))
    sinks = torch.randn(num_kv_heads * group, generator=torch.Generator().manual_seed(seed))
    return Case(
        make_sequences(lens, num_kv_heads, group, head_dim, value_dim, dtype, seed),
        MaskSpec(
            window=draw(st.sampled_from([NO_LIMIT, NO_LIMIT, 1, 5, 16, 17, 33])),
            chunk=draw(st.sampled_from([NO_LIMIT, NO_LIMIT, 1, 8, 16, 21])),
        ),
        scale=draw(st.sampled_from([head_dim**-0.5, 0.02, 0.5])),
        softcap=draw(st.sampled_from([None, None, 1.0, 30.0])),
        sinks=draw(st.sampled_from([None, sinks.to(dtype)])),
        block_size=draw(st.sampled_from([16, 16, 1, 4, 32])),
    )


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 2**16))
def test_any_batch_is_what_dense_attention_says(case: Case, seed: int) -> None:
    check(case, seed)


@pytest.mark.slow
@pytest.mark.thorough
@settings(max_examples=200 * THOROUGH, deadline=None)
@given(cases(), st.integers(0, 2**16))
def test_many_batches_are_what_dense_attention_says(case: Case, seed: int) -> None:
    check(case, seed)


# -- one thing at a time --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_decodes_and_prefill_chunks_in_one_call(dtype: torch.dtype) -> None:
    check(Case(make_sequences(MIXED, 2, dtype=dtype)))


@pytest.mark.parametrize(
    ("num_kv_heads", "group"), [(4, 1), (2, 4), (1, 8), (3, 3), (1, 1)], ids=str
)
def test_multi_head_grouped_and_multi_query(num_kv_heads: int, group: int) -> None:
    check(Case(make_sequences(MIXED, num_kv_heads, group)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 112, 128])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    sequences = make_sequences(MIXED, 2, 2, head_dim, dtype=dtype)
    check(Case(sequences, scale=head_dim**-0.5))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(96, 64), (64, 128), (48, 32), (32, 80)])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_keys_and_values_of_different_sizes(
    head_dim: int, value_dim: int, softcap: float | None
) -> None:
    """The first as DeepSeek has it."""
    check(Case(make_sequences(MIXED, 2, 2, head_dim, value_dim), softcap=softcap))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 99, 100, 101])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_windows(window: int, softcap: float | None) -> None:
    check(Case(make_sequences(MIXED, 2), MaskSpec(window=window), softcap=softcap))


@pytest.mark.parametrize("chunk", [1, 2, 15, 16, 17, 40, 99, 100, 101])
def test_chunks(chunk: int) -> None:
    check(Case(make_sequences(MIXED, 2), MaskSpec(chunk=chunk)))


def test_a_window_within_chunks() -> None:
    check(Case(make_sequences(MIXED, 2), MaskSpec(window=10, chunk=24)))


def test_a_window_of_one_is_the_value_itself() -> None:
    sequences = make_sequences(MIXED, 2, 1)
    case = Case(sequences, MaskSpec(window=1))
    for seq, output in zip(sequences, page(case).run(case), strict=True):
        torch.testing.assert_close(output, seq.value[-len(seq.query) :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap(softcap: float, dtype: torch.dtype) -> None:
    check(Case(make_sequences(MIXED, 2, dtype=dtype), softcap=softcap))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sinks(softcap: float | None, dtype: torch.dtype) -> None:
    sinks = torch.tensor([-3.0, 0.0, 1.5, 6.0]).to(dtype)
    check(Case(make_sequences(MIXED, 2, dtype=dtype), softcap=softcap, sinks=sinks))


def test_a_sink_of_minus_infinity_takes_nothing_and_a_huge_one_all() -> None:
    case = Case(make_sequences(MIXED, 2))
    plain = torch.cat(page(case).run(case))
    none = dataclasses.replace(case, sinks=torch.full((4,), -math.inf))
    torch.testing.assert_close(torch.cat(page(none).run(none)), plain)
    all_of_it = dataclasses.replace(case, sinks=torch.full((4,), 1e4))
    assert not torch.cat(page(all_of_it).run(all_of_it)).any()


@pytest.mark.parametrize("scale", [0.001, 1.0, 1 / math.sqrt(224)])
def test_a_scale_of_the_models_own(scale: float) -> None:
    check(Case(make_sequences(MIXED, 2), scale=scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_hundreds_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    """Equal keys, so that rounding of the scores has nothing to decide."""
    sequences = make_sequences(MIXED, 2, dtype=dtype)
    key = torch.full((32,), 20.0, dtype=dtype)
    sequences = [Sequence(key.expand_as(s.query), key.expand_as(s.key), s.value) for s in sequences]
    check(Case(sequences, scale=32**-0.5))


# -- each sequence for itself ---------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [EVERYTHING, MaskSpec(window=12), MaskSpec(chunk=20)], ids=str)
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_a_sequence_alone_is_the_sequence_in_company(
    spec: MaskSpec, dtype: torch.dtype, softcap: float | None
) -> None:
    case = Case(make_sequences(MIXED, 2, dtype=dtype), spec, softcap=softcap)
    together = page(case).run(case)
    eps = torch.finfo(dtype).eps
    for i, seq in enumerate(case.sequences):
        own = dataclasses.replace(case, sequences=[seq])
        [alone] = page(own, seed=i + 1).run(own)
        torch.testing.assert_close(together[i], alone, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("sick", range(len(MIXED)))
def test_a_sequence_of_nan_harms_no_other(sick: int, softcap: float | None) -> None:
    """Its own blocks may well be what another's gathered context is padded with."""
    case = Case(make_sequences(MIXED, 2), softcap=softcap)
    healthy = torch.cat(page(case).run(case)[:sick] + page(case).run(case)[sick + 1 :])
    poisoned = list(case.sequences)
    poisoned[sick] = Sequence(
        *(torch.full_like(x, math.nan) for x in vars(poisoned[sick]).values())
    )
    harmed = dataclasses.replace(case, sequences=poisoned)
    outputs = page(harmed).run(harmed)
    assert outputs[sick].isnan().all()
    assert torch.equal(torch.cat(outputs[:sick] + outputs[sick + 1 :]), healthy)


def test_the_same_blocks_in_two_tables() -> None:
    """Sequences that share a prefix read it from the same blocks."""
    [long, other] = make_sequences([(3, 50), (1, 40)], 2)
    shared = Sequence(other.query, *(torch.cat([x[:32], y[32:]]) for x, y in (
        (long.key, other.key), (long.value, other.value)
    )))  # fmt: skip
    case = Case([long, shared])
    paged = page(case)
    tables = paged.metadata.block_tables
    paged.key_cache[tables[1, :2]] = math.nan
    paged.value_cache[tables[1, :2]] = math.nan
    tables[1, :2] = tables[0, :2]
    for seq, output in zip(case.sequences, paged.run(case), strict=True):
        torch.testing.assert_close(output.double(), attend(case, seq)[0], rtol=1e-5, atol=1e-5)


def test_a_prompt_in_chunks_is_the_prompt_in_one() -> None:
    [whole] = make_sequences([(60, 60)], 2)
    case = Case([whole], MaskSpec(window=23))
    [expected] = page(case).run(case)
    parts = []
    for start, end in [(0, 7), (7, 16), (16, 17), (17, 48), (48, 60)]:
        part = Sequence(whole.query[start:end], whole.key[:end], whole.value[:end])
        parts += page(own := dataclasses.replace(case, sequences=[part]), seed=start).run(own)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-5)


def test_one_metadata_serves_layers_with_different_masks() -> None:
    """As in models that alternate; what is prepared for one must not be used for another."""
    paged = page(Case(make_sequences(MIXED, 2)))
    for spec in (EVERYTHING, MaskSpec(window=8), EVERYTHING, MaskSpec(chunk=8), MaskSpec(window=8)):
        case = Case(make_sequences(MIXED, 2), spec)
        fresh = page(case).run(case)
        assert torch.equal(torch.cat(paged.run(case)), torch.cat(fresh))


def test_many_decodes_of_every_length() -> None:
    check(Case(make_sequences([(1, n) for n in range(1, 70)], 1, 2)), seed=3)


def test_caches_and_queries_are_left_alone() -> None:
    case = Case(make_sequences(MIXED, 2), softcap=5.0)
    paged = page(case)
    before = [x.clone() for x in (paged.query, paged.key_cache, paged.value_cache)]
    paged.run(case)
    for x, was in zip((paged.query, paged.key_cache, paged.value_cache), before, strict=True):
        assert torch.equal(x.nan_to_num(7, 8, 9), was.nan_to_num(7, 8, 9))
