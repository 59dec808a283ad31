"""Errors of the Messages API in Anthropic's shape."""

from typing import Any

import httpx2
import pytest

from engine.core.errors import TemplateError
from engine.core.request import Failed
from tests.api.client import client
from tests.api.saying import saying
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio

PATH = "/v1/messages"
USER = {"role": "user", "content": "Hi"}
ASKED = {"model": "m", "max_tokens": 10, "messages": [USER]}
CLOCK = {"name": "clock", "input_schema": {"type": "object"}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}


def error_of(answer: httpx2.Response) -> tuple[int, str, str]:
    """Return the status, type and message of an error, whose shape is checked."""
    body = answer.json()
    assert list(body) == ["type", "error", "request_id"]
    assert body["type"] == "error"
    assert body["request_id"] == answer.headers["request-id"]
    assert list(body["error"]) == ["type", "message"]
    return answer.status_code, body["error"]["type"], body["error"]["message"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [USER, {"role": "user", "content": [IMAGE]}]}, "messages[1].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "`document`"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": "a " * 3000}]}, "messages"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"stop_sequences": list("abcdef")}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"output_config": {"format": {"type": "regex"}}}, "output_config.format"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
        ({"compaction": {"type": "manual"}}, "compaction"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_request_is_400_and_names_the_field(
    body: Any, named: str, stream: bool
) -> None:
    engine = saying()
    async with client(engine) as http:
        answer = await http.post(PATH, json=ASKED | {"stream": stream} | body)
    status, type, message = error_of(answer)
    assert (status, type) == (400, "invalid_request_error")
    assert named in message
    assert not engine.requests


@pytest.mark.parametrize(
    "thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}]
)
async def test_a_thread_is_refused_so_that_the_client_sends_the_whole_conversation(
    thread: Any,
) -> None:
    async with client(saying()) as http:
        answer = await http.post(PATH, json=ASKED | {"thread": thread})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["details"] == {"error_code": "thread_unsupported_request"}


async def test_the_model_must_be_named() -> None:
    async with client(saying()) as http:
        answer = await http.post(PATH, json={"max_tokens": 1, "messages": [USER]})
    assert error_of(answer)[:2] == (400, "invalid_request_error")
    assert "`model`" in answer.text


async def test_a_body_that_is_no_json_is_400() -> None:
    async with client(saying()) as http:
        answer = await http.post(PATH, content=b"{", headers={"content-type": "application/json"})
    assert error_of(answer)[:2] == (400, "invalid_request_error")


async def test_a_body_that_is_too_large_is_413() -> None:
    async with client(saying(), payload_limit=100) as http:
        answer = await http.post(PATH, json=ASKED | {"system": "x" * 200})
    assert error_of(answer)[:2] == (413, "request_too_large")


async def test_a_full_server_is_overloaded() -> None:
    async with client(ScriptedEngine(permits=0)) as http:
        for stream in (False, True):
            answer = await http.post(PATH, json=ASKED | {"stream": stream})
            assert error_of(answer)[:2] == (529, "overloaded_error")


async def test_a_generation_that_fails_is_500() -> None:
    async with client(ScriptedEngine(lambda _: [[Failed("out of luck")]])) as http:
        status, type, message = error_of(await http.post(PATH, json=ASKED))
    assert (status, type) == (500, "api_error")
    assert "out of luck" in message


async def test_messages_that_the_template_refuses_are_400() -> None:
    engine = saying()
    engine.tokenizer.template_error = TemplateError("roles must alternate")
    async with client(engine) as http:
        for path in (PATH, f"{PATH}/count_tokens"):
            status, type, message = error_of(await http.post(path, json=ASKED))
            assert (status, type) == (400, "invalid_request_error")
            assert message.startswith("messages: ")
            assert "roles must alternate" in message


@pytest.mark.parametrize(
    ("method", "path", "status", "type"),
    [
        ("GET", PATH, 405, "invalid_request_error"),
        ("POST", f"{PATH}/batches", 404, "not_found_error"),
        ("GET", f"{PATH}/count_tokens", 405, "invalid_request_error"),
    ],
)
async def test_other_routes_and_methods(method: str, path: str, status: int, type: str) -> None:
    async with client(saying()) as http:
        assert error_of(await http.request(method, path))[:2] == (status, type)


@pytest.mark.parametrize(
    "headers",
    [{}, {"x-api-key": "no"}, {"x-api-key": ""}, {"authorization": "Bearer no"}],
)
async def test_without_the_key_the_answer_is_an_authentication_error(headers: Any) -> None:
    engine = saying()
    async with client(engine, api_key="Sesame") as http:
        answer = await http.post(PATH, json=ASKED, headers=headers)
    assert error_of(answer)[:2] == (401, "authentication_error")
    assert not engine.requests


@pytest.mark.parametrize(
    "headers",
    [
        {"x-api-key": "Sesame"},
        {"authorization": "Bearer Sesame"},
        {"authorization": "Bearer unused", "x-api-key": "Sesame"},
    ],
)
async def test_the_key_comes_in_either_header(headers: Any) -> None:
    async with client(saying(), api_key="Sesame") as http:
        for path in (PATH, f"{PATH}/count_tokens"):
            assert (await http.post(path, json=ASKED, headers=headers)).status_code == 200
