"""Tokens that a grammar forces are taken several at a time, and the answer stays the same."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.core.request import (
    Finished,
    FinishReason,
    SamplingParams,
)
from engine.text.grammar import (
    GrammarState,
    TokenMasks,
)
from tests.engine.driving import run
from tests.engine.guided import (
    SAMPLED,
    check_same,
    engine,
    guided_requests,
    json_request,
    kinds,
    say,
    text,
)

CONSTANT = {"const": "a long sentence of which no word is for the model to choose, not one"}


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample forced tokens one at a time, with a mask that allows only the next one."""
    forced, fill = GrammarState.forced, TokenMasks.fill
    runs: dict[GrammarState, list[int]] = {}

    def fill_with_the_next(masks: TokenMasks, states: Any) -> Any:
        filled = fill(masks, states)
        for row, state in enumerate(states):
            if not runs.setdefault(state, []):
                continue
            token_id = runs[state].pop(0)
            filled[row] = 0
            filled[row, token_id // 32] = np.uint32(1 << token_id % 32).view(np.int32)
        return filled

    def remember(state: GrammarState) -> list[int]:
        if not runs[state] and len(tokens := forced(state)) > 1:
            runs[state] = tokens
        return []

    monkeypatch.setattr(TokenMasks, "fill", fill_with_the_next)
    monkeypatch.setattr(GrammarState, "forced", remember)


@kinds
def test_taking_forced_tokens_at_once_gives_the_same_answers(
    sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, serving = guided_requests(sampling), engine()
    answers = run(serving, [(0, r) for r in requests])
    check_same(answers, requests)
    one_by_one(monkeypatch)
    drawing = engine()
    check_same(run(drawing, [(0, r) for r in requests]), requests)
    assert drawing.num_steps > serving.num_steps


def test_a_grammar_of_one_text_gives_that_text_token_by_token_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GrammarState, "forced", lambda _: [])
    assert json.loads(say(json_request(CONSTANT))) == CONSTANT["const"]


def test_forced_tokens_take_no_steps_of_their_own() -> None:
    guided, serving = json_request(CONSTANT), engine()
    answers = run(serving, [(0, guided)])
    assert len(answers.ids(guided)) > 12
    assert serving.num_steps < 8
    assert json.loads(text(answers, guided)) == CONSTANT["const"]


def test_forced_tokens_have_probability_one() -> None:
    guided = json_request(CONSTANT, sampling=replace(SAMPLED, top_n_tokens=3))
    answers = run(engine(), [(0, guided)])
    outputs = answers.tokens(guided)
    assert [output.token.logprob for output in outputs[1:]] == [0.0] * (len(outputs) - 1)
    for output in outputs[1:]:
        assert [token.id for token in output.top_tokens] == [output.token.id]


@pytest.mark.parametrize("max_new_tokens", range(1, 14))
def test_the_limit_within_a_forced_run_ends_it_there(max_new_tokens: int) -> None:
    guided = json_request(CONSTANT, max_new_tokens=max_new_tokens)
    whole = json_request(CONSTANT)
    answers = run(engine(), [(0, guided), (0, whole)])
    assert answers.ids(guided) == answers.ids(whole)[:max_new_tokens]
    finished = answers.last(guided)
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.LENGTH
    assert finished.num_generated_tokens == max_new_tokens


def test_a_stop_string_within_a_forced_run_ends_it_there() -> None:
    guided = json_request(CONSTANT, stop=("no word",))
    answers = run(engine(), [(0, guided)])
    finished = answers.last(guided)
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.STOP_SEQUENCE
    assert finished.generated_text.endswith("of which no word")


@pytest.mark.parametrize("steps", range(6))
def test_an_abort_in_any_phase_frees_the_sequence(steps: int) -> None:
    staying, leaving, *_ = guided_requests()
    answers = run(engine(), [(0, leaving), (0, staying)], aborts={steps: leaving})
    check_same(answers, [staying])
