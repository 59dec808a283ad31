"""Every event is one line, however a client tells lines, and its JSON is what was generated."""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.utils._http import default_async_client_factory

from engine.core.request import Event, Failed, Request
from tests.api.client import client, make_app
from tests.api.scripted import ScriptedEngine, finished, output, token

pytestmark = pytest.mark.anyio

BREAKS = [c for c in map(chr, range(sys.maxunicode + 1)) if len(f"a{c}b".splitlines()) == 2]
"""The characters at which `str.splitlines` ends a line."""
TEXT = "".join(f"é{char}🙂" for char in BREAKS) + "\x84\x86\u2027\u202a\\u2028\r\n"
ESCAPED = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "stream": True}
ROUTES: dict[str, dict[str, Any]] = {
    "/generate_stream": {"inputs": TEXT, "parameters": {"return_full_text": True}},
    "/": {"inputs": TEXT, "stream": True},
    "/invocations": {"inputs": TEXT, "stream": True},
    "/v1/chat/completions": CHAT | {"model": TEXT, "logprobs": True, "top_logprobs": 1},
    "/v1/completions": {"prompt": [TEXT, TEXT], "stream": True},
}
TYPED_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"model": TEXT, "input": TEXT, "top_logprobs": 1, "stream": True},
    "/v1/messages": CHAT | {"model": TEXT, "max_tokens": 9},
}
"""The routes whose events are named."""


def broken(_: Request) -> Sequence[list[Event]]:
    """Generate the text with each of its characters, and once more in one token."""
    tokens: list[Event] = [output(char, -0.5, (token(3, TEXT),)) for char in TEXT]
    return [tokens, [output(TEXT), finished(TEXT + TEXT, len(TEXT) + 1)]]


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


@pytest.mark.parametrize("path", ROUTES)
async def test_an_event_is_one_line_however_lines_are_told(path: str) -> None:
    async with (
        client(ScriptedEngine(broken)) as http,
        http.stream("POST", path, json=ROUTES[path]) as answer,
    ):
        lines = [line async for line in answer.aiter_lines()]
    assert set(lines[1::2]) == {""}
    assert all(line.startswith("data: ") for line in lines[::2])
    events = [json.loads(line[6:]) for line in lines[::2] if line != "data: [DONE]"]
    shown = [text for event in events for text in strings(event)]
    assert TEXT in shown
    assert set(TEXT) <= set(shown)


@pytest.mark.parametrize("path", ROUTES)
async def test_an_error_is_one_line_too(path: str) -> None:
    engine = ScriptedEngine(lambda _: [[Failed(TEXT)]])
    async with client(engine) as http:
        answer = await http.post(path, json=ROUTES[path])
    assert all(line.startswith("data: ") for line in answer.text.splitlines() if line)
    assert any(
        text.endswith(TEXT)
        for line in answer.text.splitlines()
        if line.startswith("data: {")
        for text in strings(json.loads(line[6:]))
    )


@pytest.mark.parametrize("path", TYPED_ROUTES)
@pytest.mark.parametrize("script", [broken, lambda _: [[Failed(TEXT)]]], ids=["text", "error"])
async def test_a_named_event_is_two_lines_however_lines_are_told(path: str, script: Any) -> None:
    async with client(ScriptedEngine(script)) as http:
        answer = await http.post(path, json=TYPED_ROUTES[path])
    lines = answer.text.splitlines()
    assert set(lines[2::3]) == {""}
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::3]]
    assert lines[::3] == [f"event: {event['type']}" for event in events]
    assert any(text.endswith(TEXT) for event in events for text in strings(event))


async def test_no_other_character_is_escaped_differently() -> None:
    async with client(ScriptedEngine(broken)) as http:
        answer = await http.post("/generate_stream", json={"inputs": "x"})
    expected = json.dumps(TEXT, ensure_ascii=False)
    for char, escape in ESCAPED.items():
        expected = expected.replace(char, escape)
    assert expected.encode() in answer.content
    assert not any(char in answer.text for char in ESCAPED)


async def test_an_answer_that_is_no_stream_keeps_its_bytes() -> None:
    async with client(ScriptedEngine(broken)) as http:
        answer = await http.post("/generate", json={"inputs": "x"})
    assert "\u2028" in answer.text
    assert answer.json()["generated_text"] == TEXT + TEXT


@pytest.fixture
def hub_client() -> Iterator[AsyncInferenceClient]:
    """The hub's own client, which reads lines by httpx, connected to the application."""
    transport = httpx2.ASGITransport(make_app(ScriptedEngine(broken)))
    huggingface_hub.set_async_client_factory(lambda: httpx2.AsyncClient(transport=transport))
    yield AsyncInferenceClient("http://skiff")
    huggingface_hub.set_async_client_factory(default_async_client_factory)


async def test_huggingface_hub_reads_a_stream_with_line_breaks(
    hub_client: AsyncInferenceClient,
) -> None:
    texts = [text async for text in await hub_client.text_generation("x", stream=True)]
    assert "".join(texts) == TEXT + TEXT
    chat = await hub_client.chat_completion([{"role": "user", "content": "x"}], stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in chat]) == TEXT + TEXT
