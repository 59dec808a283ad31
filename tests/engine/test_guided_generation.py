"""Answers match their grammar, alone and in a batch, even if the model generates anything."""

import json
import re
import time
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from engine.core.request import (
    Failed,
    Finished,
    FinishReason,
    SamplingParams,
)
from engine.text.grammar import (
    TokenMasks,
)
from tests.engine.driving import run
from tests.engine.guided import (
    FREE,
    GREEDY,
    HOSTILE,
    KINDS,
    ORDER,
    check_same,
    compiler,
    engine,
    free_request,
    guided_requests,
    json_request,
    kinds,
    regex_request,
    request,
    seeded,
    slow,
    text,
)
from tests.engine.test_failures import sabotage
from tests.engine.text.schemas import SCHEMAS


def check_valid(schema: dict[str, Any], said: str) -> None:
    Draft202012Validator(schema).validate(json.loads(said))


def generate_all(names: list[str], seed: int) -> dict[str, str]:
    """Eight at a time, with unguided requests among them."""
    requests = {n: json_request(SCHEMAS[n], sampling=seeded(seed)) for n in names}
    arrivals = [(3 * i, r) for i, r in enumerate(requests.values())]
    free = [request(None, FREE, max_new_tokens=30, ignore_eos=True) for _ in range(8)]
    answers = run(engine(), [*arrivals, *((20 * i, r) for i, r in enumerate(free))])
    answers.check_endings([*requests.values(), *free])
    said = {}
    for name, guided in requests.items():
        finished = answers.last(guided)
        assert isinstance(finished, Finished), (name, finished)
        assert finished.reason is FinishReason.EOS_TOKEN, (name, finished.generated_text)
        said[name] = finished.generated_text
    return said


def test_there_are_sixty_schemas() -> None:
    assert len(SCHEMAS) >= 60


@pytest.mark.slow
def test_greedy_answers_are_valid() -> None:
    for name, said in generate_all(list(SCHEMAS)[::4], seed=0).items():
        check_valid(SCHEMAS[name], said)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_sampled_answers_are_valid_for_any_seed(seed: int) -> None:
    for name, said in generate_all(list(SCHEMAS), seed).items():
        check_valid(SCHEMAS[name], said)


FORMATS = {
    "date": r"\d{4}-\d{2}-\d{2}",
    "time": r"\d{2}:\d{2}:\d{2}(\.\d+)?([zZ]|[+-]\d{2}:\d{2})",
    "date and time": r"\d{4}-\d{2}-\d{2}[tT]\d{2}:\d{2}:\d{2}(\.\d+)?([zZ]|[+-]\d{2}:\d{2})",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"(\d{1,3}\.){3}\d{1,3}",
}


@pytest.mark.slow
def test_strings_with_a_format_have_that_format() -> None:
    for name, said in generate_all(list(FORMATS), seed=7).items():
        assert re.fullmatch(FORMATS[name], json.loads(said)), (name, said)


PATTERNS = [
    "[0-9]{3}-[0-9]{4}",
    "(yes|no)",
    "a{3}b?c{0,4}",
    "[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8}){0,2}",
    r"\d{1,3}(\.\d{1,3}){3}",
    "(foo|foobar|foobarbaz)!",
    "größe: [0-9]{1,4} (mm|cm|km)",
    "[ぁ-ん]{1,6}",
    r"\$[0-9]{1,6}\.[0-9]{2}",
    "🙂{1,3}",
    "line one\nline [0-9]",
    "The answer is: (forty-two|fifty-four)\\.",
]


def test_answers_match_the_regex_as_a_whole() -> None:
    requests = {(p, s): regex_request(p, sampling=seeded(s)) for p in PATTERNS for s in range(3)}
    answers = run(engine(), [(i, r) for i, r in enumerate(requests.values())])
    for (pattern, _), guided in requests.items():
        said = text(answers, guided)
        assert re.fullmatch(pattern, said), (pattern, said)


def test_an_answer_may_be_empty_if_the_grammar_allows_it() -> None:
    guided = regex_request("")
    answers = run(engine(), [(0, guided)])
    assert text(answers, guided) == ""
    assert answers.ids(guided) == [2]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_eos_ends_the_sequence_where_the_grammar_may_end_and_adds_no_text(ignore_eos: bool) -> None:
    """This holds if the client asks to ignore EOS, too: no other token could follow."""
    guided = [
        regex_request("[0-9]{2,4}", sampling=seeded(i), ignore_eos=ignore_eos) for i in range(8)
    ]
    answers = run(engine(), [(0, r) for r in guided])
    for r in guided:
        *ids, last = answers.ids(r)
        assert last == 2
        assert 2 not in ids
        finished = answers.last(r)
        assert isinstance(finished, Finished)
        assert finished.reason is FinishReason.EOS_TOKEN
        assert 2 <= len(finished.generated_text) <= 4
        assert finished.generated_text.isdigit()


@kinds
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="company"),
        pytest.param({"max_batch_tokens": 9}, id="chunks"),
        pytest.param({"num_blocks": 9, "max_total_tokens": 144}, id="preemption"),
    ],
)
@pytest.mark.slow
def test_answers_are_the_same_alone_and_in_a_batch(
    sampling: SamplingParams, config: dict[str, object]
) -> None:
    requests = [*guided_requests(sampling), free_request(sampling)]
    serving = engine(**config)
    check_same(run(serving, [(2 * i, r) for i, r in enumerate(requests)]), requests)
    if "num_blocks" in config:
        assert serving.figures().num_preemptions > 0


def test_answers_are_the_same_after_steps_that_sample_nothing() -> None:
    """The prompt is alone and in chunks: sampling after the last chunk waits for no token."""
    guided = regex_request("[a-z]{12}", sampling=GREEDY, prompt="a long prompt " * 20)
    check_same(run(engine(max_batch_tokens=16), [(0, guided)]), [guided])


@kinds
@pytest.mark.parametrize("step", [0, 2, *(pytest.param(n, marks=slow) for n in (1, 3, 5, 9))])
def test_answers_are_the_same_after_a_lost_step(sampling: SamplingParams, step: int) -> None:
    requests = guided_requests(sampling)
    serving = engine()
    sabotage(serving, lambda _: serving.num_steps == step, ValueError("once"))
    check_same(run(serving, [(0, r) for r in [free_request(FREE), *requests]]), requests)


@pytest.mark.slow
def test_a_failure_in_sampling_is_handled_as_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    requests, serving = guided_requests(), engine()
    sample, calls = serving.runner._sample, count()

    def fail_once(*args: Any) -> Any:
        if next(calls) == 3:
            raise ValueError("once")
        return sample(*args)

    monkeypatch.setattr(serving.runner, "_sample", fail_once)
    check_same(run(serving, [(0, r) for r in requests]), requests)


@pytest.mark.slow
def test_each_fork_follows_the_grammar_independently() -> None:
    grammar = compiler().json_schema(ORDER)
    requests = [request(grammar, replace(GREEDY, repetition_penalty=1 + i)) for i in range(3)]
    check_same(run(engine(), [(0, requests)]), requests)


@pytest.mark.slow
def test_unguided_requests_are_unchanged_beside_guided_ones() -> None:
    free = [free_request(sampling) for sampling in KINDS]
    answers = run(engine(), [(i, r) for i, r in enumerate([*guided_requests(), *free])])
    check_same(answers, free)


# -- grammars that fail -----------------------------------------------------------------


def test_a_grammar_in_error_fails_its_own_request_alone() -> None:
    """The hostile grammar compiles, and reaches its limit after some tokens."""
    hostile, *others = regex_request(HOSTILE + "{30}", ignore_eos=True), *guided_requests()
    answers = run(engine(), [(0, r) for r in [hostile, *others]])
    failed = answers.last(hostile)
    assert isinstance(failed, Failed)
    assert "too many expressions" in failed.message
    check_same(answers, others)


def test_a_token_that_the_grammar_does_not_allow_fails_its_own_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This would happen if a mask were lost on the way to the device."""
    serving = engine()
    bad, good = json_request(ORDER), guided_requests()[0]
    fill = TokenMasks.fill

    def fill_wrongly(self: TokenMasks, states: Any) -> Any:
        masks = fill(self, states)
        masks[[i for i, s in enumerate(states) if s is wrong]] = -1
        return masks

    monkeypatch.setattr(TokenMasks, "fill", fill_wrongly)
    serving.add(bad)
    wrong = serving._live[bad.request_id][0].constraint
    answers = run(serving, [(0, good)])
    failed = answers.last(bad)
    assert isinstance(failed, Failed)
    assert "grammar" in failed.message
    check_same(answers, [good])


def test_hostile_grammars_take_bounded_time_a_step() -> None:
    patterns = ["(.*a){50}", ".*.*.*.*.*x", "([ab]*a[ab]{200}|c)*", HOSTILE]
    guided = [regex_request(p, max_new_tokens=100) for p in patterns]
    serving, longest = engine(), 0.0
    for r in guided:
        serving.add(r)
    while serving.has_work:
        started = time.monotonic()
        serving.step()
        longest = max(longest, time.monotonic() - started)
    assert longest < 5
