"""OpenAI's Responses as streams of typed events."""

from typing import Any

import pytest

from engine.core.request import Failed, FinishReason
from tests.api.client import Connection, client, make_app, until
from tests.api.saying import CALL, NO_TOOL, saying, typed_events
from tests.api.scripted import HOLD, ScriptedEngine, output

pytestmark = pytest.mark.anyio

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
ASKED = {"model": "m", "input": "Hi", "stream": True}


async def events_of(engine: ScriptedEngine | None = None, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, whose names and numbers are checked."""
    async with client(engine or saying()) as http:
        events = typed_events(await http.post(PATH, json=ASKED | body))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


async def unstreamed(engine: ScriptedEngine, **body: Any) -> Any:
    async with client(engine) as http:
        return (await http.post(PATH, json=ASKED | body | {"stream": False})).json()


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    items = [
        {key: value for key, value in item.items() if key not in ("id", "call_id")}
        for item in response["output"]
    ]
    kept = {key: v for key, v in response.items() if key not in ("id", "created_at")}
    return kept | {"output": items}


async def test_the_events_of_a_text() -> None:
    events = await events_of()
    assert types(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    created, _, added, part, first, second, done, part_done, item_done, completed = events
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    assert created["response"]["usage"] is None
    id = added["item"]["id"]
    assert added["item"] == {
        "type": "message",
        "id": id,
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }
    place = {"item_id": id, "output_index": 0, "content_index": 0}
    for event in (part, first, second, done, part_done):
        assert event | place == event
    assert [first["delta"], second["delta"]] == [" Hello", " you"]
    assert part["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert done["text"] == part_done["part"]["text"] == " Hello you"
    assert completed["response"]["output"] == [item_done["item"]]
    assert completed["response"]["id"] == created["response"]["id"]


async def test_the_events_of_a_call() -> None:
    events = await events_of(saying(*CALL), tools=[TOOL])
    deltas = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == '{"city": "Oslo"}'
    assert types(events) == [
        "created",
        "in_progress",
        "output_item.added",
        *["function_call_arguments.delta"] * len(deltas),
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    added, done, item_done, completed = events[2], *events[-3:]
    assert (added["item"]["name"], added["item"]["arguments"]) == ("weather", "")
    assert added["item"]["status"] == "in_progress"
    assert done["arguments"] == '{"city": "Oslo"}'
    assert done["item_id"] == added["item"]["id"] == item_done["item"]["id"]
    assert item_done["item"]["call_id"] == added["item"]["call_id"]
    assert completed["response"]["output"] == [item_done["item"]]


@pytest.mark.parametrize(
    ("engine", "body"),
    [
        (saying, {}),
        (saying, {"top_logprobs": 1}),
        (lambda: saying(reason=FinishReason.LENGTH), {"max_output_tokens": 2}),
        (lambda: saying(*CALL), {"tools": [TOOL]}),
        (lambda: saying(*NO_TOOL), {"tools": [TOOL]}),
        (lambda: saying(*CALL[:6], reason=FinishReason.LENGTH), {"tools": [TOOL]}),
        (lambda: saying(*CALL[:1], reason=FinishReason.LENGTH), {"tools": [TOOL]}),
    ],
)
async def test_the_last_event_has_the_response_of_an_unstreamed_one(engine: Any, body: Any) -> None:
    last = (await events_of(engine(), **body))[-1]
    plain = await unstreamed(engine(), **body)
    assert without_ids(last["response"]) == without_ids(plain)
    assert last["type"] == f"response.{plain['status']}"


async def test_an_answer_without_text_has_an_empty_message() -> None:
    events = await events_of(saying(*CALL[:1], reason=FinishReason.LENGTH), tools=[TOOL])
    assert types(events)[2:4] == ["output_item.added", "content_part.added"]
    assert types(events)[-1] == "incomplete"
    assert "output_text.delta" not in types(events)


async def test_every_delta_has_its_logprobs() -> None:
    events = await events_of(include=["message.output_text.logprobs"])
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    tokens = [entry["token"] for delta in deltas for entry in delta["logprobs"]]
    assert tokens == [" Hello", " you", "</s>"]
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert [entry["token"] for entry in done["logprobs"]] == tokens


async def test_a_failure_is_the_last_event_and_keeps_the_text_before_it() -> None:
    events = await events_of(ScriptedEngine(lambda _: [[output("a"), Failed("out of luck")]]))
    assert types(events)[-1] == "failed"
    response = events[-1]["response"]
    assert response["status"] == "failed"
    assert response["error"]["code"] == "server_error"
    assert "out of luck" in response["error"]["message"]
    assert response["output"][0]["content"][0]["text"] == "a"
    assert response["output"][0]["status"] == "incomplete"


async def test_a_failure_before_the_first_token_has_no_output() -> None:
    events = await events_of(ScriptedEngine(lambda _: [[Failed("out of luck")]]))
    assert types(events) == ["created", "in_progress", "failed"]
    assert events[-1]["response"]["output"] == []


async def test_a_full_server_tells_so_by_its_status() -> None:
    async with client(ScriptedEngine(permits=0)) as http:
        assert (await http.post(PATH, json=ASKED)).status_code == 429


async def test_the_stream_begins_before_the_first_token() -> None:
    engine = ScriptedEngine(lambda _: [HOLD])
    connection = Connection(make_app(engine), PATH, ASKED)
    await until(lambda: engine.holding.is_set())
    assert b"response.in_progress" in connection.body()
    await connection.go_away()
    assert engine.num_aborts == 1
