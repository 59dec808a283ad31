"""The API key: requests without it learn nothing, and new routes are guarded by default."""

from collections.abc import Iterable

import httpx2
import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute

from api.http.auth import OPEN
from tests.api.client import Connection, client, make_app
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio

KEY = "Sesame-42"
BODY = {"inputs": "x"}

OPEN_IN_TGI = {
    "GET /",
    "GET /health",
    "GET /ping",
    "GET /info",
    "GET /metrics",
    "GET /v1/models",
    "GET /docs",
    "GET /api-doc/openapi.json",
    "POST /chat_tokenize",
}


def routes_of(routes: Iterable[BaseRoute]) -> set[tuple[str, str]]:
    """Return the method and path of every route, including those of included routers."""
    found = set()
    for route in routes:
        if inner := getattr(route, "original_router", None):
            found |= routes_of(inner.routes)
        else:
            methods = getattr(route, "methods", None)
            assert methods, f"{route!r} is of a kind that this test does not know"
            found |= {(method, route.path) for method in methods}  # type: ignore[attr-defined]
    return found


async def statuses(app: FastAPI) -> dict[str, int]:
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app), base_url="http://skiff"
    ) as http:
        return {
            f"{method} {path}": (await http.request(method, path)).status_code
            for method, path in routes_of(app.routes)
        }


async def test_every_route_requires_the_key_except_those_open_in_tgi() -> None:
    app = make_app(ScriptedEngine(), api_key=KEY)
    answers = await statuses(app)
    assert len(answers) > 10
    opened = {route for route, status in answers.items() if status != 401}
    assert {route.replace("HEAD ", "GET ") for route in opened} <= OPEN_IN_TGI
    assert {f"{method} {path}" for method, path in OPEN} == OPEN_IN_TGI


async def test_a_setting_has_chat_tokenize_require_the_key_too() -> None:
    app = make_app(ScriptedEngine(), api_key=KEY, api_key_for_chat_tokenize=True)
    answers = await statuses(app)
    assert answers["POST /chat_tokenize"] == answers["POST /tokenize"] == 401
    assert answers["GET /health"] == 200
    no_key = make_app(ScriptedEngine(), api_key_for_chat_tokenize=True)
    assert (await statuses(no_key))["POST /chat_tokenize"] == 415


async def test_a_new_route_requires_the_key() -> None:
    app = make_app(ScriptedEngine(), api_key=KEY)
    app.add_api_route("/new", lambda: "secret", methods=["GET"])
    assert (await statuses(app))["GET /new"] == 401


@pytest.mark.parametrize(
    "given",
    [None, "", KEY, "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer  {KEY}", "é"],
)
async def test_without_the_key_the_answer_is_401_and_empty(given: str | None) -> None:
    engine = ScriptedEngine()
    headers = {} if given is None else {b"authorization": given.encode()}
    async with client(engine, api_key=KEY) as http:
        for body in (b'{"inputs":"x"}', b"no json"):
            answer = await http.post("/generate", content=body, headers=headers)
            assert (answer.status_code, answer.content) == (401, b"")
            assert "content-type" not in answer.headers
    assert not engine.requests


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer {KEY.lower()}", f"BEARER {KEY}"])
async def test_the_case_of_the_key_is_ignored(given: str) -> None:
    async with client(ScriptedEngine(), api_key=KEY) as http:
        for path in ("/generate", "/generate_stream", "/"):
            answer = await http.post(path, json=BODY, headers={"authorization": given})
            assert answer.status_code == 200


async def test_the_body_is_not_read_before_the_key() -> None:
    app = make_app(ScriptedEngine(), api_key=KEY)
    connection = Connection(app, "/generate", BODY, partial=True)
    await connection.finished()
    assert connection.sent[0]["status"] == 401


async def test_unknown_paths_are_404_with_and_without_the_key() -> None:
    async with client(ScriptedEngine(), api_key=KEY) as http:
        for path in ("/nowhere", "/generate/", "/docs/oauth2-redirect"):
            answer = await http.post(path, json=BODY)
            assert (answer.status_code, answer.content) == (404, b"")


async def test_a_wrong_method_without_the_key_is_401() -> None:
    async with client(ScriptedEngine(), api_key=KEY) as http:
        assert (await http.get("/generate")).status_code == 401
        answer = await http.get("/generate", headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == 405


async def test_without_the_setting_no_key_is_required() -> None:
    async with client(ScriptedEngine()) as http:
        assert (await http.post("/generate", json=BODY)).status_code == 200


@pytest.mark.parametrize("given", [KEY, KEY.lower()])
async def test_the_key_comes_by_the_header_of_anthropics_clients_too(given: str) -> None:
    async with client(ScriptedEngine(), api_key=KEY) as http:
        answer = await http.post("/generate", json=BODY, headers={"x-api-key": given})
        assert answer.status_code == 200


@pytest.mark.parametrize("given", ["", "x", f"Bearer {KEY}", f"{KEY}x", "é"])
async def test_a_wrong_key_in_that_header_is_401(given: str) -> None:
    async with client(ScriptedEngine(), api_key=KEY) as http:
        answer = await http.post("/generate", json=BODY, headers={b"x-api-key": given.encode()})
        assert answer.status_code == 401
