"""TGI's streams: the bytes of every event, headers, errors after 200, keep-alive comments."""

from collections.abc import Sequence

import pytest

from api.http.sse import EventStream
from engine.core.request import Event, Failed, Request
from tests.api.client import Connection, client, make_app, until
from tests.api.scripted import HOLD, ScriptedEngine, finished, output, token

pytestmark = pytest.mark.anyio

FIRST = (
    b'data: {"index":1,"token":{"id":6,"text":" Hello","logprob":-0.5,"special":false},'
    b'"generated_text":null,"details":null}\n\n'
)
LAST = (
    b'data: {"index":2,"token":{"id":4,"text":" you","logprob":-2.5839844,"special":false},'
    b'"generated_text":" Hello you","details":null}\n\n'
)


@pytest.mark.parametrize(("path", "more"), [("/generate_stream", {}), ("/", {"stream": True})])
async def test_each_token_is_an_event_and_the_last_has_the_text(
    path: str, more: dict[str, object]
) -> None:
    async with client(ScriptedEngine()) as http:
        body = {"inputs": "x", "parameters": {"return_full_text": False}} | more
        answer = await http.post(path, json=body)
    assert answer.content == FIRST + LAST


async def test_a_stream_has_tgis_headers() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/generate_stream", json={"inputs": "x y"})
    assert dict(answer.headers) == {
        "content-type": "text/event-stream",
        "cache-control": "no-cache",
        "x-compute-type": "1-nvidia-h200",
        "x-compute-characters": "3",
        "x-accel-buffering": "no",
        "vary": "origin, access-control-request-method, access-control-request-headers",
        "access-control-allow-origin": "*",
    }


async def test_details_come_with_the_last_event() -> None:
    async with client(ScriptedEngine()) as http:
        body = {"inputs": "x y", "parameters": {"details": True, "return_full_text": True}}
        answer = await http.post("/generate_stream", json=body)
    assert answer.content == FIRST + LAST.replace(
        b'" Hello you","details":null',
        b'"x y Hello you","details":{"finish_reason":"length","generated_tokens":2,'
        b'"seed":null,"input_length":3}',
    )


async def test_top_tokens_are_a_flat_list_in_each_event() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        return [[output("a", -0.5, (token(3, "b", -0.25),)), finished("a", 1)]]

    async with client(ScriptedEngine(script)) as http:
        body = {"inputs": "x", "parameters": {"top_n_tokens": 1}}
        answer = await http.post("/generate_stream", json=body)
    assert answer.content == (
        b'data: {"index":1,"token":{"id":1,"text":"a","logprob":-0.5,"special":false},'
        b'"top_tokens":[{"id":3,"text":"b","logprob":-0.25,"special":false}],'
        b'"generated_text":"a","details":null}\n\n'
    )


async def test_newlines_and_emoji_stay_inside_their_event() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        return [[output("\n\n🙂\r"), finished("\n\n🙂\r", 1)]]

    async with client(ScriptedEngine(script)) as http:
        answer = await http.post("/generate_stream", json={"inputs": "x"})
    assert answer.content.count(b"\n") == 2
    assert '"text":"\\n\\n🙂\\r"'.encode() in answer.content


async def test_tokens_that_are_pending_together_are_sent_together() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        return [[output("a"), output("b")], [output("c"), finished("abc", 3)]]

    connection = Connection(make_app(ScriptedEngine(script)), "/generate_stream", {"inputs": "x"})
    await connection.finished()
    sizes = [message["body"].count(b"data: ") for message in connection.sent[1:]]
    assert sizes == [2, 1, 0]


async def test_a_silent_stream_sends_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventStream, "keep_alive_s", 0.01)
    engine = ScriptedEngine(lambda _: [[output("a")], HOLD])
    connection = Connection(make_app(engine), "/generate_stream", {"inputs": "x"})
    await until(lambda: connection.body().count(b":\n\n") >= 2)
    await connection.go_away()
    event, first, second, *_ = connection.body().split(b"\n\n")
    assert event.startswith(b"data: {")
    assert first == second == b":"


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 2}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
        (
            {"best_of": 2, "decoder_input_details": True},
            "`best_of` != 1 is not supported when streaming tokens",
        ),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
        ({"temperature": 0}, "`temperature` must be strictly positive"),
    ],
)
async def test_a_validation_error_is_the_only_event(
    parameters: dict[str, object], text: str
) -> None:
    async with client(ScriptedEngine()) as http:
        body = {"inputs": "x", "parameters": parameters}
        answer = await http.post("/generate_stream", json=body)
    assert answer.status_code == 200
    assert answer.text == (
        f'data: {{"error":"Input validation error: {text}","error_type":"validation"}}\n\n'
    )


async def test_a_request_with_best_of_one_is_streamed() -> None:
    async with client(ScriptedEngine()) as http:
        body = {"inputs": "x", "parameters": {"best_of": 1}}
        answer = await http.post("/generate_stream", json=body)
    assert answer.content == FIRST + LAST


async def test_overload_is_the_only_event() -> None:
    async with client(ScriptedEngine(permits=0)) as http:
        answer = await http.post("/generate_stream", json={"inputs": ""})
    assert answer.status_code == 200
    assert answer.content == (
        b'data: {"error":"Model is overloaded","error_type":"overloaded"}\n\n'
    )


@pytest.mark.parametrize("together", [True, False])
async def test_a_failure_follows_the_tokens_before_it(together: bool) -> None:
    steps: list[list[Event]] = [[output(" Hello")], [Failed("out of luck")]]
    if together:
        steps = [steps[0] + steps[1]]
    async with client(ScriptedEngine(lambda _: steps)) as http:
        answer = await http.post("/generate_stream", json={"inputs": "x"})
    assert answer.content == FIRST + (
        b'data: {"error":"Request failed during generation: out of luck",'
        b'"error_type":"generation"}\n\n'
    )


async def test_a_dead_engine_is_reported_as_an_event() -> None:
    engine = ScriptedEngine()
    engine.state, engine.reason = "dead", "the device is gone"
    async with client(engine) as http:
        answer = await http.post("/generate_stream", json={"inputs": "x"})
    assert answer.content == (
        b'data: {"error":"Request failed during generation: the device is gone",'
        b'"error_type":"generation"}\n\n'
    )


async def test_a_stream_without_its_end_reports_an_error() -> None:
    async with client(ScriptedEngine(lambda _: [[output(" Hello")]])) as http:
        answer = await http.post("/generate_stream", json={"inputs": "x"})
    assert answer.content == FIRST + (
        b'data: {"error":"Incomplete generation stream",'
        b'"error_type":"incomplete_generation_stream"}\n\n'
    )
