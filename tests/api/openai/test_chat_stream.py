"""Streams of /v1/chat/completions: every chunk to the byte, usage, errors, [DONE]."""

import re
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
from tests.api.client import Connection, client, make_app, until
from tests.api.scripted import HOLD, ScriptedEngine, finished, output, token

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Say hello"}], "stream": True}
HEAD = (
    b'data: {"object":"chat.completion.chunk","id":"","created":1700000000,"model":"org/model",'
    b'"system_fingerprint":"3.3.6-dev0-native","choices":'
)
ID = re.compile(rb'"id":"(chatcmpl-[0-9a-f]{32})"')
DONE = b"data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1700000000.5)


def chunk(delta: bytes, reason: bytes = b"null", logprobs: bytes = b"null") -> bytes:
    return (
        HEAD + b'[{"index":0,"delta":{' + delta + b'},"logprobs":' + logprobs + b',"finish_reason":'
        b"" + reason + b"}]}\n\n"
    )


def with_usage(chunk: bytes, usage: bytes = b"null") -> bytes:
    return chunk.removesuffix(b"}\n\n") + b',"usage":' + usage + b"}\n\n"


FIRST = chunk(b'"role":"assistant","content":" Hello"')
SECOND = chunk(b'"content":" you"')
LAST = chunk(b'"content":""', b'"length"')


def usage(prompt: int, completion: int) -> bytes:
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
        prompt,
        completion,
        prompt + completion,
    )


async def ask(engine: ScriptedEngine | None = None, **body: Any) -> httpx2.Response:
    async with client(engine or ScriptedEngine()) as http:
        return await http.post(PATH, json=ASKED | body)


def without_id(answer: httpx2.Response) -> bytes:
    """Return the content with an empty id, which must be the same in all chunks."""
    assert len(set(ID.findall(answer.content))) <= 1
    return ID.sub(b'"id":""', answer.content)


async def test_each_token_is_a_chunk_and_the_last_one_has_the_reason() -> None:
    assert without_id(await ask()) == FIRST + SECOND + LAST + DONE


async def test_ids_of_streams_are_unique() -> None:
    ids = {id for _ in range(3) for id in ID.findall((await ask()).content)}
    assert len(ids) == 3


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
    last = with_usage(HEAD + b"[]}\n\n", usage(3, 2))
    chunks = b"".join(with_usage(chunk) for chunk in (FIRST, SECOND, LAST))
    assert without_id(answer) == chunks + last + DONE


async def test_every_chunk_has_the_usage_so_far_if_asked_for() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert without_id(await ask(stream_options=options)) == (
        with_usage(FIRST, usage(3, 1))
        + with_usage(SECOND, usage(3, 2))
        + with_usage(LAST, usage(3, 2))
        + with_usage(HEAD + b"[]}\n\n", usage(3, 2))
        + DONE
    )


@pytest.mark.parametrize("options", [None, {}, {"include_usage": None}, {"include_usage": False}])
async def test_a_stream_has_no_usage_unless_asked_for(options: object) -> None:
    assert b"usage" not in (await ask(stream_options=options)).content


def ending_with_eos(_: Request) -> Sequence[list[Event]]:
    top = (token(3, "é", -0.25),)
    eos = TokenOutput(token(2, "</s>", -0.5, special=True))
    return [[output("a", -0.5, top)], [eos, finished("a", 2, FinishReason.EOS_TOKEN)]]


async def test_a_special_token_has_no_chunk() -> None:
    answer = await ask(ScriptedEngine(ending_with_eos))
    first, last = chunk(b'"role":"assistant","content":"a"'), chunk(b'"content":""', b'"stop"')
    assert without_id(answer) == first + last + DONE


async def test_special_tokens_have_logprobs_but_no_text() -> None:
    answer = await ask(ScriptedEngine(ending_with_eos), logprobs=True, top_logprobs=1)
    first = (
        b'{"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":'
        b'[{"token":"\xc3\xa9","logprob":-0.25,"bytes":[195,169]}]}],"refusal":null}'
    )
    second = (
        b'{"content":[{"token":"</s>","logprob":-0.5,"bytes":[60,47,115,62],"top_logprobs":[]}],'
        b'"refusal":null}'
    )
    assert without_id(answer) == (
        chunk(b'"role":"assistant","content":"a"', logprobs=first)
        + chunk(b'"content":""', logprobs=second)
        + chunk(b'"content":""', b'"stop"')
        + DONE
    )


async def test_chunks_repeat_the_model_of_the_request() -> None:
    answer = await ask(model='"mine"')
    assert answer.content.count(b'"model":"\\"mine\\""') == 3


async def test_tokens_that_are_pending_together_are_sent_together() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        return [[output("a"), output("b")], [output("c"), finished("abc", 3)]]

    connection = Connection(make_app(ScriptedEngine(script)), PATH, ASKED)
    await connection.finished()
    sizes = [message["body"].count(b"data: ") for message in connection.sent[1:]]
    assert sizes == [2, 2, 1, 0]


@pytest.mark.parametrize("body", [{"temperature": -1}, {"max_tokens": 0}, {"n": 0}])
async def test_a_refused_stream_is_told_by_its_status(body: dict[str, Any]) -> None:
    answer = await ask(**body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(body))


@pytest.mark.parametrize("tools", [[], [{"function": {"name": "f"}}]])
async def test_a_full_server_tells_so_by_its_status(tools: list[Any]) -> None:
    assert (await ask(ScriptedEngine(permits=0), tools=tools)).status_code == 429


async def test_a_failure_follows_the_tokens_before_it() -> None:
    answer = await ask(ScriptedEngine(lambda _: [[output("a"), Failed("out of luck")]]))
    assert without_id(answer) == chunk(b'"role":"assistant","content":"a"') + (
        b'data: {"error":{"message":"Request failed during generation: out of luck",'
        b'"type":"server_error","param":null,"code":null}}\n\n' + DONE
    )


async def test_a_stream_without_its_end_reports_an_error() -> None:
    answer = await ask(ScriptedEngine(lambda _: [[output("a")]]))
    assert without_id(answer) == chunk(b'"role":"assistant","content":"a"') + (
        b'data: {"error":{"message":"Incomplete generation stream",'
        b'"type":"server_error","param":null,"code":null}}\n\n' + DONE
    )


async def test_a_client_that_leaves_before_the_first_token_ends_the_generation() -> None:
    engine = ScriptedEngine(lambda _: [HOLD])
    connection = Connection(make_app(engine), PATH, ASKED)
    await until(lambda: engine.holding.is_set())
    await connection.go_away()
    assert engine.num_aborts == 1
