"""Sampling without a sort agrees with the processors of the torch implementation.

Where rounding may decide, a row says so itself: its masses, or its distances from the
entropy, come within `_DOUBT` of a limit in float64. Such rows are not compared.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampling.logits_processors import (
    Penalties,
    Temperature,
    TopK,
    TopP,
    TypicalP,
)
from kernels.fused_sampling import greedy, launch, sample
from kernels.fused_sampling.numbers import gumbel
from kernels.sampling import GENERATED, IN_PROMPT, ROW_PARAMETERS, gumbel_noise, noise_keys
from tests.interpreter import INTERPRETED
from tests.kernels.rounding import DEVICE
from tests.thorough import THOROUGH

pytestmark = (
    pytest.mark.slow
)  # interpreted; the engine's own tests run the kernels in the fast core
_DOUBT = 2e-5
_CLOSE_CALL = 1e-5
EPS = torch.finfo(torch.float32).eps
NEUTRAL = {"temperature": 1, "top_p": 1, "typical_p": 1, "repetition_penalty": 1}
entropies = st.integers(0, 2**32 - 1)


# -- rows, and their reference in torch -------------------------------------------------


def rows(n: int = 1, **values: object) -> np.ndarray:
    """Return neutral rows but for `values`, one for all rows or one for each.

    Row i has slot n - 1 - i.
    """
    parameters = np.zeros(n, ROW_PARAMETERS)
    parameters["slot"] = np.arange(n)[::-1]
    parameters["noise_key"] = noise_keys(np.arange(n, dtype=np.uint64), np.arange(n) + 7)
    for name, value in {**NEUTRAL, **values}.items():
        parameters[name] = value
    return parameters


def run(
    logits: Tensor, parameters: np.ndarray, counts: Tensor | None = None, num_top: int = 0
) -> tuple[Tensor, ...]:
    words = torch.from_numpy(parameters.view(np.int32).reshape(len(parameters), -1).copy())
    shape = len(parameters), logits.shape[1]
    on_device = (torch.zeros(shape, dtype=torch.int32) if counts is None else counts).to(DEVICE)
    outputs = sample(logits.to(DEVICE), words.to(DEVICE), on_device, num_top)
    if counts is not None:
        counts.copy_(on_device)
    return tuple(output.cpu() for output in outputs if output is not None)


def has_penalty(p: np.ndarray) -> np.ndarray:
    neutral = {
        "repetition_penalty": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "output_frequency_penalty": 0,
    }
    return np.any([p[name] != value for name, value in neutral.items()], axis=0)


def process(logits: Tensor, p: np.ndarray, counts: Tensor | None = None) -> Tensor:
    scores = logits.float().clone()
    used = has_penalty(p)
    if used.any() and counts is not None:
        Penalties(
            torch.from_numpy(np.flatnonzero(used)),
            torch.from_numpy(p["slot"][used].astype(np.int64)),
            torch.from_numpy(p["repetition_penalty"][used])[:, None],
            torch.from_numpy(p["frequency_penalty"][used])[:, None],
            torch.from_numpy(p["presence_penalty"][used])[:, None],
            torch.from_numpy(p["output_frequency_penalty"][used])[:, None],
            counts,
        )(scores)
    scores += 0.0
    for step in (Temperature, TopK, TopP, TypicalP):
        values = p[step.parameter]
        arrays = step.plan(values.astype(np.int64) if step is TopK else values)
        if arrays:
            step.from_arrays({k: torch.from_numpy(a) for k, a in arrays.items()})(scores)
    return scores


def is_doubtful(logits: Tensor, p: np.ndarray, counts: Tensor | None = None) -> bool:
    """Return whether one row has a threshold so near to a token that float32 may decide it."""
    before = p.copy()
    before["top_p"], before["typical_p"] = 1, 1
    scores = process(logits, before, counts)[0].double()
    if p["top_p"][0] < 1:
        mass = scores.sort().values.softmax(-1).cumsum(-1)
        if (mass - (1 - float(p["top_p"][0]))).abs().min() < _DOUBT:
            return True
    if p["typical_p"][0] < 1:
        before["top_p"] = p["top_p"]
        scores = process(logits, before, counts)[0].double()
        logprobs = scores[scores > -math.inf].log_softmax(-1)
        distance, order = (logprobs + (-logprobs.exp() * logprobs).sum()).abs().sort()
        mass = logprobs[order].exp().cumsum(-1)
        last = min(int((mass < float(p["typical_p"][0])).sum()), len(mass) - 1)
        near = slice(max(last - 1, 0), last + 2)
        return bool(
            (mass - float(p["typical_p"][0])).abs().min() < _DOUBT
            or (distance[near].diff().abs() < _DOUBT).any()
        )
    return False


def check(logits: Tensor, p: np.ndarray, counts: Tensor | None = None) -> None:
    """Check all that `sample` returns and changes, with as many top tokens as there are."""
    vocab_size = logits.shape[-1]
    before = None if counts is None else counts.clone()
    ids, logprobs, top_ids, top_logprobs = run(logits, p, counts, vocab_size)
    expected_counts = None if before is None else before.clone()
    for i in range(len(p)):
        row, own = logits[i : i + 1], p[i : i + 1]
        if expected_counts is not None and has_penalty(own)[0]:
            expected_counts[own["slot"][0], ids[i]] += 1
            expected_counts[own["slot"][0], ids[i]] |= GENERATED
        if is_doubtful(row, own, before):
            continue
        scores = process(row, own, before)[0]
        expected = scores.log_softmax(-1)
        atol = 1e-5 + 4 * EPS * float(scores.max().abs())
        torch.testing.assert_close(logprobs[i], expected[ids[i]], rtol=1e-5, atol=atol)
        check_choice(scores, own, int(ids[i]))
        if own["top_n_tokens"][0]:
            check_top(scores, top_ids[i], top_logprobs[i], atol)
    if counts is not None and expected_counts is not None:
        assert torch.equal(counts, expected_counts)


def check_choice(scores: Tensor, p: np.ndarray, chosen: int) -> None:
    assert scores[chosen] > -math.inf
    if p["do_sample"][0]:
        scores = scores + gumbel_noise(torch.from_numpy(p["noise_key"].copy()), len(scores))[0]
        assert scores[chosen] >= scores.max() - _CLOSE_CALL
    else:
        slack = 1e-5 if has_penalty(p)[0] else 0
        assert scores[chosen] >= scores.max() - slack


def check_top(scores: Tensor, top_ids: Tensor, top_logprobs: Tensor, atol: float) -> None:
    """Check the best survivors and their logprobs: best first, the lowest id first among equals.

    Equal are scores: their logprobs, rounded once more, may be equal where they are not.
    """
    expected = scores.log_softmax(-1)
    alive = int((expected > -math.inf).sum().clamp(max=len(top_ids)))
    ids, logprobs = top_ids[:alive], top_logprobs[:alive]
    assert len(set(ids.tolist())) == alive
    torch.testing.assert_close(logprobs, expected[ids], rtol=1e-5, atol=atol)
    assert (logprobs.diff() <= 0).all()
    same = scores[ids][1:] == scores[ids][:-1]
    assert (ids.diff()[same] > 0).all()
    assert logprobs[-1] >= expected.sort(descending=True).values[alive - 1] - atol
    assert (top_logprobs[alive:] == -math.inf).all()


def random_logits(rng: np.random.Generator, num_rows: int, vocab_size: int) -> Tensor:
    """Draw logits: half of the rows are full of ties, and some rows exclude some tokens."""
    shape = num_rows, vocab_size
    tied, loose = rng.integers(-6, 7, shape) / 2, rng.normal(0, 3, shape)
    logits = np.where(rng.random((num_rows, 1)) < 0.5, tied, loose)
    excluded = rng.random(shape) < rng.choice([0, 0, 0.3, 0.98], (num_rows, 1))
    excluded[range(num_rows), rng.integers(0, vocab_size, num_rows)] = False
    return torch.from_numpy(np.where(excluded, -np.inf, logits).astype(np.float32))


def random_rows(rng: np.random.Generator, n: int, counts: Tensor) -> np.ndarray:
    def some(neutral: float, *used: float) -> np.ndarray:
        return np.where(rng.random(n) < 0.5, neutral, rng.choice(used, n))

    parameters = rows(
        n,
        temperature=some(1, 1e-30, 1e-4, 0.3, 0.9, 2.5),
        top_k=some(0, 1, 3, 10, 100, 10_000),
        top_p=some(1, 0.05, 0.6, 0.95),
        typical_p=some(1, 0.2, 0.7),
        repetition_penalty=some(1, 0.5, 1.2, 3),
        frequency_penalty=some(0, -1.5, 0.3, 2),
        presence_penalty=some(0, -0.5, 1.5),
        output_frequency_penalty=some(0, -1, 0.5),
        do_sample=rng.integers(0, 2, n),
        top_n_tokens=rng.integers(0, 2, n),
        noise_key=rng.integers(-(2**31), 2**31, (n, 2)),
    )
    lengths = (counts & (IN_PROMPT - 1)).sum(-1)
    parameters["context_length"] = lengths.numpy()[parameters["slot"]]
    return parameters


def random_counts(rng: np.random.Generator, num_slots: int, vocab_size: int) -> Tensor:
    counts = rng.integers(1, 5, (num_slots, vocab_size))
    counts[rng.random((num_slots, vocab_size)) < 0.7] = 0
    counts[:, 0] += 1
    counts[(counts > 0) & (rng.random((num_slots, vocab_size)) < 0.5)] |= GENERATED
    counts[rng.random((num_slots, vocab_size)) < 0.3] |= IN_PROMPT
    return torch.from_numpy(counts.astype(np.int32))


def tiles(chunk: int, kept: int, held: int, block: int) -> pytest.MonkeyPatch:
    """Shrink the tiles, so that rows have many chunks, more candidates than are held, and
    thresholds below their candidates.
    """
    patch = pytest.MonkeyPatch()
    for name, value in {"CHUNK": chunk, "KEPT": kept, "HELD": held, "BLOCK": block}.items():
        patch.setattr(launch, name, value)
    return patch


@pytest.fixture
def small_tiles() -> Iterator[None]:
    patch = tiles(64, 8, 16, 128)
    yield
    patch.undo()


# -- greedy -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 2, 258, 1000, 5003])
def test_greedy_takes_the_best_token_and_its_logprob(dtype: torch.dtype, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (4 * torch.randn(3, vocab_size, generator=generator)).to(dtype)
    ids, logprobs = greedy(logits.to(DEVICE), want_logprobs=True)
    assert ids.dtype == torch.int64
    assert logprobs is not None
    expected = logits.float().log_softmax(-1)
    assert torch.equal(ids.cpu(), logits.float().argmax(-1))
    torch.testing.assert_close(logprobs.cpu(), expected.max(-1).values, rtol=1e-6, atol=1e-6)
    assert greedy(logits.to(DEVICE), want_logprobs=False)[1] is None


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 5003)
    logits[0, [4999, 2047, 2048]] = 2.0
    logits[1] = -math.inf
    logits[2, 0] = -0.0
    assert greedy(logits.to(DEVICE), False)[0].tolist() == [2047, 0, 0]
    assert run(logits, rows(3))[0].tolist() == [2047, 0, 0]


def test_rows_of_logits_may_have_a_stride() -> None:
    wide = torch.randn(4, 2 * 700, generator=torch.Generator().manual_seed(0))
    logits = wide[::2, 3:703]
    assert torch.equal(greedy(logits.to(DEVICE), False)[0].cpu(), logits.argmax(-1))
    check(logits, rows(2, top_k=[5, 0], top_n_tokens=1))


def test_neutral_rows_come_out_of_sample_as_of_greedy_bit_for_bit() -> None:
    logits = 5 * torch.randn(3, 5003, generator=torch.Generator().manual_seed(5)).bfloat16()
    ids, logprobs = greedy(logits.to(DEVICE), want_logprobs=True)
    assert logprobs is not None
    mixed = rows(3, top_k=[0, 0, 7], top_n_tokens=[0, 1, 0])
    sampled = run(logits, mixed, num_top=3)
    assert torch.equal(sampled[0], ids.cpu())
    assert torch.equal(sampled[1][:2], logprobs[:2].cpu())


# -- all steps together -----------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(entropies)
def test_rows_come_out_as_the_processors_have_them(entropy: int) -> None:
    rng = np.random.default_rng(entropy)
    n, vocab_size = int(rng.integers(1, 4)), int(rng.choice([1, 2, 63, 258, 500]))
    patch = tiles(64, 8, 16, 128)
    counts = random_counts(rng, n, vocab_size)
    check(random_logits(rng, n, vocab_size), random_rows(rng, n, counts), counts)
    patch.undo()


@pytest.mark.thorough
@settings(max_examples=12 * THOROUGH, deadline=None)
@given(entropies, st.sampled_from([(64, 8, 16, 128), (256, 16, 64, 64), (2048, 128, 2048, 4096)]))
def test_many_rows_come_out_as_the_processors_have_them(
    entropy: int, sizes: tuple[int, int, int, int]
) -> None:
    rng = np.random.default_rng(entropy)
    n, vocab_size = int(rng.integers(1, 5)), int(rng.choice([1, 2, 63, 258, 1000, 5003]))
    patch = tiles(*sizes)
    counts = random_counts(rng, n, vocab_size)
    check(random_logits(rng, n, vocab_size), random_rows(rng, n, counts), counts)
    patch.undo()


@settings(max_examples=3, deadline=None)
@given(entropies)
def test_a_row_in_a_batch_comes_out_as_it_would_alone(entropy: int) -> None:
    """The results are equal bit for bit, whatever the other rows ask for."""
    rng = np.random.default_rng(entropy)
    n, vocab_size, patch = 3, 300, tiles(64, 8, 16, 128)
    counts = random_counts(rng, n, vocab_size)
    logits, parameters = random_logits(rng, n, vocab_size), random_rows(rng, n, counts)
    together = run(logits, parameters, counts.clone(), 5)
    for i in range(n):
        num_top = 5 if parameters["top_n_tokens"][i] else 0
        own = run(logits[i : i + 1], parameters[i : i + 1], counts.clone(), num_top)
        for all_rows, one_row in zip(together, own, strict=False):
            assert torch.equal(all_rows[i], one_row[0])
    patch.undo()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_processed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 258, generator=generator)).to(dtype)
    check(logits, rows(2, temperature=[0.7, 1.3], top_p=[1, 0.8], do_sample=1, top_n_tokens=1))


def test_a_vocabulary_of_many_full_chunks_is_sampled() -> None:
    logits = 3 * torch.randn(3, 5003, generator=torch.Generator().manual_seed(2))
    check(logits, rows(3, top_k=[40, 0, 0], top_p=[0.9, 0.7, 1], temperature=0.7, do_sample=1))


# -- thresholds, among the candidates and below -------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": 3},
        {"top_k": 60},
        {"top_k": 299},
        {"top_k": 10_000},
        {"top_p": 0.3},
        {"top_p": 0.97},
        {"top_k": 60, "top_p": 0.9},
        {"typical_p": 0.5},
        {"top_k": 20, "typical_p": 0.6},
        {"temperature": 3.0, "top_p": 0.9},
    ],
    ids=str,
)
def test_each_threshold_keeps_what_the_processors_keep(
    asked: dict[str, Any], small_tiles: None
) -> None:
    del small_tiles
    logits = 2 * torch.randn(1, 300, generator=torch.Generator().manual_seed(11))
    assert not is_doubtful(logits, rows(**asked))
    check(logits, rows(do_sample=1, top_n_tokens=1, **asked))


def test_top_p_after_a_top_k_of_exactly_the_number_of_candidates(small_tiles: None) -> None:
    """One of these top_k equals the number of candidates, which is KEPT / 2 to KEPT."""
    del small_tiles
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)).expand(4, 64)
    check(logits, rows(4, top_k=[5, 6, 7, 8], top_p=0.55, top_n_tokens=1))


def test_all_ties_at_a_threshold_are_kept(small_tiles: None) -> None:
    del small_tiles
    logits = torch.full((4, 200), -5.0)
    logits[:, ::7] = 1.0
    logits[:, 100] = 2.0
    top_ids = run(
        logits, rows(4, top_k=[2, 1, 0, 0], top_p=[1, 1, 0.5, 0.01], top_n_tokens=1), None, 200
    )[2:]
    kept = (top_ids[1] > -math.inf).sum(-1).tolist()
    assert kept == [30, 1, 30, 1]


def test_a_flat_row_keeps_every_token(small_tiles: None) -> None:
    del small_tiles
    p = rows(3, top_k=[1, 0, 0], top_p=[1, 0.01, 1], typical_p=[1, 1, 0.01], top_n_tokens=1)
    ids, logprobs, top_ids, _ = run(torch.zeros(3, 200), p, None, 200)
    assert ids.tolist() == [0] * 3
    torch.testing.assert_close(logprobs, torch.full((3,), -math.log(200)))
    assert torch.equal(top_ids, torch.arange(200).expand(3, 200))


def test_the_only_token_left_has_logprob_zero(small_tiles: None) -> None:
    del small_tiles
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    logits[4] = -math.inf
    logits[4, 77] = -12.5
    sole = {
        "top_k": [1, 0, 0, 0, 0],
        "top_p": [1, 1e-45, 1, 1, 0.5],
        "temperature": [1, 1, 2**-10, 1, 1],
        "typical_p": [1, 1, 1, 1e-6, 0.5],
    }
    ids, logprobs = run(logits, rows(5, do_sample=[0, 1, 1, 1, 0], **sole))
    assert logprobs.tolist() == [0.0] * 5
    assert torch.equal(ids[:3], logits[:3].argmax(-1))
    assert ids[4] == 77


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 100.0, 1e4])
def test_extreme_temperatures_give_what_the_processors_give(
    temperature: float, small_tiles: None
) -> None:
    del small_tiles
    logits = 5 * torch.randn(3, 200, generator=torch.Generator().manual_seed(9))
    top_p, top_k = [1, 0.9, 1], [0, 0, 30]
    check(logits, rows(3, temperature=temperature, top_p=top_p, top_k=top_k, do_sample=1))


def test_scores_of_all_magnitudes_are_searched(small_tiles: None) -> None:
    """Bisecting the values alone would take one step per power of two."""
    del small_tiles
    exponents = torch.arange(-126, 127).float()
    logits = torch.cat([-(2.0**exponents), 2.0**exponents])[None]
    logits = logits[:, torch.randperm(506, generator=torch.Generator().manual_seed(4))]
    for k in (1, 250, 300):
        top_logprobs = run(logits, rows(top_k=k, top_n_tokens=1), None, 400)[3]
        finite = logits[0].sort(descending=True).values[:k] - logits.max() > -math.inf
        assert (top_logprobs > -math.inf).sum() == finite.sum()


# -- candidates in registers, and rows that have too many of them -----------------------------


@settings(max_examples=4 * THOROUGH, deadline=None)
@given(entropies, st.sampled_from([8, 16, 32, 64]))
def test_rows_come_out_the_same_however_few_candidates_are_held(entropy: int, held: int) -> None:
    """With 64 all candidates are held, with 8 almost every row is left to the third pass."""
    rng = np.random.default_rng(entropy)
    logits, counts = random_logits(rng, 3, 500), random_counts(rng, 3, 500)
    parameters, results = random_rows(rng, 3, counts), []
    for size in (64, held):
        patch = tiles(64, 8, size, 128)
        results.append(run(logits, parameters, counts.clone(), 20))
        patch.undo()
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


@settings(max_examples=4 * THOROUGH, deadline=None)
@given(entropies, st.sampled_from([1, 5, 15, 16, 17, 33, 60]))
def test_more_ties_than_can_be_held_are_kept_or_dropped_together(entropy: int, k: int) -> None:
    """More than `HELD` candidates share a score, at the threshold or above it."""
    rng = np.random.default_rng(entropy)
    patch = tiles(64, 8, 16, 128)
    logits = torch.from_numpy(rng.choice([0.0, 0.5, 3.0], (2, 600), p=[0.85, 0.1, 0.05]))
    logits = logits.float()
    logits[:, rng.integers(0, 600, 3)] = 4.0
    p = rows(2, top_k=k, top_p=[1, 0.9], do_sample=[1, 0], top_n_tokens=1)
    check(logits, p)
    patch.undo()


@pytest.mark.parametrize("held", [16, 32, 64, 128])
def test_as_many_candidates_as_are_held_or_one_more_give_the_right_token(held: int) -> None:
    patch = tiles(64, 8, held, 128)
    for num_tokens in (held - 1, held, held + 1):
        logits = torch.full((1, 2000), -math.inf)
        ids = torch.randperm(2000, generator=torch.Generator().manual_seed(held))[:num_tokens]
        logits[0, ids] = torch.randn(num_tokens, generator=torch.Generator().manual_seed(7))
        check(logits, rows(top_k=num_tokens // 2, top_p=0.8, do_sample=1, top_n_tokens=1))
    patch.undo()


# -- penalties, top tokens, and rows of NaN -------------------------------------------------


def test_chosen_tokens_are_counted_only_for_rows_with_a_penalty() -> None:
    counts = torch.zeros(3, 100, dtype=torch.int32)
    counts[:, 5] = 4
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    p = rows(3, repetition_penalty=[1.5, 1, 1], frequency_penalty=[0, 0, 0.5], context_length=4)
    expected = counts.clone()
    ids = run(logits, p, counts)[0]
    for slot, row in ((2, 0), (0, 2)):
        expected[slot, ids[row]] = (expected[slot, ids[row]] + 1) | GENERATED
    assert torch.equal(counts, expected)


def test_the_repetition_penalty_then_the_frequency_penalty_then_temperature_apply() -> None:
    """((4 / 2) - 1 * 1) / 0.5 = 2."""
    p = rows(
        temperature=0.5,
        repetition_penalty=2,
        frequency_penalty=1,
        context_length=2,
        top_n_tokens=1,
    )
    counts = torch.tensor([[2, 0]], dtype=torch.int32)
    top = run(torch.tensor([[4.0, 0.0]]), p, counts, 2)[3]
    torch.testing.assert_close(top[0], torch.tensor([2.0, 0.0]).log_softmax(-1))


@pytest.mark.parametrize("num_top", [1, 5, 21])
def test_top_tokens_are_the_best_with_the_lowest_ids_among_equals(
    num_top: int, small_tiles: None
) -> None:
    del small_tiles
    rng = np.random.default_rng(num_top)
    logits = torch.from_numpy(rng.integers(0, 9, (2, 300)).astype(np.float32))
    top_ids, top_logprobs = run(logits, rows(2, top_n_tokens=[1, 0]), None, num_top)[2:]
    order = sorted(range(300), key=lambda token: (-logits[0, token], token))
    assert top_ids[0].tolist() == order[:num_top]
    torch.testing.assert_close(top_logprobs[0], logits[0].log_softmax(-1)[top_ids[0]])
    assert (top_logprobs[1] == -math.inf).all()


def test_a_row_of_nan_still_gets_a_token_and_changes_no_other() -> None:
    logits = torch.randn(5, 258, generator=torch.Generator().manual_seed(0))
    everything = {"temperature": 0.5, "top_k": 9, "top_p": 0.9, "typical_p": 0.9, "do_sample": 1}
    expected = run(logits, rows(5, **everything))[0]
    logits[1], logits[3] = math.nan, -math.inf
    ids = run(logits, rows(5, **everything))[0]
    assert torch.equal(ids[::2], expected[::2])
    assert ((ids >= 0) & (ids < 258)).all()


# -- noise ------------------------------------------------------------------------------------


@triton.jit
def _gumbel_kernel(
    keys_ptr,
    noise_ptr,
    BLOCK: tl.constexpr,  # noqa: N803
):
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(noise_ptr + ids, gumbel(ids, tl.load(keys_ptr), tl.load(keys_ptr + 1)))


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5, 2**64 - 1])
def test_noise_is_that_of_the_torch_implementation(seed: int) -> None:
    num_tokens = 2**18
    keys = torch.from_numpy(noise_keys(np.array([seed], np.uint64), np.array([3])))
    noise = torch.empty(num_tokens, device=DEVICE)
    _gumbel_kernel[(num_tokens // 8192,)](keys.to(DEVICE), noise, BLOCK=8192)
    expected = gumbel_noise(keys, num_tokens)[0]
    assert (noise.cpu() - expected).abs().max() < 4e-6


@pytest.mark.parametrize(("p", "n"), [({}, 120), ({"top_k": 3}, 20)], ids=str)
def test_draws_follow_the_processed_softmax(p: dict[str, float], n: int) -> None:
    """Chi-square of the draws of a batch's rows; more than 5 deviations is not chance."""
    logits = torch.linspace(2.0, -2.0, 16)
    keys = noise_keys(np.arange(n, dtype=np.uint64), np.full(n, 9))
    parameters = rows(n, do_sample=1, noise_key=keys, **p)
    counts = torch.bincount(run(logits.expand(n, 16), parameters)[0], minlength=16)
    expected = process(logits[None], parameters[:1])[0].softmax(-1) * n
    assert counts[expected == 0].sum() == 0
    alive = expected > 0
    df = int(alive.sum()) - 1
    statistic = float(((counts - expected)[alive] ** 2 / expected[alive]).sum())
    assert statistic - df < 5 * math.sqrt(2 * df)


# -- CUDA graphs --------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_a_captured_graph_samples_what_its_buffers_hold() -> None:
    logits = torch.zeros(4, 50_000, device=DEVICE, dtype=torch.bfloat16)
    parameters = rows(4, top_k=[0, 40, 0, 0], top_p=[1, 1, 0.9, 1], do_sample=[0, 1, 1, 1])
    words = torch.zeros(4, ROW_PARAMETERS.itemsize // 4, dtype=torch.int32, device=DEVICE)
    words.copy_(torch.from_numpy(parameters.view(np.int32).reshape(4, -1)))
    counts = torch.zeros(4, 50_000, dtype=torch.int32, device=DEVICE)
    sample(logits, words, counts, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(logits, words, counts, 5)
    for seed in range(3):
        torch.manual_seed(seed)
        logits.copy_(3 * torch.randn(4, 50_000))
        graph.replay()
        for replayed, eager in zip(captured, sample(logits, words, counts, 5), strict=True):
            assert replayed is not None
            assert eager is not None
            assert torch.equal(replayed, eager)
