"""The same seed gives the same text: alone or in a batch, before and after preemption."""

import random
from typing import Any

import pytest

from engine.core.request import Finished, Request
from tests.engine.driving import greedy, make_engine, run
from tests.engine.models import family

NUM_TOKENS = 24
PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"top_k": 20},
    {"top_p": 0.9},
    {"typical_p": 0.8},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1},
]


def requests() -> list[Request]:
    rng = random.Random(3)
    return [
        greedy(
            rng.choices(range(256), k=10 + 7 * i),
            NUM_TOKENS,
            do_sample=True,
            seed=(1 << 64) - 1 - i,
            **parameters,
        )
        for i, parameters in enumerate(PARAMETERS)
    ]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    answers = []
    for request in requests():
        engine = make_engine(family("llama"))
        answers.append(run(engine, [(0, request)]).ids(request))
    return answers


@pytest.mark.slow
def test_sampled_tokens_in_a_batch_are_those_of_the_request_alone(alone: list[list[int]]) -> None:
    engine = make_engine(family("llama"), max_batch_tokens=16)
    others = [greedy([i, i + 1, i + 2], 9) for i in range(4)]
    sampled = requests()
    arrivals = [(2 * i, r) for i, r in enumerate(sampled)] + [(5, r) for r in others]
    answers = run(engine, arrivals)
    assert [answers.ids(r) for r in sampled] == alone


def test_sampled_tokens_survive_preemption(alone: list[list[int]]) -> None:
    engine = make_engine(family("llama"), num_blocks=8, max_total_tokens=96)
    sampled = requests()
    answers = run(engine, [(0, r) for r in sampled])
    assert engine.figures().num_preemptions > 0
    assert [answers.ids(r) for r in sampled] == alone


def test_another_seed_gives_another_text(alone: list[list[int]]) -> None:
    first = requests()[0]
    other = greedy(first.prompt_ids, NUM_TOKENS, do_sample=True, temperature=0.8, seed=7)
    engine = make_engine(family("llama"))
    assert run(engine, [(0, other)]).ids(other) != alone[0]


def test_the_seed_is_reported_for_sampled_requests_only() -> None:
    engine = make_engine(family("llama"))
    sampled = greedy([1, 2, 3], 2, do_sample=True, seed=11)
    plain = greedy([1, 2, 3], 2, seed=11)
    answers = run(engine, [(0, sampled), (0, plain)])
    endings = [answers.last(sampled), answers.last(plain)]
    assert [e.seed for e in endings if isinstance(e, Finished)] == [11, None]


def test_each_token_comes_with_its_top_tokens() -> None:
    engine = make_engine(family("llama"))
    request = greedy([1, 2, 3], 5, top_n_tokens=3)
    outputs = run(engine, [(0, request)]).tokens(request)
    for output in outputs:
        logprobs = [token.logprob for token in output.top_tokens if token.logprob is not None]
        assert len(logprobs) == 3
        assert logprobs == sorted(logprobs, reverse=True)
        assert output.top_tokens[0].id == output.token.id
        assert output.top_tokens[0].logprob == output.token.logprob
