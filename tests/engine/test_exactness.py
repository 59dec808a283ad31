"""Greedy answers equal those of transformers' `generate`, whatever else the engine computes."""

import random
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core.request import Request
from engine.engine import Engine
from tests.engine.driving import Answers, check_greedy, generate, greedy, make_engine, run
from tests.engine.models import FAMILIES, VOCAB_SIZE, family, reference
from tests.thorough import THOROUGH

NUM_TOKENS = 12


@cache
def prompts() -> list[list[int]]:
    """Lengths on both sides of a block's and the window's; two share their first 34 tokens."""
    rng = random.Random(2)
    lengths = (5, 29, 1, 40, 16, 33)
    own = [[rng.randrange(256) for _ in range(n)] for n in lengths]
    shared = [rng.randrange(256) for _ in range(34)]
    return [*own, shared + own[0], shared + own[1]]


def check(name: str, answers: Answers, requests: list[Request]) -> None:
    answers.check_endings(requests)
    for request in requests:
        check_greedy(reference(name), answers, request)


FAST = ("llama", "gemma2")
families = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", families)
class TestEveryFamily:
    def test_a_request_alone(self, name: str) -> None:
        loaded = family(name)
        engine = make_engine(loaded)
        for prompt in prompts()[:4]:
            request = greedy(prompt, NUM_TOKENS)
            answers = run(engine, [(0, request)])
            check(name, answers, [request])
            assert answers.ids(request) == generate(reference(name), prompt, NUM_TOKENS)

    def test_requests_that_come_and_go_in_a_batch(self, name: str) -> None:
        engine = make_engine(family(name), max_sequences=4)
        requests = [greedy(p, NUM_TOKENS - i) for i, p in enumerate(prompts())]
        leaving = [greedy(p[::-1], 40) for p in prompts()[:3]]
        arrivals = [(3 * i, r) for i, r in enumerate(requests)]
        arrivals += [(2 * i, r) for i, r in enumerate(leaving)]
        aborts = {5: leaving[0], 9: leaving[1], 14: leaving[2]}
        check(name, run(engine, arrivals, aborts), requests)

    def test_prompts_in_chunks_of_odd_sizes(self, name: str) -> None:
        engine = make_engine(family(name), max_batch_tokens=7, max_sequences=5)
        requests = [greedy(p, NUM_TOKENS) for p in prompts()]
        check(name, run(engine, [(i, r) for i, r in enumerate(requests)]), requests)

    def test_requests_with_prefix_hits(self, name: str) -> None:
        engine = make_engine(family(name))
        requests = [greedy(p, NUM_TOKENS) for p in prompts() * 2]
        check(name, run(engine, [(6 * i, r) for i, r in enumerate(requests)]), requests)
        assert engine.figures().num_prefix_hit_tokens > 100

    def test_requests_that_are_preempted(self, name: str) -> None:
        engine = make_engine(family(name), num_blocks=9, max_total_tokens=128)
        requests = [greedy(p, 2 * NUM_TOKENS) for p in prompts()]
        check(name, run(engine, [(0, r) for r in requests]), requests)
        assert engine.figures().num_preemptions > 0


# Few first tokens, so that prompts often share blocks; lengths that cross block borders.
traffic = st.lists(
    st.tuples(
        st.integers(0, 12),  # arrival
        st.integers(0, 2),  # which shared beginning
        st.integers(0, 50),  # how much of it
        st.integers(1, 8),  # own tokens
        st.integers(1, 20),  # tokens to generate
        st.none() | st.integers(1, 30),  # steps until it is cancelled
    ),
    min_size=2,
    max_size=10,
)


def _serve(engine: Engine, plan: list[tuple[int, int, int, int, int, int | None]]) -> None:
    beginnings = [random.Random(i).choices(range(256), k=50) for i in range(3)]
    kept, arrivals, aborts = [], [], {}
    for arrival, which, shared, own, num_tokens, cancelled in plan:
        tail = random.Random(own).choices(range(VOCAB_SIZE - 2), k=own)
        request = greedy(beginnings[which][:shared] + tail, num_tokens)
        arrivals.append((arrival, request))
        if cancelled is None:
            kept.append(request)
        else:
            aborts[arrival + cancelled] = request
    check("llama", run(engine, arrivals, aborts), kept)


@pytest.mark.slow
@pytest.mark.thorough
@given(traffic, st.integers(6, 12), st.integers(4, 40))
@settings(max_examples=100 * THOROUGH, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_traffic_over_a_full_pool(
    plan: list[tuple[int, int, int, int, int, int | None]], num_blocks: int, budget: int
) -> None:
    """Answers are the same with and without prefix hits, with a full pool and preemption."""
    engine = make_engine(
        family("llama"), num_blocks=num_blocks, max_batch_tokens=budget, max_sequences=4
    )
    _serve(engine, plan)
