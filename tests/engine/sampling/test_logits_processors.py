"""Each step against its definition in float64, and against the batch it runs in.

Definitions are those of Text Generation Inference (contract, section 9). Where rounding
may decide on which side of a threshold a token falls, the float64 reference calls it
doubtful, and it is left to a second reference: the definition in float32, a row at a time.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
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
from kernels.sampling import GENERATED

_DOUBT = 2e-5
"""Masses and distances closer than this to a threshold are not compared with float64."""

examples = settings(max_examples=50, deadline=None)

# -- random batches: many ties, some tokens excluded, flat and steep rows ----------------


@st.composite
def score_rows(draw: st.DrawFn) -> Tensor:
    """Draw [1..5 rows, 1..24 tokens] float32; some of a row's scores may be -inf, never all.

    The shape is hypothesis's, the numbers are a generator's, which is far cheaper.
    """
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tied = rng.integers(-4, 5, shape) / 2
    loose = rng.normal(0, 10, shape)
    scores = np.where(rng.random((shape[0], 1)) < 0.5, tied, loose)
    excluded = rng.random(shape) < rng.choice([0, 0, 0.3, 0.95], (shape[0], 1))
    excluded[range(shape[0]), rng.integers(0, shape[1], shape[0])] = False
    return torch.from_numpy(np.where(excluded, -np.inf, scores).astype(np.float32))


def some_neutral(used: st.SearchStrategy[float], neutral: float) -> st.SearchStrategy[float]:
    return st.one_of(used, st.just(neutral))


fractions = st.one_of(
    st.floats(2**-20, 1 - 2**-20, width=32), st.sampled_from([0.1, 0.25, 0.5, 0.75])
)
temperatures = st.floats(0.0625, 8, width=32)
STEPS = {
    "temperature": (Temperature, temperatures, 1.0, np.float32),
    "top_k": (TopK, st.integers(1, 30), 0, np.int64),
    "top_p": (TopP, fractions, 1.0, np.float32),
    "typical_p": (TypicalP, fractions, 1.0, np.float32),
}
every_step = pytest.mark.parametrize("name", STEPS)


@st.composite
def batches(draw: st.DrawFn, name: str) -> tuple[Tensor, np.ndarray]:
    """Draw scores, and a value of the step's parameter for each row, neutral for some."""
    _, used, neutral, dtype = STEPS[name]
    scores = draw(score_rows())
    values = [draw(some_neutral(used, neutral)) for _ in scores]
    return scores, np.array(values, dtype=dtype)


def process(name: str, scores: Tensor, values: np.ndarray) -> Tensor:
    step = STEPS[name][0]
    arrays = step.plan(values)
    processed = scores.clone()
    if arrays:
        step.from_arrays({k: torch.from_numpy(array) for k, array in arrays.items()})(processed)
    return processed


def bits(scores: Tensor) -> list[int]:
    """Return the scores' bits, to compare them exactly, with the sign of zero."""
    return scores.contiguous().view(torch.int32).flatten().tolist()


# -- independence of the other rows -----------------------------------------------------


@every_step
def test_a_step_that_no_row_uses_uploads_nothing(name: str) -> None:
    step, _, neutral, dtype = STEPS[name]
    assert step.plan(np.full(3, neutral, dtype=dtype)) == {}
    assert step.plan(np.zeros(0, dtype=dtype)) == {}


@every_step
@examples
@given(data=st.data())
def test_rows_with_neutral_values_keep_their_bits(name: str, data: st.DataObject) -> None:
    scores, values = data.draw(batches(name))
    unused = torch.from_numpy(values == STEPS[name][2])
    assert bits(process(name, scores, values)[unused]) == bits(scores[unused])


@every_step
@examples
@given(data=st.data())
def test_each_row_comes_out_as_it_would_alone(name: str, data: st.DataObject) -> None:
    scores, values = data.draw(batches(name))
    together = process(name, scores, values)
    for i in range(len(scores)):
        alone = process(name, scores[i : i + 1], values[i : i + 1])
        assert bits(together[i]) == bits(alone)


@every_step
def test_each_row_of_a_large_batch_comes_out_as_it_would_alone(name: str) -> None:
    """The rows are long enough for vectors, blocks and threads to matter."""
    generator = torch.Generator().manual_seed(1)
    scores = 4 * torch.randn(17, 5003, generator=generator)
    used = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "typical_p": 0.8}[name]
    values = np.array([used * (1 + row % 3) / 3 for row in range(17)], dtype=np.float32)
    values[5] = STEPS[name][2]
    values = values.astype(STEPS[name][3])
    together = process(name, scores, values)
    for i in range(17):
        assert bits(together[i]) == bits(process(name, scores[i : i + 1], values[i : i + 1]))


@every_step
@examples
@given(data=st.data())
def test_a_row_of_nan_harms_no_other(name: str, data: st.DataObject) -> None:
    scores, values = data.draw(batches(name))
    sick = data.draw(st.integers(0, len(scores) - 1))
    harmed = scores.clone()
    harmed[sick] = math.nan
    healthy = torch.arange(len(scores)) != sick
    expected = process(name, scores, values)[healthy]
    assert bits(process(name, harmed, values)[healthy]) == bits(expected)


# -- the definitions ----------------------------------------------------------------------


def softmax64(row: np.ndarray) -> np.ndarray:
    p = np.exp(row - row.max())
    return p / p.sum()


def check_kept(
    scores: Tensor,
    values: np.ndarray,
    processed: Tensor,
    neutral: float,
    reference: Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]],
) -> None:
    """Check that kept scores are unchanged and that those the reference drops are -inf.

    The reference returns (kept, doubtful), [vocab_size] bool each.
    """
    for row, value, out in zip(scores, values, processed, strict=True):
        dropped = out == -math.inf
        assert bits(out[~dropped]) == bits(row[~dropped])
        assert not dropped.all()
        if value == neutral:
            continue
        kept, doubtful = reference(row.numpy().astype(np.float64), float(value))
        wrong = (dropped.numpy() == kept) & ~doubtful & (row.numpy() > -math.inf)
        assert not wrong.any(), (row, value, out, kept)


@examples
@given(batches("temperature"))
def test_temperature_divides_the_scores(batch: tuple[Tensor, np.ndarray]) -> None:
    scores, values = batch
    exact = scores.double() / torch.from_numpy(values).double()[:, None]
    assert bits(process("temperature", scores, values)) == bits(exact.float())


@examples
@given(score_rows(), st.integers(-100, -11), st.floats(1, 1.875, width=32))
def test_a_small_temperature_divides_the_distances_from_the_highest_score(
    scores: Tensor, exponent: int, mantissa: float
) -> None:
    temperature = mantissa * 2.0**exponent
    processed = process("temperature", scores, np.full(len(scores), temperature, np.float32))
    exact = (scores - scores.amax(-1, keepdim=True)).double() / temperature
    torch.testing.assert_close(processed.double(), exact, rtol=1e-6, atol=0)


@examples
@given(batches("top_k"))
def test_top_k_keeps_scores_that_reach_the_kth_highest(batch: tuple[Tensor, np.ndarray]) -> None:
    def reference(row: np.ndarray, k: float) -> tuple[np.ndarray, np.ndarray]:
        kth = sorted(row, reverse=True)[min(int(k), len(row)) - 1]
        return row >= kth, np.zeros(len(row), dtype=bool)

    check_kept(*batch, process("top_k", *batch), 0, reference)


@examples
@given(batches("top_p"))
def test_top_p_drops_the_least_likely_up_to_a_mass_of_1_minus_p(
    batch: tuple[Tensor, np.ndarray],
) -> None:
    """Equal scores are dropped together, with all lower ones, or kept together."""

    def reference(row: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
        probs = softmax64(row)
        mass = np.array([probs[row <= score].sum() for score in row])
        return (mass > 1 - p) | (row == row.max()), np.abs(mass - (1 - p)) < _DOUBT

    check_kept(*batch, process("top_p", *batch), 1, reference)


@examples
@given(batches("top_p"))
def test_top_p_keeps_all_of_equal_scores_or_none(batch: tuple[Tensor, np.ndarray]) -> None:
    for row, out in zip(batch[0], process("top_p", *batch), strict=True):
        kept = row[out > -math.inf]
        assert kept.numel() == (row >= kept.min()).sum()


@examples
@given(batches("typical_p"))
def test_typical_p_keeps_the_surprises_nearest_the_entropy(
    batch: tuple[Tensor, np.ndarray],
) -> None:
    def reference(row: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
        probs = softmax64(row)
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -(row - row.max() - np.log(np.exp(row - row.max()).sum()))
            entropy = np.nansum(probs * surprise)
        distance = np.abs(surprise - entropy)
        order = np.argsort(distance, kind="stable")
        mass = np.cumsum(probs[order])
        last = min(int((mass < p).sum()), len(row) - 1)
        border = distance[order][last]
        with np.errstate(invalid="ignore"):
            doubtful = np.abs(distance - border) < _DOUBT
        # The border itself is in doubt where a mass is near p, or where two distances
        # that float32 may swap carry the mass across it.
        near_p = np.abs(mass - p) < _DOUBT
        tight = np.abs(np.diff(distance[order], append=np.inf)) < _DOUBT
        if near_p.any() or tight[max(last - 1, 0) : last + 1].any():
            doubtful[:] = True
        return distance <= border, doubtful

    with np.errstate(invalid="ignore"):
        check_kept(*batch, process("typical_p", *batch), 1, reference)


def literal_top_p(row: Tensor, p: float) -> Tensor:
    ascending = torch.sort(row, descending=False).values
    mass = ascending.softmax(dim=-1).cumsum(dim=-1)
    remove = mass <= 1 - torch.tensor(p, dtype=torch.float32)
    remove[-1:] = False
    return row.masked_fill(row < ascending[~remove][0], -math.inf)


def literal_typical_p(row: Tensor, m: float) -> Tensor:
    logprobs = row.log_softmax(dim=-1)
    entropy = -(logprobs * logprobs.exp()).nansum()
    distance, order = (-logprobs - entropy).abs().sort(descending=False)
    mass = row[order].softmax(dim=-1).cumsum(dim=-1)
    last = min(int((mass < torch.tensor(m, dtype=torch.float32)).sum()), len(row) - 1)
    mask = torch.zeros(len(row), dtype=torch.bool)
    mask[order] = distance > distance[last]
    return row.masked_fill(mask, -math.inf)


@pytest.mark.parametrize(
    ("name", "literal"), [("top_p", literal_top_p), ("typical_p", literal_typical_p)]
)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_the_same_tokens_are_kept_as_by_the_float32_definition(
    name: str, literal: Callable[[Tensor, float], Tensor], data: st.DataObject
) -> None:
    scores, values = data.draw(batches(name))
    for row, value, out in zip(scores, values, process(name, scores, values), strict=True):
        assert bits(out) == bits(row if value == 1 else literal(row, float(value)))


# -- examples ----------------------------------------------------------------------------


def log(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def kept(name: str, scores: Tensor, value: float) -> list[int]:
    out = process(name, scores, np.array([value], dtype=STEPS[name][3]))
    return (out[0] > -math.inf).nonzero()[:, 0].tolist()


def test_top_k_keeps_every_tie_at_its_border() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0]])
    assert kept("top_k", scores, 1) == [1]
    assert kept("top_k", scores, 2) == [1, 2, 3, 4]
    assert kept("top_k", scores, 5) == [0, 1, 2, 3, 4]


def test_top_k_beyond_the_vocabulary_drops_nothing() -> None:
    scores = torch.tensor([[1.0, -math.inf, 2.0], [3.0, 2.0, 1.0]])
    out = process("top_k", scores, np.array([2**31 - 1, 1]))
    assert out.tolist() == [[1, -math.inf, 2], [3, -math.inf, -math.inf]]


def test_top_p_keeps_the_token_that_crosses_p() -> None:
    scores = log(0.5, 0.3, 0.15, 0.05)
    assert kept("top_p", scores, 0.45) == [0]
    assert kept("top_p", scores, 0.55) == [0, 1]
    assert kept("top_p", scores, 0.79) == [0, 1]
    assert kept("top_p", scores, 0.81) == [0, 1, 2]
    assert kept("top_p", scores, 0.99) == [0, 1, 2, 3]


def test_top_p_drops_a_mass_of_exactly_1_minus_p() -> None:
    scores = log(0.5, 0.25, 0.125, 0.125)
    if scores.softmax(-1).tolist() != [[0.5, 0.25, 0.125, 0.125]]:
        pytest.skip("this machine's logarithms round otherwise")
    assert kept("top_p", scores, 0.5) == [0]
    assert kept("top_p", scores, 0.75) == [0, 1]


def test_top_p_keeps_every_tie_at_its_border() -> None:
    assert kept("top_p", log(0.4, 0.2, 0.2, 0.15, 0.05), 0.5) == [0, 1, 2]
    assert kept("top_p", torch.zeros(1, 8), 0.25) == [*range(8)]


@pytest.mark.parametrize("p", [1e-45, 1e-30, 1e-8])
def test_top_p_always_keeps_the_best(p: float) -> None:
    assert kept("top_p", log(0.2, 0.5, 0.3), p) == [1]
    assert kept("top_p", log(0.4, 0.2, 0.4), p) == [0, 2]


def test_typical_p_may_drop_the_most_likely() -> None:
    """The entropy is 1.58: a surprise of 0.69 is farther from it than one of 1.9."""
    scores = log(0.5, *[0.15] * 3, 0.05)
    assert kept("typical_p", scores, 0.3) == [1, 2, 3]
    assert kept("typical_p", scores, 0.6) == [0, 1, 2, 3]
    assert kept("typical_p", scores, 0.98) == [0, 1, 2, 3, 4]


def test_typical_p_stops_at_a_mass_of_exactly_p() -> None:
    """The surprises are 1, 2, 3 and 3 bits, around an entropy of 1.75."""
    scores = log(0.5, 0.25, 0.125, 0.125)
    if scores.softmax(-1).tolist() != [[0.5, 0.25, 0.125, 0.125]]:
        pytest.skip("this machine's logarithms round otherwise")
    assert kept("typical_p", scores, 0.25) == [1]
    assert kept("typical_p", scores, 0.75) == [0, 1]


@pytest.mark.parametrize("p", [1e-45, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("name", ["top_p", "typical_p"])
def test_the_only_token_left_is_kept(name: str, p: float) -> None:
    scores = torch.full((1, 9), -math.inf)
    scores[0, 4] = -3.5
    assert kept(name, scores, p) == [4]


# -- penalties ------------------------------------------------------------------------------


@st.composite
def penalised(draw: st.DrawFn) -> tuple[Tensor, list[list[int]], np.ndarray, np.ndarray]:
    """Draw scores, contexts, and repetition and frequency penalties, some of them neutral."""
    scores = draw(score_rows())
    token = st.integers(0, scores.shape[-1] - 1)
    contexts = [draw(st.lists(token, min_size=1, max_size=12)) for _ in scores]
    repetition = [draw(some_neutral(st.floats(0.125, 4, width=32), 1)) for _ in scores]
    frequency = [draw(some_neutral(st.floats(-2, 2, width=32), 0)) for _ in scores]
    return scores, contexts, np.array(repetition, np.float32), np.array(frequency, np.float32)


def single(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def make_penalties(
    contexts: list[list[int]], repetition: np.ndarray, frequency: np.ndarray, vocab_size: int
) -> Penalties | None:
    """Row i has slot 2 * i + 1; the other slots hold counts of other sequences."""
    used = (repetition != 1) | (frequency != 0)
    if not used.any():
        return None
    counts = torch.full((2 * len(contexts) + 1, vocab_size), 99, dtype=torch.int32)
    for i, context in enumerate(contexts):
        counts[2 * i + 1] = torch.bincount(torch.tensor(context), minlength=vocab_size)
    return Penalties(
        rows=torch.from_numpy(np.flatnonzero(used)),
        slots=torch.from_numpy(np.flatnonzero(used) * 2 + 1),
        repetition=torch.from_numpy(repetition[used])[:, None],
        frequency=torch.from_numpy(frequency[used])[:, None],
        presence=torch.zeros(int(used.sum()), 1),
        output_frequency=torch.zeros(int(used.sum()), 1),
        counts=counts,
    )


def penalise(
    scores: Tensor, contexts: list[list[int]], repetition: np.ndarray, frequency: np.ndarray
) -> Tensor:
    penalties = make_penalties(contexts, repetition, frequency, scores.shape[-1])
    out = scores.clone()
    if penalties is not None:
        penalties(out)
    return out


@examples
@given(penalised())
def test_penalties_are_exact_per_row(
    batch: tuple[Tensor, list[list[int]], np.ndarray, np.ndarray],
) -> None:
    scores, contexts, repetition, frequency = batch
    out = penalise(*batch)
    for row, context, r, f, got in zip(scores, contexts, repetition, frequency, out, strict=True):
        expected = row.double().tolist()
        for token in set(context):
            x = expected[token]
            expected[token] = x * float(r) if x < 0 else x / float(r)
        for token in set(context):
            expected[token] -= float(f) * (context.count(token) / len(context))
        torch.testing.assert_close(
            got.double(), torch.tensor(expected, dtype=torch.double), rtol=1e-6, atol=1e-6
        )
        if r == 1 and f == 0:
            assert bits(got) == bits(row)
        outside = [t for t in range(len(row)) if t not in context]
        assert torch.equal(got[outside], row[outside])


@examples
@given(penalised())
def test_penalties_of_each_row_are_those_it_would_get_alone(
    batch: tuple[Tensor, list[list[int]], np.ndarray, np.ndarray],
) -> None:
    together = penalise(*batch)
    scores, contexts, repetition, frequency = batch
    for i in range(len(together)):
        row = slice(i, i + 1)
        alone = penalise(scores[row], contexts[row], repetition[row], frequency[row])
        assert bits(together[i]) == bits(alone)


@examples
@given(penalised())
def test_one_penalty_alone_is_as_if_the_other_were_absent(
    batch: tuple[Tensor, list[list[int]], np.ndarray, np.ndarray],
) -> None:
    scores, contexts, repetition, frequency = batch
    in_context = torch.zeros_like(scores, dtype=torch.bool)
    for i, context in enumerate(contexts):
        in_context[i, context] = True
    r = torch.from_numpy(repetition)[:, None]
    only = torch.where(in_context, torch.where(scores < 0, scores * r, scores / r), scores)
    assert torch.equal(penalise(scores, contexts, repetition, 0 * frequency), only)


def test_the_repetition_penalty_applies_once_however_often_the_token_occurs() -> None:
    scores = torch.tensor([[2.0, -2.0, 2.0]])
    out = penalise(scores, [[0, 0, 0, 1]], single([2.0]), single([0.0]))
    assert out.tolist() == [[1.0, -4.0, 2.0]]


def test_the_frequency_penalty_takes_a_share_of_the_context_not_a_count() -> None:
    scores = torch.zeros(1, 3)
    out = penalise(scores, [[0, 0, 0, 1]], single([1.0]), single([2.0]))
    assert out.tolist() == [[-1.5, -0.5, 0.0]]


def test_the_repetition_penalty_comes_before_the_frequency_penalty() -> None:
    """2 / 2 - 1.5 = -0.5; in the other order, (2 - 1.5) / 2 = 0.25."""
    out = penalise(torch.tensor([[2.0, 0.0]]), [[0]], single([2.0]), single([1.5]))
    assert out.tolist() == [[-0.5, 0.0]]


def test_a_short_context_beside_a_long_one_is_not_padded() -> None:
    """Text Generation Inference pads it with token 0 and divides by the padded length."""
    scores = torch.ones(2, 3)
    contexts = [[1], [2] * 9 + [0]]
    out = penalise(scores, contexts, single([2.0, 2.0]), single([1.0, 1.0]))
    torch.testing.assert_close(out, torch.tensor([[1.0, -0.5, 1.0], [0.4, 1.0, -0.4]]))


def test_each_rows_new_token_is_counted_and_marked_in_its_own_slot() -> None:
    neutral = single([1.0, 1.0, 1.0])
    penalties = make_penalties([[0], [1], [2]], neutral, single([1.0, 0.0, 1.0]), 4)
    assert penalties is not None
    before = penalties.counts.clone()
    penalties.count(torch.tensor([3, 0, 2]))
    before[1, 3] += 1 + GENERATED
    before[5, 2] += 1 + GENERATED
    assert torch.equal(penalties.counts, before)
