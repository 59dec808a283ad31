"""Anthropic's Messages as streams of typed events."""

import json
from typing import Any

import pydantic_core
import pytest

from engine.core.request import Failed, FinishReason
from tests.api.client import Connection, client, make_app, until
from tests.api.saying import CALL, NO_TOOL, saying, typed_events
from tests.api.scripted import HOLD, ScriptedEngine, output

pytestmark = pytest.mark.anyio

PATH = "/v1/messages"
TOOL = {"name": "weather", "input_schema": {"type": "object"}}
ASKED = {
    "model": "m",
    "max_tokens": 10,
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
}


async def events_of(engine: ScriptedEngine | None = None, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, whose names are checked."""
    async with client(engine or saying()) as http:
        return typed_events(await http.post(PATH, json=ASKED | body))


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that the events add up to, as Anthropic's client adds them."""
    message: dict[str, Any] = {}
    inputs = ""
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                message["content"].append(event["content_block"])
            case "content_block_delta" if event["delta"]["type"] == "text_delta":
                message["content"][event["index"]]["text"] += event["delta"]["text"]
            case "content_block_delta":
                inputs += event["delta"]["partial_json"]
                parsed = pydantic_core.from_json(inputs, allow_partial=True)
                message["content"][event["index"]]["input"] = parsed
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    return message | {"id": "", "content": content}


async def test_the_events_of_a_text() -> None:
    events = await events_of()
    assert types(events) == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, block, _, first, second, stop, delta, _ = events
    message = start["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    assert (message["usage"]["input_tokens"], message["usage"]["output_tokens"]) == (2, 0)
    assert block["content_block"] == {"type": "text", "text": ""}
    assert [first["delta"], second["delta"]] == [
        {"type": "text_delta", "text": " Hello"},
        {"type": "text_delta", "text": " you"},
    ]
    assert [event["index"] for event in (block, first, second, stop)] == [0] * 4
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == 3


async def test_the_events_of_a_call() -> None:
    events = await events_of(saying(*CALL), tools=[TOOL])
    block = events[1]["content_block"]
    assert block == {"type": "tool_use", "id": block["id"], "name": "weather", "input": {}}
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert {delta["type"] for delta in deltas} == {"input_json_delta"}
    assert json.loads("".join(delta["partial_json"] for delta in deltas)) == {"city": "Oslo"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("engine", "body"),
    [
        (saying, {}),
        (lambda: saying(reason=FinishReason.LENGTH), {"max_tokens": 2}),
        (lambda: saying(*CALL), {"tools": [TOOL]}),
        (lambda: saying(*NO_TOOL), {"tools": [TOOL]}),
        *(
            (
                lambda n=n: saying(*CALL[:n], reason=FinishReason.LENGTH),
                {"tools": [TOOL], "max_tokens": n},
            )
            for n in range(1, len(CALL))
        ),
    ],
)
async def test_the_events_add_up_to_the_unstreamed_message(engine: Any, body: Any) -> None:
    streamed = joined(await events_of(engine(), **body))
    async with client(engine()) as http:
        plain = (await http.post(PATH, json=ASKED | body | {"stream": False})).json()
    assert without_ids(streamed) == without_ids(plain)


async def test_an_answer_without_text_has_no_block() -> None:
    events = await events_of(saying(*CALL[:1], reason=FinishReason.LENGTH), tools=[TOOL])
    assert types(events) == ["message_start", "message_delta", "message_stop"]


async def test_a_failure_is_the_last_event() -> None:
    events = await events_of(ScriptedEngine(lambda _: [[output("a"), Failed("out of luck")]]))
    assert types(events)[-2:] == ["content_block_delta", "error"]
    assert events[-1]["error"]["type"] == "api_error"
    assert "out of luck" in events[-1]["error"]["message"]
    assert events[-1]["request_id"].startswith("req_")


async def test_the_stream_begins_before_the_first_token() -> None:
    engine = ScriptedEngine(lambda _: [HOLD])
    connection = Connection(make_app(engine), PATH, ASKED)
    await until(lambda: engine.holding.is_set())
    assert b"message_start" in connection.body()
    await connection.go_away()
    assert engine.num_aborts == 1
