"""Anthropic's Messages: what the model is asked, the message it answers, the tokens of a prompt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from engine.core.request import Event, FinishReason, ReachedStop, Request
from tests.api.client import client
from tests.api.saying import CALL, NO_TOOL, saying
from tests.api.scripted import (
    ScriptedEngine,
    ScriptedGrammar,
    finished,
    grammar_of,
    output,
)

pytestmark = pytest.mark.anyio

PATH = "/v1/messages"
USER = {"role": "user", "content": "Hi"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Tells it", "input_schema": CITY}
CLOCK = {"name": "clock", "input_schema": {"type": "object"}, "type": "custom"}
ASKED = {"model": "m", "max_tokens": 10, "messages": [USER]}


async def ask(engine: ScriptedEngine | None = None, **body: Any) -> httpx2.Response:
    async with client(engine or saying()) as http:
        return await http.post(PATH, json=ASKED | body)


async def prompt_of(messages: Any, **body: Any) -> list[dict[str, Any]]:
    """Return the messages that the template gets."""
    engine = saying()
    answer = await ask(engine, messages=messages, **body)
    assert answer.status_code == 200, answer.text
    return [dict(message) for message in engine.tokenizer.chats[-1][0]]


async def test_a_text_is_answered_with_a_text_block() -> None:
    answer = (await ask()).json()
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": " Hello you"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 2,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 3,
        },
    }


async def test_ids_are_unique() -> None:
    engine = saying()
    assert (await ask(engine)).json()["id"] != (await ask(engine)).json()["id"]


async def test_parameters_reach_the_engine() -> None:
    engine = saying()
    body = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "stop_sequences": ["x"]}
    await ask(engine, **body)
    (request,) = engine.requests
    assert (request.stopping.max_new_tokens, request.stopping.stop) == (10, ("x",))
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_p": 0}])
async def test_a_temperature_or_top_p_of_0_is_greedy(greedy: Any) -> None:
    engine = saying()
    assert (await ask(engine, **greedy)).status_code == 200
    assert not engine.requests[0].sampling.do_sample


async def test_without_parameters_the_answer_is_sampled() -> None:
    engine = saying()
    await ask(engine, temperature=None, top_p=1, top_k=0, stop_sequences=None)
    sampling = engine.requests[0].sampling
    assert (sampling.do_sample, sampling.top_p, sampling.top_k) == (True, 1.0, 0)


def ending(reason: FinishReason, stop: ReachedStop | None = None) -> ScriptedEngine:
    def script(_: Request) -> Sequence[list[Event]]:
        end = replace(finished("one two", 2, reason), stop=stop)
        return [[output("one")], [output(" two"), end]]

    return ScriptedEngine(script)


@pytest.mark.parametrize(
    ("engine", "max_tokens", "stop"),
    [
        (lambda: ending(FinishReason.EOS_TOKEN), 10, ("end_turn", None)),
        (lambda: ending(FinishReason.LENGTH), 2, ("max_tokens", None)),
        (lambda: ending(FinishReason.LENGTH), 10, ("model_context_window_exceeded", None)),
        (
            lambda: ending(FinishReason.STOP_SEQUENCE, ReachedStop("two", "one ")),
            10,
            ("stop_sequence", "two"),
        ),
        (
            lambda: ending(FinishReason.LENGTH, ReachedStop("two", "one ")),
            2,
            ("stop_sequence", "two"),
        ),
    ],
)
async def test_the_reason_of_the_end(engine: Any, max_tokens: int, stop: Any) -> None:
    answer = (await ask(engine(), max_tokens=max_tokens, stop_sequences=["two"])).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == stop


@pytest.mark.parametrize(
    "content",
    ["Hi", [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]],
)
@pytest.mark.parametrize("system", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
async def test_texts_and_blocks_make_the_same_prompt(content: Any, system: Any) -> None:
    messages = await prompt_of([{"role": "user", "content": content}], system=system)
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


async def test_text_blocks_are_joined_by_line_breaks() -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = await prompt_of([{"role": "user", "content": blocks}], system=blocks)
    assert [message["content"] for message in messages] == ["a\nb", "a\nb"]


async def test_an_answer_and_its_call_can_be_sent_back() -> None:
    call = (await ask(saying(*CALL), tools=[WEATHER])).json()["content"]
    result = {"type": "tool_result", "tool_use_id": call[0]["id"], "content": "rain"}
    messages = await prompt_of(
        [
            USER,
            {"role": "assistant", "content": call},
            {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
        ]
    )
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user"]
    assert "weather" in str(messages[1])
    assert "Oslo" in str(messages[1])
    assert [message["content"] for message in messages[2:]] == ["rain", "And now?"]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({}, ""),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
        ({"content": "no such city", "is_error": True}, "Error: no such city"),
        ({"content": "rain", "is_error": False}, "rain"),
    ],
)
async def test_the_result_of_a_tool_is_a_message_of_the_tool(result: Any, text: str) -> None:
    block = {"type": "tool_result", "tool_use_id": "t1"} | result
    messages = await prompt_of([USER, {"role": "user", "content": [block]}])
    assert [(message["role"], message["content"]) for message in messages[1:]] == [("tool", text)]


async def test_earlier_thoughts_are_not_shown_to_the_model() -> None:
    thoughts = [
        {"type": "thinking", "thinking": "Hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "AAAA"},
        {"type": "text", "text": "Yes"},
    ]
    messages = await prompt_of([USER, {"role": "assistant", "content": thoughts}, USER])
    assert messages[1] == {"role": "assistant", "content": "Yes"}


async def test_a_call_is_a_tool_use_block() -> None:
    answer = (await ask(saying(*CALL), tools=[WEATHER, CLOCK])).json()
    (block,) = answer["content"]
    assert block.pop("id")
    assert block == {"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}}
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)


@pytest.mark.parametrize(
    ("num_pieces", "content"),
    [
        (3, []),
        (4, [("weather", {})]),
        (6, [("weather", {})]),
        (7, [("weather", {})]),
    ],
)
async def test_a_call_that_is_cut_has_what_there_is_of_its_input(
    num_pieces: int, content: Any
) -> None:
    engine = saying(*CALL[:num_pieces], reason=FinishReason.LENGTH)
    answer = (await ask(engine, tools=[WEATHER], max_tokens=num_pieces)).json()
    assert [(block["name"], block["input"]) for block in answer["content"]] == content
    assert answer["stop_reason"] == "max_tokens"


async def test_a_model_that_calls_no_tool_answers_in_words() -> None:
    answer = (await ask(saying(*NO_TOOL), tools=[WEATHER])).json()
    assert answer["content"] == [{"type": "text", "text": " Hello you"}]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (None, ["weather", "clock", "no_tool"]),
        ({"type": "auto", "disable_parallel_tool_use": True}, ["weather", "clock", "no_tool"]),
        ({"type": "any"}, ["weather", "clock"]),
        ({"type": "tool", "name": "clock"}, ["clock"]),
    ],
)
async def test_the_choice_of_a_tool(choice: Any, names: list[str]) -> None:
    engine = saying('{"name": "clock", "parameters": {}}')
    answer = await ask(engine, tools=[WEATHER, CLOCK], tool_choice=choice)
    assert answer.json()["content"][0]["name"] == "clock"
    grammar = grammar_of(engine.requests[0])
    assert isinstance(grammar, ScriptedGrammar)
    assert isinstance(grammar.source, tuple)
    assert [name for name, _ in grammar.source] == names


async def test_no_tool_is_offered_if_none_may_be_called() -> None:
    engine = saying()
    await ask(engine, tools=[WEATHER], tool_choice={"type": "none"})
    assert engine.requests[0].grammar is None


async def test_a_format_of_the_output_is_a_grammar() -> None:
    engine = saying("{}")
    config = {"effort": "low", "format": {"type": "json_schema", "schema": CITY}}
    assert (await ask(engine, output_config=config)).status_code == 200
    assert grammar_of(engine.requests[0]) == ScriptedGrammar("json", CITY)


@pytest.mark.parametrize(
    "ignored",
    [
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"thinking": {"type": "disabled"}},
        {"metadata": {"user_id": "u"}, "service_tier": "auto"},
        {"cache_control": {"type": "ephemeral"}, "context_management": {"edits": []}},
        {"output_config": {"effort": "high"}, "mcp_servers": []},
        {"tool_choice": None, "tools": None, "system": None, "output_config": None},
    ],
)
async def test_what_changes_nothing_is_accepted(ignored: Any) -> None:
    answer = (await ask(**ignored)).json()
    assert answer["content"] == [{"type": "text", "text": " Hello you"}]


async def test_the_version_and_the_beta_headers_are_ignored() -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "some-beta-2026-01-01"}
    async with client(saying()) as http:
        answer = await http.post(f"{PATH}?beta=true", json=ASKED, headers=headers)
    assert answer.status_code == 200


async def test_tokens_are_counted_as_the_answer_counts_them() -> None:
    body = {"model": "m", "messages": [USER], "system": "Be very brief."}
    async with client(saying()) as http:
        counted = await http.post(f"{PATH}/count_tokens", json=body)
        answer = await http.post(PATH, json=body | {"max_tokens": 1})
    assert counted.json() == {"input_tokens": answer.json()["usage"]["input_tokens"]}
    assert counted.json()["input_tokens"] > 3


async def test_tools_count_as_tokens() -> None:
    body = {"model": "m", "messages": [USER]}
    async with client(saying()) as http:
        without = (await http.post(f"{PATH}/count_tokens", json=body)).json()
        with_tools = (
            await http.post(f"{PATH}/count_tokens", json=body | {"tools": [WEATHER]})
        ).json()
    assert with_tools["input_tokens"] > without["input_tokens"]


async def test_a_prompt_that_is_too_long_to_answer_is_counted() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a " * 5000}]}
    async with client(saying()) as http:
        counted = (await http.post(f"{PATH}/count_tokens", json=body)).json()
    assert counted["input_tokens"] > 5000
