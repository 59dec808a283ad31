"""The torch sampler agrees with a literal version of Text Generation Inference's steps.

All logprobs are read off `top_ids` by asking for as many as there are tokens.
"""

import dataclasses
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.core.request import SamplingParams
from engine.sampling.sampler import SampledTokens
from engine.sampling.torch_sampler import TorchSampler
from kernels.sampling import gumbel_noise, noise_keys

CPU = torch.device("cpu")

examples = settings(max_examples=40, deadline=None)

# -- the reference --------------------------------------------------------------------


def process(
    logits: Tensor, params: SamplingParams, context: list[int], num_prompt: int | None = None
) -> Tensor:
    """Return one row's scores after all steps, in their order, [vocab_size] float32.

    The context is all prompt, unless it is said how much of it is.
    """
    x = logits.float().clone()
    if params.repetition_penalty != 1:
        ids, r = torch.tensor(sorted(set(context))), params.repetition_penalty
        x[ids] = torch.where(x[ids] < 0, x[ids] * r, x[ids] / r)
    if params.frequency_penalty != 0:
        share = torch.zeros_like(x)
        for token, count in Counter(context).items():
            share[token] = count / len(context)
        x = x - params.frequency_penalty * share
    if num_prompt is not None:
        for token, count in Counter(context[num_prompt:]).items():
            x[token] -= count * params.output_frequency_penalty + params.presence_penalty
    if params.temperature != 1:
        x = x / params.temperature
    if params.top_k != 0:
        kth = x.sort(descending=True).values[min(params.top_k, len(x)) - 1]
        x = x.masked_fill(x < kth, -math.inf)
    if params.top_p != 1:
        ascending = x.sort().values
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - torch.tensor(params.top_p)
        drop[-1] = False
        x = x.masked_fill(x < ascending[~drop][0], -math.inf)
    if params.typical_p != 1:
        logprobs = x.log_softmax(-1)
        entropy = -(logprobs * logprobs.exp()).nansum()
        distance, order = (-logprobs - entropy).abs().sort()
        mass = x[order].softmax(-1).cumsum(-1)
        last = min(int((mass < torch.tensor(params.typical_p)).sum()), len(x) - 1)
        drop = distance > distance[last]
        x = x.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), -math.inf)
    return x


def choose(scores: Tensor, params: SamplingParams, position: int) -> int:
    if not params.do_sample:
        return int(scores.argmax())
    keys = noise_keys(np.array([params.seed], np.uint64), np.array([position]))
    return int((scores + gumbel_noise(torch.from_numpy(keys), len(scores))[0]).argmax())


NEUTRAL = SamplingParams()
STEPS = (
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)

# -- random requests ------------------------------------------------------------------


def single(value: float) -> float:
    """Round to float32, the type that parameters have in the HTTP API."""
    return float(np.float32(value))


def random_params(entropy: int) -> SamplingParams:
    """Draw parameters that use about half of the steps; a generator is cheaper than hypothesis."""
    rng = random.Random(entropy)
    frequency = rng.choice(["frequency_penalty", "output_frequency_penalty"])

    def maybe(neutral: float, *used: float) -> float:
        return rng.choice([neutral, single(rng.choice(used))])

    return SamplingParams(
        do_sample=rng.random() < 0.5,
        temperature=maybe(1.0, 0.3, 0.9, 2.5),
        top_k=int(maybe(0, 1, 3, 10, 100)),
        top_p=maybe(1.0, 0.05, 0.6, 0.95),
        typical_p=maybe(1.0, 0.2, 0.7),
        repetition_penalty=maybe(1.0, 0.5, 1.2, 3.0),
        **{frequency: maybe(0.0, -1.5, 0.3, 2.0)},  # type: ignore[arg-type]
        presence_penalty=maybe(0.0, -0.5, 1.5),
        seed=rng.choice([0, 2**63, 2**64 - 1, rng.randrange(2**64), rng.randrange(2**64)]),
        logprobs=rng.random() < 0.5,
        top_n_tokens=rng.randrange(5),
    )


sampling_params = st.integers(0, 2**32 - 1).map(random_params)


@st.composite
def score_rows(draw: st.DrawFn, num_rows: int, vocab_size: int) -> Tensor:
    """Draw float32 scores; half of the rows are full of ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = num_rows, vocab_size
    tied, loose = rng.integers(-6, 7, shape) / 2, rng.normal(0, 3, shape)
    rows = np.where(rng.random((num_rows, 1)) < 0.5, tied, loose)
    return torch.from_numpy(rows.astype(np.float32))


class Batch:
    """Sequences in slots of one sampler; row i of a step is the i-th of `slots`."""

    def __init__(self, params: list[SamplingParams], contexts: list[list[int]], vocab_size: int):
        self.params, self.contexts = params, [list(context) for context in contexts]
        # In reverse order and with gaps: rows are not slots.
        self.slots = [2 * i for i in reversed(range(len(params)))]
        self.sampler = TorchSampler(2 * len(params), vocab_size, CPU)
        for slot, p, context in zip(self.slots, params, contexts, strict=True):
            start(self.sampler, slot, p, context)

    def step(self, logits: Tensor, rows: list[int]) -> SampledTokens:
        """Sample one token for each of these rows."""
        slots = np.array([self.slots[i] for i in rows])
        positions = np.array([len(self.contexts[i]) for i in rows])
        sampled = run(self.sampler, logits, slots, positions)
        for i, token in zip(rows, sampled.ids.tolist(), strict=True):
            self.contexts[i].append(token)
        return sampled


def run(
    sampler: TorchSampler, logits: Tensor, slots: np.ndarray, positions: np.ndarray
) -> SampledTokens:
    """Plan and sample one step, leaving the logits as they are."""
    plan = sampler.plan(slots, positions)
    arrays = {name: torch.from_numpy(array) for name, array in plan.arrays.items()}
    return sampler.sample(logits.clone(), arrays, plan.kind)


def start(
    sampler: TorchSampler,
    slot: int,
    params: SamplingParams,
    context: list[int],
    num_prompt: int | None = None,
) -> None:
    """Do what the engine does with a sequence that is new to a slot.

    Its context is all prompt unless `num_prompt` is given.
    """
    sampler.set_parameters(slot, params)
    if sampler.slots.needs_counts(slot):
        num_prompt = len(context) if num_prompt is None else num_prompt
        counts_prompt = sampler.slots.counts_prompt(slot)
        sampler.slots.start_counts(slot, torch.tensor(context), num_prompt, counts_prompt)


def sample(
    logits: Tensor, *params: SamplingParams, contexts: list[list[int]] | None = None
) -> SampledTokens:
    contexts = contexts or [[0]] * len(params)
    return Batch(list(params), contexts, logits.shape[-1]).step(logits, list(range(len(params))))


def all_logprobs(sampled: SampledTokens, row: int) -> Tensor:
    assert sampled.top_ids is not None
    assert sampled.top_logprobs is not None
    return torch.empty(sampled.top_ids.shape[-1]).scatter(
        0, sampled.top_ids[row], sampled.top_logprobs[row]
    )


@st.composite
def batches(
    draw: st.DrawFn, num_steps: int = 1
) -> tuple[list[SamplingParams], list[list[int]], list[Tensor]]:
    num_rows, vocab_size = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    token = st.integers(0, vocab_size - 1)
    params = [draw(sampling_params) for _ in range(num_rows)]
    contexts = [draw(st.lists(token, min_size=1, max_size=10)) for _ in range(num_rows)]
    logits = [draw(score_rows(num_rows, vocab_size)) for _ in range(num_steps)]
    return params, contexts, logits


# -- all steps together ---------------------------------------------------------------


@examples
@given(batches())
def test_tokens_and_logprobs_are_those_of_the_processed_scores(
    batch: tuple[list[SamplingParams], list[list[int]], list[Tensor]],
) -> None:
    params, contexts, [logits] = batch
    asked = [dataclasses.replace(p, top_n_tokens=logits.shape[-1], logprobs=True) for p in params]
    sampled = sample(logits, *asked, contexts=contexts)
    assert sampled.logprobs is not None
    for i, (p, context) in enumerate(zip(params, contexts, strict=True)):
        scores = process(logits[i], p, context)
        logprobs = scores.log_softmax(-1)
        torch.testing.assert_close(all_logprobs(sampled, i), logprobs, rtol=1e-5, atol=1e-5)
        token = int(sampled.ids[i])
        assert token == choose(scores, p, len(context))
        assert logprobs[token] > -math.inf
        torch.testing.assert_close(sampled.logprobs[i], logprobs[token], rtol=1e-5, atol=1e-5)


@examples
@given(batches(num_steps=3), st.data())
def test_a_row_in_a_batch_comes_out_as_it_would_alone(
    batch: tuple[list[SamplingParams], list[list[int]], list[Tensor]], data: st.DataObject
) -> None:
    """The batch runs several steps, each with only some of the rows."""
    params, contexts, steps = batch
    together = Batch(params, contexts, steps[0].shape[-1])
    alone = [
        Batch([p], [context], steps[0].shape[-1])
        for p, context in zip(params, contexts, strict=True)
    ]
    for logits in steps:
        rows = data.draw(st.permutations(range(len(params))))
        rows = rows[: data.draw(st.integers(1, len(rows)))]
        sampled = together.step(logits[rows], rows)
        for row, i in enumerate(rows):
            own = alone[i].step(logits[i : i + 1], [0])
            assert sampled.ids[row] == own.ids[0]
            if params[i].logprobs:
                assert sampled.logprobs is not None
                assert own.logprobs is not None
                assert sampled.logprobs[row] == own.logprobs[0]
            if params[i].top_n_tokens:
                assert sampled.top_logprobs is not None
                assert own.top_logprobs is not None
                n = own.top_logprobs.shape[-1]
                assert torch.equal(sampled.top_logprobs[row, :n], own.top_logprobs[0])


@examples
@given(batches(), st.data())
def test_neutral_rows_are_untouched_by_what_others_use(
    batch: tuple[list[SamplingParams], list[list[int]], list[Tensor]], data: st.DataObject
) -> None:
    """The neutral row's logprobs are bit for bit the log-softmax of its own logits."""
    params, contexts, [logits] = batch
    neutral = data.draw(st.integers(0, len(params) - 1))
    asked = [dataclasses.replace(p, top_n_tokens=logits.shape[-1]) for p in params]
    asked[neutral] = SamplingParams(top_n_tokens=logits.shape[-1], logprobs=True)
    sampled = sample(logits, *asked, contexts=contexts)
    assert torch.equal(all_logprobs(sampled, neutral), logits[neutral].log_softmax(-1))
    assert sampled.ids[neutral] == logits[neutral].argmax()


def test_a_row_of_nan_harms_no_other() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [math.nan] * 3, [1.0, 3.0, 2.0]])
    all_steps = SamplingParams(
        do_sample=True,
        temperature=0.5,
        top_k=2,
        top_p=0.9,
        typical_p=0.9,
        repetition_penalty=1.1,
        frequency_penalty=0.1,
        presence_penalty=0.5,
        seed=5,
        logprobs=True,
        top_n_tokens=2,
    )
    sampled = sample(logits, all_steps, all_steps, SamplingParams(logprobs=True))
    own = sample(logits[:1], all_steps)
    assert sampled.ids[0] == own.ids[0]
    assert sampled.ids[2] == 1
    assert sampled.logprobs is not None
    assert own.logprobs is not None
    assert sampled.logprobs[0] == own.logprobs[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_processed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    sampled = sample(logits, SamplingParams(temperature=0.7, top_n_tokens=500))
    expected = (logits.float() / 0.7).log_softmax(-1)[0]
    torch.testing.assert_close(all_logprobs(sampled, 0), expected, rtol=1e-6, atol=1e-6)


# -- the order of the steps: each example comes out differently with two of them swapped


def test_the_repetition_penalty_then_the_frequency_penalty_then_temperature_apply() -> None:
    """((4 / 2) - 1 * 1) / 0.5 = 2. Frequency first gives 3, temperature before it 3."""
    params = SamplingParams(
        temperature=0.5, repetition_penalty=2.0, frequency_penalty=1.0, top_n_tokens=2
    )
    sampled = sample(torch.tensor([[4.0, 0.0]]), params, contexts=[[0, 0]])
    expected = torch.tensor([2.0, 0.0]).log_softmax(-1)
    torch.testing.assert_close(all_logprobs(sampled, 0), expected)


def test_temperature_applies_before_top_p() -> None:
    """At 0.5, 0.6, 0.3, 0.1 become 0.78, 0.20, 0.02: the first alone reaches 0.7."""
    scores = torch.tensor([[0.6, 0.3, 0.1]]).log()
    sampled = sample(scores, SamplingParams(temperature=0.5, top_p=single(0.7), top_n_tokens=3))
    assert all_logprobs(sampled, 0).tolist() == [0.0, -math.inf, -math.inf]


def test_top_k_applies_before_top_p() -> None:
    """0.4 of all tokens is 0.57 of the best two: alone enough for a top_p of 0.5."""
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    sampled = sample(scores, SamplingParams(top_k=2, top_p=0.5, top_n_tokens=4))
    assert all_logprobs(sampled, 0).tolist() == [0.0, *[-math.inf] * 3]


def test_top_p_applies_before_typical_p() -> None:
    """Of all five, typical_p would keep the 0.15s; of the two left by top_p, it keeps both."""
    scores = torch.tensor([[0.5, 0.2, 0.15, 0.14, 0.01]]).log()
    first = SamplingParams(typical_p=single(0.15), top_n_tokens=5)
    assert all_logprobs(sample(scores, first), 0)[0] == -math.inf
    both = dataclasses.replace(first, top_p=single(0.4))
    assert all_logprobs(sample(scores, both), 0).tolist() == [0.0, *[-math.inf] * 4]


# -- greedy and sampled ---------------------------------------------------------------


@examples
@given(batches(), st.lists(st.booleans(), min_size=5, max_size=5))
def test_greedy_rows_stay_greedy_beside_sampled_ones(
    batch: tuple[list[SamplingParams], list[list[int]], list[Tensor]], noisy: list[bool]
) -> None:
    params, contexts, [logits] = batch
    params = [dataclasses.replace(p, do_sample=s) for p, s in zip(params, noisy, strict=False)]
    sampled = sample(logits, *params, contexts=contexts)
    for i, p in enumerate(params):
        if not p.do_sample:
            scores = process(logits[i], p, contexts[i])
            assert scores[sampled.ids[i]] == scores.max()


def test_equal_seeds_and_positions_draw_equal_tokens_and_others_differ() -> None:
    logits = torch.zeros(6, 50_000)
    seeds = [2**64 - 1, 2**64 - 1, 2**63, 2**63 - 1, 0, 1]
    params = [SamplingParams(do_sample=True, seed=seed) for seed in seeds]
    ids = sample(logits, *params, contexts=[[1, 2, 3]] * 6).ids.tolist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 5
    moved = sample(logits, *params, contexts=[[1, 2, 3, 4]] * 6).ids.tolist()
    assert all(a != b for a, b in zip(ids, moved, strict=True))


def test_a_sequence_draws_the_same_when_it_starts_over_in_another_slot() -> None:
    """After preemption its tokens are counted again; the rest is as if it had stayed."""
    generator = torch.Generator().manual_seed(4)
    steps = [2 * torch.randn(1, 40, generator=generator) for _ in range(8)]
    params = SamplingParams(
        do_sample=True, seed=9, repetition_penalty=1.5, frequency_penalty=1.0, top_k=20
    )
    stays = Batch([params], [[1, 2, 3]], 40)
    for logits in steps:
        stays.step(logits, [0])
    moves = Batch([params], [[1, 2, 3]], 40)
    for logits in steps[:4]:
        moves.step(logits, [0])
    moves = Batch(
        [SamplingParams(repetition_penalty=2.0), params], [[5] * 9, moves.contexts[0]], 40
    )
    for logits in steps[4:]:
        moves.step(logits, [1])
    assert moves.contexts[1] == stays.contexts[0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.5, top_k=8),
        SamplingParams(top_p=single(0.8)),
        SamplingParams(typical_p=single(0.6)),
        SamplingParams(temperature=0.8, top_k=10, top_p=single(0.9), typical_p=single(0.95)),
        pytest.param(
            SamplingParams(repetition_penalty=2.0, frequency_penalty=single(0.5)),
            marks=pytest.mark.slow,
            id="repetition_penalty-frequency_penalty",
        ),
    ],
    ids=lambda p: "-".join(n for n in STEPS if getattr(p, n) != getattr(NEUTRAL, n)),
)
def test_draws_follow_the_processed_softmax(params: SamplingParams) -> None:
    """Chi-square of 40,000 draws by 2,000 seeds; more than 5 deviations is not chance."""
    logits = torch.linspace(2.0, -2.0, 16)
    contexts = [[0, 3, 3, 7]] * 2000
    many = [
        dataclasses.replace(params, do_sample=True, seed=2**63 + 77 * seed) for seed in range(2000)
    ]
    sampler = TorchSampler(2000, 16, CPU)
    for slot, p in enumerate(many):
        start(sampler, slot, p, contexts[slot])
    slots, rows = np.arange(2000), logits.expand(2000, 16)
    counts = torch.zeros(16)
    for position in range(20):
        ids = run(sampler, rows, slots, np.full(2000, position)).ids
        counts += torch.bincount(ids, minlength=16)
        for slot in range(2000):  # the same context for each draw
            if sampler.slots.needs_counts(slot):
                context = torch.tensor(contexts[slot])
                sampler.slots.start_counts(slot, context, len(context))
    expected = process(logits, params, contexts[0]).double().softmax(-1) * 40_000
    assert counts[expected == 0].sum() == 0
    alive = expected > 0
    df = int(alive.sum()) - 1
    statistic = float(((counts - expected)[alive] ** 2 / expected[alive]).sum())
    assert abs(statistic - df) < 5 * math.sqrt(2 * df)


# -- penalties over a sequence's life --------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_context_is_exactly_prompt_and_output_of_the_request(data: st.DataObject) -> None:
    """Sequences come, run beside any others and go; the next in a slot starts from nothing."""
    vocab_size, num_slots = 6, 3
    sampler = TorchSampler(num_slots, vocab_size, CPU)
    live: dict[int, tuple[SamplingParams, list[int], int]] = {}
    rng = data.draw(st.randoms(use_true_random=True))
    for _ in range(data.draw(st.integers(1, 10))):
        slot = rng.randrange(num_slots)
        if slot not in live or rng.random() < 0.3:
            params = random_params(rng.randrange(2**32))
            context = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 5))]
            params = dataclasses.replace(params, top_n_tokens=vocab_size)
            # A preempted sequence comes back with the tokens it had generated.
            live[slot] = params, context, rng.randint(1, len(context))
            start(sampler, slot, *live[slot])
        slots = rng.sample(sorted(live), rng.randint(1, len(live)))
        logits = data.draw(score_rows(len(slots), vocab_size))
        positions = np.array([len(live[s][1]) for s in slots])
        sampled = run(sampler, logits, np.array(slots), positions)
        for row, s in enumerate(slots):
            params, context, num_prompt = live[s]
            expected = process(logits[row], params, context, num_prompt).log_softmax(-1)
            torch.testing.assert_close(all_logprobs(sampled, row), expected, rtol=1e-5, atol=1e-5)
            context.append(int(sampled.ids[row]))


def test_counts_are_allocated_before_any_step_that_needs_them() -> None:
    """The thread that plans allocates them, so that the thread that runs steps never does."""
    sampler = TorchSampler(3, 8, CPU)
    sampler.set_parameters(0, SamplingParams(temperature=0.5, do_sample=True))
    assert sampler.slots._counts is None
    sampler.set_parameters(1, SamplingParams(repetition_penalty=1.1))
    counts = sampler.slots._counts
    assert counts is not None
    sampler.slots.start_counts(1, torch.tensor([3, 3]), 2)
    sampler.plan(np.array([0, 1]), np.array([2, 2]))
    assert sampler.slots._counts is counts


def test_only_penalties_need_counts() -> None:
    sampler = TorchSampler(5, 10, CPU)
    sampler.set_parameters(0, SamplingParams(do_sample=True, temperature=0.5, top_k=3, seed=1))
    sampler.set_parameters(4, SamplingParams(output_frequency_penalty=-0.1))
    sampler.set_parameters(1, SamplingParams(repetition_penalty=1.1))
    sampler.set_parameters(2, SamplingParams(frequency_penalty=-0.1))
    sampler.set_parameters(3, SamplingParams(presence_penalty=-0.1))
    assert [sampler.slots.needs_counts(slot) for slot in range(5)] == [False, *[True] * 4]
    sampler.set_parameters(1, SamplingParams())
    assert not sampler.slots.needs_counts(1)


# -- what is reported -----------------------------------------------------------------


def test_logprobs_are_reported_only_if_a_row_asks_for_them() -> None:
    sampled = sample(torch.randn(2, 9), SamplingParams(), SamplingParams(do_sample=True))
    assert sampled.logprobs is None
    assert sampled.top_ids is None
    assert sampled.top_logprobs is None


@examples
@given(batches(), st.data())
def test_raw_rows_report_the_logits_own_logprobs_and_choose_as_before(
    batch: tuple[list[SamplingParams], list[list[int]], list[Tensor]], data: st.DataObject
) -> None:
    params, contexts, [logits] = batch
    vocab_size = logits.shape[-1]
    params = [dataclasses.replace(p, top_n_tokens=vocab_size, logprobs=True) for p in params]
    raw = data.draw(st.lists(st.booleans(), min_size=len(params), max_size=len(params)))
    mixed = [dataclasses.replace(p, raw_logprobs=r) for p, r in zip(params, raw, strict=True)]
    processed = sample(logits, *params, contexts=contexts)
    sampled = sample(logits, *mixed, contexts=contexts)
    assert torch.equal(sampled.ids, processed.ids)
    assert sampled.logprobs is not None
    for row, is_raw in enumerate(raw):
        own = logits[row].log_softmax(-1) if is_raw else all_logprobs(processed, row)
        assert torch.equal(all_logprobs(sampled, row), own)
        assert sampled.logprobs[row] == own[sampled.ids[row]]


def test_the_only_token_left_has_logprob_zero() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 4)
    params = [
        SamplingParams(do_sample=True, top_k=1, logprobs=True),
        SamplingParams(do_sample=True, top_p=single(0.01), logprobs=True),
        SamplingParams(do_sample=True, temperature=0.0078125, logprobs=True),
        SamplingParams(do_sample=True, typical_p=single(1e-6), logprobs=True),
    ]
    sampled = sample(logits, *params)
    assert sampled.logprobs is not None
    assert sampled.logprobs.tolist() == [0.0] * 4
    assert sampled.ids[:3].tolist() == [1, 1, 1]


def test_plain_greedy_reports_the_models_own_logprobs() -> None:
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(2))
    sampled = sample(logits, SamplingParams(logprobs=True, top_n_tokens=2))
    assert sampled.logprobs is not None
    assert sampled.logprobs[0] == logits.log_softmax(-1).max()


@examples
@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_the_top_tokens_include_every_tie_with_the_nth(
    vocab_size: int, n: int, data: st.DataObject
) -> None:
    """They come best first, and are complete for up to 16 ties beyond the n-th."""
    logits = data.draw(score_rows(1, vocab_size))
    params = SamplingParams(top_n_tokens=n, logprobs=True)
    sampled = sample(logits, params)
    assert sampled.top_ids is not None
    assert sampled.top_logprobs is not None
    logprobs = logits[0].log_softmax(-1)
    top = sampled.top_logprobs[0].tolist()
    assert top == sorted(top, reverse=True)
    assert len(set(sampled.top_ids[0].tolist())) == len(top) >= min(n, vocab_size)
    assert torch.equal(logprobs[sampled.top_ids[0]], sampled.top_logprobs[0])
    threshold = logprobs.sort(descending=True).values[min(n, vocab_size) - 1]
    tied = {i for i, logprob in enumerate(logprobs.tolist()) if logprob >= threshold}
    if len(tied) <= n + 16:
        assert tied <= set(sampled.top_ids[0].tolist())


def test_a_row_that_asks_for_fewer_top_tokens_gets_its_own_beside_one_that_asks_for_more() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(3))
    counts = (1, 5, 0)
    sampled = sample(logits, *(SamplingParams(top_n_tokens=n) for n in counts))
    assert sampled.top_ids is not None
    for row, n in enumerate(counts):
        best = logits[row].sort(descending=True).indices[:n]
        assert torch.equal(sampled.top_ids[row, :n], best)


def test_a_draw_can_be_reproduced_without_the_steps_before_it() -> None:
    """Position 7 of a seed is the same token whether or not positions 0 to 6 were drawn."""
    params = SamplingParams(do_sample=True, seed=2**64 - 2)
    logits = torch.zeros(1, 1000)
    batch = Batch([params], [[0]], 1000)
    drawn = [int(batch.step(logits, [0]).ids) for _ in range(10)]
    for position, token in zip(itertools.count(1), drawn):
        assert sample(logits, params, contexts=[[0] * position]).ids.tolist() == [token]
