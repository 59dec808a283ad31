"""Streams of /v1/chat/completions: every chunk to the byte, usage, errors, [DONE]."""

import time
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from engine.core.request import (
    Event,
    Failed,
    FinishReason,
    Request,
    TokenOutput,
)
from tests.api.client import Connection, client, make_app
from tests.api.scripted import ScriptedEngine, finished, output, token

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Say hello"}], "stream": True}
HEAD = (
    b'data: {"object":"chat.completion.chunk","id":"","created":1700000000,"model":"org/model",'
    b'"system_fingerprint":"3.3.6-dev0-native","choices":'
)
DONE = b"data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1700000000.5)


def chunk(
    content: bytes, reason: bytes = b"null", logprobs: bytes = b"null", usage: bytes = b"null"
) -> bytes:
    return (
        HEAD + b'[{"index":0,"delta":{"role":"assistant","content":"' + content + b'"},"logprobs":'
        b"" + logprobs + b',"finish_reason":' + reason + b'}],"usage":' + usage + b"}\n\n"
    )


def usage(prompt: int, completion: int) -> bytes:
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
        prompt,
        completion,
        prompt + completion,
    )


async def ask(engine: ScriptedEngine | None = None, **body: Any) -> httpx2.Response:
    async with client(engine or ScriptedEngine()) as http:
        return await http.post(PATH, json=ASKED | body)


async def test_each_token_is_a_chunk_and_the_last_has_the_reason() -> None:
    answer = await ask()
    assert answer.content == chunk(b" Hello") + chunk(b" you", b'"length"') + DONE


async def test_a_stream_has_tgis_headers() -> None:
    assert dict((await ask()).headers) == {
        "content-type": "text/event-stream",
        "cache-control": "no-cache",
        "x-compute-type": "1-nvidia-h200",
        "x-compute-characters": "15",
        "x-accel-buffering": "no",
        "vary": "origin, access-control-request-method, access-control-request-headers",
        "access-control-allow-origin": "*",
    }


async def test_usage_comes_in_a_chunk_of_its_own() -> None:
    answer = await ask(stream_options={"include_usage": True})
    last = HEAD + b'[],"usage":' + usage(3, 2) + b"}\n\n"
    assert answer.content == chunk(b" Hello") + chunk(b" you", b'"length"') + last + DONE


async def test_every_chunk_has_the_usage_so_far_if_asked_for() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await ask(stream_options=options)
    assert answer.content == (
        chunk(b" Hello", usage=usage(3, 1))
        + chunk(b" you", b'"length"', usage=usage(3, 2))
        + (HEAD + b'[],"usage":' + usage(3, 2) + b"}\n\n")
        + DONE
    )


@pytest.mark.parametrize("options", [None, {}, {"include_usage": None}, {"include_usage": False}])
async def test_a_stream_has_no_usage_unless_asked_for(options: object) -> None:
    answer = await ask(stream_options=options)
    assert answer.content == chunk(b" Hello") + chunk(b" you", b'"length"') + DONE


async def test_special_tokens_have_logprobs_but_no_text() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        top = (token(3, "b", -0.25),)
        eos = TokenOutput(token(2, "</s>", -0.5, special=True))
        return [[output("a", -0.5, top)], [eos, finished("a", 2, FinishReason.EOS_TOKEN)]]

    answer = await ask(ScriptedEngine(script), logprobs=True, top_logprobs=1)
    first = (
        b'{"content":[{"token":"a","logprob":-0.5,"top_logprobs":[{"token":"b","logprob":-0.25}]}]}'
    )
    second = b'{"content":[{"token":"</s>","logprob":-0.5,"top_logprobs":[]}]}'
    assert answer.content == chunk(b"a", logprobs=first) + chunk(b"", b'"stop"', second) + DONE


async def test_chunks_repeat_the_model_of_the_request() -> None:
    answer = await ask(model='"mine"')
    assert answer.content.count(b'"model":"\\"mine\\""') == 2


async def test_tokens_that_are_pending_together_are_sent_together() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        return [[output("a"), output("b")], [output("c"), finished("abc", 3)]]

    connection = Connection(make_app(ScriptedEngine(script)), PATH, ASKED)
    await connection.finished()
    sizes = [message["body"].count(b"data: ") for message in connection.sent[1:]]
    assert sizes == [2, 1, 1, 0]


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "Input validation error: `temperature` must be strictly positive"),
    ({"max_tokens": 0}, "Input validation error: `max_new_tokens` must be strictly positive"),
]


@pytest.mark.parametrize(("body", "text"), ERRORS)
async def test_a_validation_error_is_an_event(body: dict[str, Any], text: str) -> None:
    answer = await ask(**body)
    assert answer.status_code == 200
    assert answer.text == (
        f'data: {{"error":{{"message":"{text}","http_status_code":422}}}}\n\ndata: [DONE]\n\n'
    )


async def test_overload_is_an_event_with_status_422() -> None:
    answer = await ask(ScriptedEngine(permits=0))
    assert answer.status_code == 200
    assert answer.content == (
        b'data: {"error":{"message":"Model is overloaded","http_status_code":422}}\n\n' + DONE
    )


async def test_a_failure_follows_the_tokens_before_it() -> None:
    answer = await ask(ScriptedEngine(lambda _: [[output("a"), Failed("out of luck")]]))
    assert answer.content == chunk(b"a") + (
        b'data: {"error":{"message":"Request failed during generation: out of luck",'
        b'"http_status_code":422}}\n\n' + DONE
    )


async def test_a_stream_without_its_end_reports_an_error() -> None:
    answer = await ask(ScriptedEngine(lambda _: [[output("a")]]))
    assert answer.content == chunk(b"a") + (
        b'data: {"error":{"message":"Incomplete generation stream","http_status_code":422}}\n\n'
        + DONE
    )
