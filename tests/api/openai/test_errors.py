"""Errors have OpenAI's shape on OpenAI's routes, whatever goes wrong, and TGI's on all others."""

from typing import Any

import httpx2
import pytest

from engine.core.request import Failed
from tests.api.client import client, make_app
from tests.api.scripted import ScriptedEngine, output

pytestmark = pytest.mark.anyio

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
BODIES = {"/v1/completions": {"prompt": "x"}, "/v1/chat/completions": CHAT}
INVALID = "invalid_request_error"


def check(answer: httpx2.Response, status: int, kind: str, code: str | None = None) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert list(answer.json()) == ["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["type"], error["code"]) == (kind, code)
    assert error["message"]


@pytest.mark.parametrize("path", BODIES)
async def test_a_failed_generation_is_a_server_error(path: str) -> None:
    async with client(ScriptedEngine(lambda _: [[output("a"), Failed("bad luck")]])) as http:
        answer = await http.post(path, json=BODIES[path])
    check(answer, 500, "server_error")
    assert "bad luck" in answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_a_lost_engine_is_unavailable(path: str, stream: bool) -> None:
    engine = ScriptedEngine()
    engine.state, engine.reason = "dead", "the device is gone"
    async with client(engine) as http:
        answer = await http.post(path, json=BODIES[path] | {"stream": stream})
    check(answer, 503, "server_error")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_a_full_server_is_a_rate_limit_before_a_stream_begins(
    path: str, stream: bool
) -> None:
    async with client(ScriptedEngine(permits=0)) as http:
        answer = await http.post(path, json=BODIES[path] | {"stream": stream})
    check(answer, 429, "rate_limit_error", "rate_limit_exceeded")


@pytest.mark.parametrize("path", BODIES)
async def test_a_body_that_cannot_be_read_is_refused(path: str) -> None:
    json = {"content-type": "application/json"}
    async with client(ScriptedEngine()) as http:
        check(await http.post(path, content=b"{", headers=json), 400, INVALID)
        check(await http.post(path, content=b'{"n":NaN}', headers=json), 400, INVALID)
        check(await http.post(path, content=b"[]", headers=json), 400, INVALID)
        check(await http.post(path, content=b"{}"), 415, INVALID)
        large = b'{"prompt":"' + b"x" * 2_000_000
        check(await http.post(path, content=large, headers=json), 413, INVALID)


async def test_unknown_routes_and_methods_are_told_in_openais_shape() -> None:
    async with client(ScriptedEngine()) as http:
        check(await http.post("/v1/embeddings", json={}), 404, INVALID)
        wrong = await http.get("/v1/completions")
        check(wrong, 405, INVALID)
        assert wrong.headers["allow"] == "POST"
        check(await http.post("/v1/models", json={}), 405, INVALID)


async def test_a_missing_key_is_told_in_the_shape_of_the_route() -> None:
    async with client(ScriptedEngine(), api_key="sesame") as http:
        for path, body in BODIES.items():
            check(await http.post(path, json=body), 401, INVALID, "invalid_api_key")
        plain = await http.post("/generate", json={"inputs": "x"})
    assert (plain.status_code, plain.content) == (401, b"")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_a_bug_is_an_internal_error_that_tells_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("api.openai.routes.read_body", broken)
    monkeypatch.setattr("api.tgi.routes.read_body", broken)
    transport = httpx2.ASGITransport(make_app(ScriptedEngine()), raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://skiff") as http:
        answer = await http.post(path, json={})
    assert "secret" not in answer.text
    if path == "/generate":
        assert (answer.status_code, answer.content) == (500, b"Internal Server Error")
    else:
        check(answer, 500, "server_error")


async def test_an_invocation_has_the_errors_of_its_bodys_route() -> None:
    async with client(ScriptedEngine()) as http:
        for body in (CHAT | {"n": 0}, {"prompt": "x", "n": 0}):
            check(await http.post("/invocations", json=body), 400, INVALID)
        tgi = await http.post("/invocations", json={"inputs": ""})
        unread = await http.post("/invocations", json={"text": ""})
    assert (tgi.status_code, tgi.json()["error_type"]) == (422, "validation")
    assert (unread.status_code, unread.headers["content-type"]) == (
        422,
        "text/plain; charset=utf-8",
    )


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": "x", "logprobs": 9}, "logprobs"),
        ("/v1/completions", {"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/chat/completions", CHAT | {"max_tokens": 0}, "max_tokens"),
        ("/v1/chat/completions", CHAT | {"stop": list("abcde")}, "stop"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "messages[0].role"),
        (
            "/v1/chat/completions",
            CHAT | {"response_format": {"type": "regex", "value": "[a-z"}},
            "response_format",
        ),
    ],
    ids=str,
)
async def test_the_field_at_fault_is_named_as_the_route_calls_it(
    path: str, body: dict[str, Any], param: str
) -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post(path, json=body)
    check(answer, 400, INVALID)
    assert answer.json()["error"]["param"] == param
