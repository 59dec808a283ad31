"""OpenAI's sampling parameters do what its reference documents, in float64 and step by step.

    mu[j] -> mu[j] - c[j] * frequency_penalty - float(c[j] > 0) * presence_penalty

where c[j] is how often token j was generated so far; a logit bias is added before. Logprobs are
those of the model's own distribution where a request asks for that.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.request import Request, SamplingParams, StoppingParams
from engine.loading.loader import LoadedModel
from engine.text.grammar import GrammarCompiler
from kernels.ops import TRITON
from kernels.sampling import gumbel_noise, noise_keys
from tests.engine.driving import Answers, make_engine, own_attention, run
from tests.engine.models import VOCAB_SIZE, byte_tokenizer, family, prepared, reference
from tests.engine.test_failures import sabotage

TOLERANCE = 2e-4
_numbers = count()


# -- the documented formula -------------------------------------------------------------


def log_softmax(scores: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", over="ignore"):
        shifted = scores - scores.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def scores_of(
    logits: np.ndarray, p: SamplingParams, prompt: list[int], said: list[int]
) -> np.ndarray:
    """Return what a token is chosen by after `said`, before the temperature; float64."""
    scores = logits.astype(np.float64)
    for token, bias in p.logit_bias:
        scores[token] += bias
    for token in {*prompt, *said}:
        x = scores[token]
        scores[token] = x * p.repetition_penalty if x < 0 else x / p.repetition_penalty
    for token, times in Counter(said).items():
        scores[token] -= times * p.output_frequency_penalty + p.presence_penalty
    return scores


@torch.inference_mode()
def own_logits(layers: int, prompt: list[int], said: list[int]) -> np.ndarray:
    """Return the model's logits at each token of `said`, [tokens, vocab_size]."""
    model = reference("llama", num_hidden_layers=layers)
    with own_attention(model):
        logits = model(torch.tensor([prompt + said]), use_cache=False).logits
    rows: np.ndarray = logits[0, len(prompt) - 1 : -1].numpy()
    return rows


def check(answers: Answers, request: Request, layers: int = 4) -> None:
    """Check every token of an answer: that it is the one to choose, and all that is reported."""
    p, prompt, ids = request.sampling, request.prompt_ids, answers.ids(request)
    logits = own_logits(layers, prompt, ids)
    assert len(ids) == request.stopping.max_new_tokens
    for i, output in enumerate(answers.tokens(request)):
        scores = scores_of(logits[i], p, prompt, ids[:i]) / p.temperature
        slack = TOLERANCE * max(1.0, 1 / p.temperature)
        chosen_by = scores
        if p.do_sample:
            keys = noise_keys(np.array([p.seed], np.uint64), np.array([len(prompt) + i]))
            chosen_by = scores + gumbel_noise(torch.from_numpy(keys), VOCAB_SIZE)[0].numpy()
        assert chosen_by[ids[i]] >= chosen_by.max() - slack
        expected = log_softmax(logits[i] if p.raw_logprobs else scores)
        assert output.token.logprob == pytest.approx(expected[ids[i]], abs=slack)
        best = np.sort(expected)[::-1]
        assert len(output.top_tokens) >= p.top_n_tokens
        for place, token in enumerate(output.top_tokens):
            assert token.logprob == pytest.approx(expected[token.id], abs=slack)
            assert token.logprob == pytest.approx(best[place], abs=slack)


# -- random requests in any company -------------------------------------------------------


def random_params(rng: random.Random) -> SamplingParams:
    """Draw parameters, about half of them neutral."""

    def maybe(neutral: float, *used: float) -> float:
        return rng.choice([neutral, rng.choice(used)])

    ids = rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 1, 40]))
    return SamplingParams(
        do_sample=rng.random() < 0.5,
        seed=rng.randrange(2**64),
        temperature=maybe(1.0, 0.5, 1.7),
        repetition_penalty=maybe(1.0, 1.0, 1.5),
        presence_penalty=maybe(0.0, -2.0, 1.5),
        output_frequency_penalty=maybe(0.0, -2.0, 0.7, 2.0),
        logit_bias=tuple((i, rng.choice([-100.0, -1.5, 0.0, 2.5, 5.0, 100.0])) for i in ids),
        logprobs=True,
        top_n_tokens=rng.choice([0, 0, 1, 5]),
        raw_logprobs=rng.random() < 0.5,
    )


def tgi_params(rng: random.Random) -> SamplingParams:
    """Draw parameters of Text Generation Inference's, to run beside."""
    return SamplingParams(
        do_sample=True,
        seed=rng.randrange(2**64),
        top_k=rng.choice([0, 9]),
        frequency_penalty=rng.choice([0.0, 1.5]),
        watermark=rng.random() < 0.5,
        logprobs=True,
        top_n_tokens=rng.choice([0, 2]),
    )


def request(sampling: SamplingParams, prompt: list[int], num_tokens: int = 10) -> Request:
    stopping = StoppingParams(num_tokens, ignore_eos=True)
    return Request(f"openai-{next(_numbers)}", prompt, sampling, stopping)


def random_prompt(rng: random.Random) -> list[int]:
    """Draw a prompt of few different tokens, so that answers share some with it."""
    return rng.choices(rng.sample(range(VOCAB_SIZE), 6), k=rng.choice([1, 5, 17, 40]))


CONFIGS = {
    "in a batch": {},
    "in chunks": {"max_batch_tokens": 9, "max_sequences": 6},
    "preempted": {"num_blocks": 9, "max_total_tokens": 64},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_tokens_and_logprobs_follow_the_documented_formula(
    config: dict[str, int], entropy: int
) -> None:
    rng = random.Random(entropy)
    requests = [request(random_params(rng), random_prompt(rng)) for _ in range(4)]
    others = [request(tgi_params(rng), random_prompt(rng)) for _ in range(2)]
    engine = make_engine(family("llama"), **config)
    arrivals = [(rng.randrange(6), r) for r in [*requests, *others]]
    answers = run(engine, arrivals)
    for r in requests:
        check(answers, r)


@pytest.mark.slow
@pytest.mark.parametrize("entropy", range(3))
def test_the_kernels_follow_the_documented_formula_too(entropy: int) -> None:
    rng = random.Random(entropy)
    requests = [request(random_params(rng), random_prompt(rng), 6) for _ in range(5)]
    engine = make_engine(prepared("llama", TRITON, num_hidden_layers=1))
    answers = run(engine, [(rng.randrange(4), r) for r in requests])
    for r in requests:
        check(answers, r, layers=1)


EVERYTHING = SamplingParams(
    do_sample=True,
    seed=11,
    repetition_penalty=1.3,
    output_frequency_penalty=1.2,
    presence_penalty=0.5,
    logit_bias=((7, 4.0), (9, -3.0)),
    logprobs=True,
    top_n_tokens=3,
)
PROMPT = [7, 7, 9, 30, 7]


@pytest.mark.parametrize("raw", [False, True])
def test_forks_follow_the_documented_formula(raw: bool) -> None:
    kind = replace(EVERYTHING, raw_logprobs=raw)
    group = [request(replace(kind, seed=seed), PROMPT) for seed in range(4)]
    answers = run(make_engine(family("llama")), [(0, group)])
    for r in group:
        check(answers, r)


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_lost_step_is_counted_once(step: int) -> None:
    engine = make_engine(family("llama"))
    sabotage(engine, lambda _: engine.num_steps == step, ValueError("once"))
    requests = [request(replace(EVERYTHING, seed=seed), PROMPT) for seed in range(3)]
    answers = run(engine, [(0, r) for r in requests])
    for r in requests:
        check(answers, r)


def test_a_token_of_the_prompt_costs_no_frequency_penalty_until_it_is_generated() -> None:
    prompt = [5] * 30
    plain = request(SamplingParams(logprobs=True, top_n_tokens=5), prompt, 1)
    penalised = replace(
        plain, request_id="f", sampling=replace(plain.sampling, output_frequency_penalty=2.0)
    )
    answers = run(make_engine(family("llama")), [(0, plain), (0, penalised)])
    assert answers.tokens(plain) == answers.tokens(penalised)


# -- biases -------------------------------------------------------------------------------


def test_a_bias_of_100_chooses_a_token_and_of_minus_100_forbids_it() -> None:
    plain = request(SamplingParams(logprobs=True), PROMPT, 6)
    favoured = request(SamplingParams(logit_bias=((33, 100.0),)), PROMPT, 6)
    answers = run(make_engine(family("llama")), [(0, plain), (0, favoured)])
    assert answers.ids(favoured) == [33] * 6
    first = answers.ids(plain)[0]
    avoiding = request(SamplingParams(logit_bias=((first, -100.0),)), PROMPT, 6)
    assert first not in run(make_engine(family("llama")), [(0, avoiding)]).ids(avoiding)


@cache
def half(ops_name: str) -> LoadedModel:
    ops = {"torch": None, "triton": TRITON}[ops_name]
    return prepared("llama", ops, dtype=torch.bfloat16, num_hidden_layers=1)


each_kernel = pytest.mark.parametrize(
    "ops", ["torch", pytest.param("triton", marks=pytest.mark.slow)]
)


@each_kernel
def test_a_large_bias_keeps_the_digits_of_half_precision_logits(ops: str) -> None:
    """Of bfloat16, a score near 100 leaves no bit of a fraction: equal biases must cancel."""
    ask = SamplingParams(logprobs=True, top_n_tokens=5)
    plain = request(ask, PROMPT, 1)
    answers = run(make_engine(half(ops)), [(0, plain)])
    best = [(t.id, t.logprob) for t in answers.tokens(plain)[0].top_tokens[:5]]
    biased = request(replace(ask, logit_bias=tuple((i, 100.0) for i, _ in best)), PROMPT, 1)
    answers = run(make_engine(half(ops)), [(0, biased)])
    top = [(t.id, t.logprob) for t in answers.tokens(biased)[0].top_tokens[:5]]
    assert [i for i, _ in top] == [i for i, _ in best]
    expected = log_softmax(np.array([logprob for _, logprob in best]))
    assert [logprob for _, logprob in top] == pytest.approx(expected.tolist(), abs=1e-4)


@each_kernel
def test_biases_of_others_do_not_change_a_watermarked_row(ops: str) -> None:
    marked = request(SamplingParams(watermark=True, logprobs=True, top_n_tokens=2), PROMPT, 5)
    alone = run(make_engine(half(ops)), [(0, marked)])
    company = [
        request(replace(EVERYTHING, raw_logprobs=raw, watermark=raw), PROMPT[::-1], 5)
        for raw in (False, True)
    ]
    together = run(make_engine(half(ops)), [(0, r) for r in [*company, marked]])
    assert together.ids(marked) == alone.ids(marked)
    assert together.logprobs(marked) == pytest.approx(alone.logprobs(marked), abs=1e-3)


# -- grammars -----------------------------------------------------------------------------


def guided(pattern: str, sampling: SamplingParams, num_tokens: int = 12) -> Request:
    loaded = family("llama")
    grammars = GrammarCompiler(loaded.tokenizer, VOCAB_SIZE, loaded.eos_token_ids)
    return Request(
        f"guided-{next(_numbers)}",
        PROMPT,
        sampling,
        StoppingParams(num_tokens),
        grammar=grammars.regex(pattern),
    )


def test_a_bias_chooses_among_what_a_grammar_allows_and_nothing_else() -> None:
    a, b, c = byte_tokenizer().encode("abc")
    bias = ((c, 100.0), (b, 50.0), (a, -100.0))
    both = guided("[ab]{5}", SamplingParams(logit_bias=bias))
    only = guided("a{5}", SamplingParams(logit_bias=bias, do_sample=True, seed=3))
    answers = run(make_engine(family("llama")), [(0, both), (0, only)])
    assert answers.ids(both)[:5] == [b] * 5
    assert answers.ids(only)[:5] == [a] * 5


RAW = SamplingParams(logprobs=True, top_n_tokens=3, raw_logprobs=True)
KINDS: dict[str, Callable[[], Request]] = {
    "grammar": lambda: guided("[ab]{5}", RAW),
    "sampled grammar": lambda: guided("[ab]{5}", replace(RAW, do_sample=True, seed=2)),
    "forced text": lambda: guided("[ab] is a letter", RAW, 20),
    "watermark": lambda: request(replace(RAW, watermark=True), PROMPT),
    "bias": lambda: request(replace(RAW, logit_bias=((33, 100.0),)), PROMPT),
    "filters": lambda: request(replace(RAW, do_sample=True, temperature=0.3, top_k=2), PROMPT),
    "top-p": lambda: request(replace(RAW, do_sample=True, top_p=0.2, typical_p=0.8), PROMPT),
    "tgi penalties": lambda: request(
        replace(RAW, repetition_penalty=2.0, frequency_penalty=1.0), PROMPT
    ),
    "greedy": lambda: request(RAW, PROMPT),
}


def check_raw(answers: Answers, asked: Request, layers: int = 4) -> None:
    ids, n = answers.ids(asked), asked.sampling.top_n_tokens
    own = log_softmax(own_logits(layers, asked.prompt_ids, ids))
    expected = own[np.arange(len(ids)), ids].tolist()
    assert answers.logprobs(asked) == pytest.approx(expected, abs=TOLERANCE)
    for output, row in zip(answers.tokens(asked), own, strict=True):
        top = [token.logprob for token in output.top_tokens[:n]]
        assert top == pytest.approx(np.sort(row)[: -n - 1 : -1].tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("name", KINDS)
def test_raw_logprobs_are_the_models_own_whatever_changes_the_choice(name: str) -> None:
    """Alone, where nothing else keeps the model's logits, and in company that does."""
    asked = KINDS[name]()
    check_raw(run(make_engine(family("llama")), [(0, asked)]), asked)
    requests = [make() for make in KINDS.values()]
    others = [guided("[ab]{6}", replace(RAW, raw_logprobs=False)), request(EVERYTHING, PROMPT)]
    answers = run(
        make_engine(family("llama"), max_sequences=16), [(0, r) for r in [*others, *requests]]
    )
    for r in requests:
        check_raw(answers, r)
    check(answers, others[1])


@pytest.mark.slow
def test_raw_logprobs_of_the_kernels_are_the_models_own() -> None:
    engine = make_engine(prepared("llama", TRITON, num_hidden_layers=1), max_sequences=16)
    requests = [make() for make in KINDS.values()]
    answers = run(engine, [(0, r) for r in requests])
    for r in requests:
        check_raw(answers, r, layers=1)


def test_logprobs_are_of_the_grammars_choice_where_raw_ones_are_not_asked_for() -> None:
    forced = guided("[ab] is a letter", replace(RAW, raw_logprobs=False), 20)
    answers = run(make_engine(family("llama")), [(0, forced)])
    first, *others = answers.logprobs(forced)
    assert first != 0.0
    assert set(others) == {0.0}


# -- temperatures ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-40, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    greedy = request(SamplingParams(logprobs=True), PROMPT)
    kind = SamplingParams(do_sample=True, seed=5, temperature=temperature, top_n_tokens=2)
    sampled = [
        request(replace(kind, logprobs=True), PROMPT),
        request(replace(kind, logprobs=True, top_p=0.9, top_k=3), PROMPT),
    ]
    answers = run(make_engine(family("llama")), [(0, r) for r in [greedy, *sampled]])
    for r in sampled:
        assert answers.ids(r) == answers.ids(greedy)
        assert answers.logprobs(r) == pytest.approx([0.0] * 10, abs=1e-4)
        assert [t.id for o in answers.tokens(r) for t in o.top_tokens[:1]] == answers.ids(r)
