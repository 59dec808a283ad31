"""/invocations answers like one of three other routes; /vertex takes several requests at once."""

import re
import time
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from engine.core.errors import TemplateError
from engine.core.request import Event, Failed, Request
from tests.api.client import Connection, client, make_app, until
from tests.api.scripted import HOLD, ScriptedEngine, finished, output

pytestmark = pytest.mark.anyio

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Say hello"}]}
SHAPE = "Failed to deserialize the JSON body into the target type: "


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1700000000.5)


async def post(path: str, body: object, engine: ScriptedEngine | None = None) -> httpx2.Response:
    async with client(engine or ScriptedEngine()) as http:
        return await http.post(path, json=body)


def without_id(content: bytes) -> bytes:
    return re.sub(rb"cmpl-[0-9a-f]{32}", b"cmpl-", content)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/", {"inputs": "Say hello", "parameters": {"details": True}}),
        ("/", {"inputs": "Say hello", **CHAT, "prompt": "x"}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"prompt": "x"}),
        ("/v1/completions", {"prompt": "Say hello"}),
    ],
)
@pytest.mark.slow
async def test_an_invocation_is_answered_as_the_route_of_its_body(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    body = body | {"stream": stream}
    there, here = await post(path, body), await post("/invocations", body)
    assert without_id(here.content) == without_id(there.content)
    assert {*here.headers} == {*there.headers}


@pytest.mark.parametrize(
    "body", [{"text": "x"}, {}, [], {"inputs": "x", "parameters": {"top_k": "a"}}]
)
async def test_an_invocation_of_unknown_shape_is_rejected(body: object) -> None:
    answer = await post("/invocations", body)
    assert answer.status_code == 422
    assert answer.text == f"{SHAPE}data did not match any variant of untagged enum SagemakerRequest"


def by_length(request: Request) -> Sequence[list[Event]]:
    text = f"{len(request.prompt_ids)} tokens"
    return [[output(text), finished(text, 1)]]


async def test_predictions_are_in_the_order_of_the_instances() -> None:
    engine = ScriptedEngine(by_length)
    instances = [{"inputs": "a b c"}, CHAT, {"inputs": "a", "parameters": None}]
    answer = await post("/vertex", {"instances": instances}, engine)
    assert answer.status_code == 200
    assert answer.content == b'{"predictions":["4 tokens","3 tokens","2 tokens"]}'
    assert not [name for name in answer.headers if name.startswith("x-")]


async def test_only_two_parameters_of_an_instance_are_used() -> None:
    engine = ScriptedEngine()
    parameters = {"max_new_tokens": 3, "seed": 7, "temperature": 0.5, "stop": ["a"], "top_k": -1}
    await post("/vertex", {"instances": [{"inputs": "x", "parameters": parameters}]}, engine)
    [request] = engine.requests
    assert request.stopping.max_new_tokens == 3
    assert request.stopping.stop == ()
    assert request.sampling.seed == 7
    assert request.sampling.do_sample
    assert request.sampling.temperature == 1.0


async def test_the_prediction_of_a_call_is_the_generated_text() -> None:
    text = '{"name": "clock", "parameters": {}}'
    engine = ScriptedEngine(lambda _: [[output(text), finished(text, 1)]])
    tools = [{"type": "function", "function": {"name": "clock"}}]
    answer = await post("/vertex", {"instances": [CHAT | {"tools": tools}]}, engine)
    assert answer.json() == {"predictions": [text]}


async def test_a_request_without_instances_is_refused() -> None:
    answer = await post("/vertex", {"instances": []})
    assert answer.status_code == 422
    assert answer.content == (
        b'{"error":"Input validation error","error_type":"Input validation error"}'
    )


INCOMPLETE = b'{"error":"Incomplete generation","error_type":"Incomplete generation"}'


@pytest.mark.parametrize(
    ("engine", "instance"),
    [
        (lambda: ScriptedEngine(), {"inputs": ""}),
        (lambda: ScriptedEngine(permits=1), {"inputs": "x"}),
        (lambda: ScriptedEngine(lambda _: [[Failed("bad luck")]]), {"inputs": "x"}),
        (lambda: ScriptedEngine(), CHAT | {"max_tokens": 0}),
    ],
)
async def test_the_request_fails_if_one_instance_fails(engine: Any, instance: object) -> None:
    answer = await post("/vertex", {"instances": [{"inputs": "y"}, instance]}, engine())
    assert answer.status_code == 500
    assert answer.content == INCOMPLETE


async def test_a_chat_that_cannot_be_translated_is_refused_as_on_its_own_route() -> None:
    engine = ScriptedEngine()
    engine.tokenizer.template_error = TemplateError("template not found")
    answer = await post("/vertex", {"instances": [CHAT]}, engine)
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "template_error"


async def test_an_instance_of_unknown_shape_is_rejected() -> None:
    answer = await post("/vertex", {"instances": [{"inputs": "x"}, {"text": "x"}]})
    assert answer.status_code == 422
    assert answer.text.startswith(
        f"{SHAPE}instances[1]: data did not match any variant of untagged enum VertexInstance at"
    )


@pytest.mark.parametrize(
    ("path", "body", "num_generations"),
    [
        ("/vertex", {"instances": [{"inputs": "x"}, CHAT]}, 2),
        ("/invocations", CHAT, 1),
        ("/invocations", CHAT | {"stream": True}, 1),
        ("/v1/completions", {"prompt": ["x", "y"]}, 2),
    ],
)
async def test_a_client_that_goes_away_ends_all_its_generations(
    path: str, body: object, num_generations: int
) -> None:
    engine = ScriptedEngine(lambda _: [HOLD])
    connection = Connection(make_app(engine), path, body)
    await until(lambda: engine.num_open == num_generations)
    await connection.go_away()
    assert engine.num_aborts == num_generations
