"""Sequences forked from one prompt say what each would say alone: token by token, the same
logprobs, whatever becomes of the prompt that they share.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from engine.core.request import (
    Failed,
    Finished,
    Request,
    SamplingParams,
    StoppingParams,
)
from engine.loading.loader import LoadedModel
from engine.step.builder import StepInputs
from kernels.ops import TRITON
from tests.engine.driving import Answers, check_greedy, greedy, make_engine, run
from tests.engine.models import FAMILIES, family, prepared, reference
from tests.engine.test_failures import POISON, poisoned, sabotage

FAST = ("llama",)
families = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES],
)
LENGTHS = [1, 16, 40, 48]

KINDS = [
    SamplingParams(do_sample=True, seed=1, logprobs=True),
    SamplingParams(do_sample=True, seed=2, temperature=1.5, logprobs=True, top_n_tokens=2),
    SamplingParams(do_sample=True, seed=3, top_k=20, repetition_penalty=1.3, logprobs=True),
    SamplingParams(logprobs=True, watermark=True),
    SamplingParams(do_sample=True, seed=4, presence_penalty=2.0, logprobs=True),
]


def group(num_tokens: int, num_forks: int = 4, max_new_tokens: int = 8) -> list[Request]:
    """A leader and its forks, which sample differently."""
    prompt = [(7 * i + num_tokens) % 250 for i in range(num_tokens)]
    return [
        Request(f"{num_tokens}-{i}", prompt, kind, StoppingParams(max_new_tokens, ignore_eos=True))
        for i, kind in enumerate(KINDS[: num_forks + 1])
    ]


@cache
def alone(name: str, num_tokens: int, max_new_tokens: int = 8) -> Answers:
    answers = Answers()
    for request in group(num_tokens, max_new_tokens=max_new_tokens):
        answers.events |= run(make_engine(family(name)), [(0, request)]).events
    return answers


def check(answers: Answers, expected: Answers, requests: list[Request]) -> None:
    answers.check_endings(requests)
    for request in requests:
        assert answers.ids(request) == expected.ids(request), request.request_id
        assert answers.logprobs(request) == pytest.approx(expected.logprobs(request), abs=1e-4)
        assert isinstance(answers.last(request), Finished)


@families
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="at once"),
        pytest.param({"max_batch_tokens": 7, "max_sequences": 5}, id="in chunks"),
        pytest.param({"prefix_caching": False}, id="without a cache"),
        pytest.param({"max_sequences": 2}, id="with too few slots"),
    ],
)
@pytest.mark.slow
def test_forks_answer_as_each_request_does_alone(name: str, config: dict[str, object]) -> None:
    for num_tokens in LENGTHS:
        engine = make_engine(family(name), **config)
        requests = group(num_tokens)
        check(run(engine, [(0, requests)]), alone(name, num_tokens), requests)


@families
def test_the_prompt_of_forks_is_computed_once(name: str) -> None:
    engine = make_engine(family(name))
    lengths = []
    forward = engine.runner.forward

    def counting(inputs: StepInputs) -> torch.Tensor:
        lengths.append(len(inputs.input_ids))
        return forward(inputs)

    engine.runner.forward = counting  # type: ignore[method-assign]
    run(engine, [(0, group(40))])
    assert lengths == [40] + [5] * 7


@pytest.mark.slow
@families
def test_forks_in_a_batch_with_a_full_pool(name: str) -> None:
    engine = make_engine(family(name), num_blocks=9, max_total_tokens=128, max_sequences=6)
    groups = [group(n, max_new_tokens=20) for n in LENGTHS]
    answers = run(engine, [(2 * i, g) for i, g in enumerate(groups)])
    for num_tokens, requests in zip(LENGTHS, groups, strict=True):
        check(answers, alone(name, num_tokens, 20), requests)
    assert engine.figures().num_preemptions > 0


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("config", [{}, {"max_batch_tokens": 16}])
@pytest.mark.slow
def test_forks_continue_when_their_leader_is_aborted(step: int, config: dict[str, object]) -> None:
    """The leader is aborted while it waits, within its prompt, in flight, and later."""
    engine = make_engine(family("llama"), **config)
    leader, *forks = group(40)
    ahead = greedy(range(40), 12)
    answers = run(engine, [(0, ahead), (1, [leader, *forks])], aborts={step + 1: leader})
    check(answers, alone("llama", 40), forks)
    check_greedy(reference("llama"), answers, ahead)


@pytest.mark.parametrize("step", range(6))
def test_an_aborted_fork_does_not_affect_the_others(step: int) -> None:
    engine = make_engine(family("llama"), max_batch_tokens=16)
    requests = group(40)
    leaving = requests[2]
    answers = run(engine, [(0, requests)], aborts={step: leaving})
    check(answers, alone("llama", 40), [r for r in requests if r is not leaving])


@pytest.mark.parametrize("step", range(7))
@pytest.mark.parametrize("config", [{}, {"max_batch_tokens": 16}, {"num_blocks": 9}])
@pytest.mark.slow
def test_a_lost_step_changes_no_fork(step: int, config: dict[str, object]) -> None:
    engine = make_engine(family("llama"), **({"max_total_tokens": 128} | config))
    sabotage(engine, lambda _: engine.num_steps == step, ValueError("once"))
    requests, other = group(40), greedy([1], 20)  # never alone in a step: it would be to blame
    answers = run(engine, [(0, other), (0, requests)])
    check(answers, alone("llama", 40), requests)
    check_greedy(reference("llama"), answers, other)


def test_a_failing_prompt_fails_its_forks_and_no_other_request() -> None:
    engine = make_engine(family("llama"))
    sabotage(engine, poisoned, ValueError("poison"))
    bad = [replace(r, prompt_ids=[9, POISON, 9]) for r in group(40)]
    good = greedy(range(30), 12)
    answers = run(engine, [(0, good), (1, bad)])
    answers.check_endings([good, *bad])
    assert all(answers.last(request) == Failed("ValueError: poison") for request in bad)
    check_greedy(reference("llama"), answers, good)


def test_all_forks_can_be_aborted() -> None:
    engine = make_engine(family("llama"), max_batch_tokens=16)
    requests = group(40)
    engine.add(requests[0], requests[1:])
    engine.step()
    endings = engine.fail_all("the device is lost")
    assert [request_id for request_id, _ in endings] == [r.request_id for r in requests]
    run(engine, [])


@cache
def interpreted() -> LoadedModel:
    return prepared("llama", TRITON, num_hidden_layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [16, 20])
def test_forks_on_the_triton_kernels(num_tokens: int) -> None:
    prompt = list(range(num_tokens))
    requests = [greedy(prompt, 3), greedy(prompt, 4), greedy(prompt, 2, watermark=True)]
    other = greedy(range(50, 60), 3)
    answers = run(make_engine(interpreted()), [(0, requests), (1, other)])
    for request in (*requests[:2], other):
        check_greedy(reference("llama", num_hidden_layers=2), answers, request)
    assert len(answers.ids(requests[2])) == 2
