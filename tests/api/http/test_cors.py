"""CORS headers on every answer, equal to those of TGI's router to the byte."""

from typing import Any

import httpx2
import pytest

from tests.api.client import client, make_app
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio

VARY = "origin, access-control-request-method, access-control-request-headers"
OURS = "https://ours.example"
ANSWERS: list[tuple[str, str, Any, int]] = [
    ("GET", "/health", None, 200),
    ("HEAD", "/health", None, 200),
    ("POST", "/generate", {"inputs": "x"}, 200),
    ("POST", "/generate_stream", {"inputs": "x"}, 200),
    ("POST", "/generate", {"inputs": ""}, 422),
    ("POST", "/generate", {}, 422),
    ("GET", "/generate", None, 405),
    ("GET", "/nowhere", None, 404),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), ANSWERS)
@pytest.mark.parametrize("origin", [None, OURS])
async def test_any_page_may_read_any_answer(
    method: str, path: str, body: object, status: int, origin: str | None
) -> None:
    headers = {"origin": origin} if origin else {}
    async with client(ScriptedEngine()) as http:
        answer = await http.request(method, path, json=body, headers=headers)
    assert answer.status_code == status
    assert answer.headers.get_list("access-control-allow-origin") == ["*"]
    assert answer.headers.get_list("vary") == [VARY]


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [(OURS, [OURS]), ("https://theirs.example", []), (OURS.upper(), []), (None, [])],
)
@pytest.mark.parametrize("path", ["/health", "/nowhere", "/generate"])
async def test_only_pages_of_listed_origins_may_read_answers(
    path: str, origin: str | None, allowed: list[str]
) -> None:
    headers = {"origin": origin} if origin else {}
    origins = [OURS, "https://other.example"]
    async with client(ScriptedEngine(), cors_allow_origin=origins, api_key="k") as http:
        for method in ("GET", "OPTIONS"):
            answer = await http.request(method, path, headers=headers)
            assert answer.headers.get_list("access-control-allow-origin") == allowed
            assert answer.headers.get_list("vary") == [VARY]


async def test_a_star_in_the_list_allows_every_origin() -> None:
    async with client(ScriptedEngine(), cors_allow_origin=[OURS, "*"]) as http:
        answer = await http.get("/health", headers={"origin": "https://theirs.example"})
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("path", ["/", "/generate", "/health", "/nowhere"])
@pytest.mark.parametrize("asked", [{}, {"access-control-request-method": "DELETE"}])
async def test_a_preflight_request_is_answered_on_every_path(
    path: str, asked: dict[str, str]
) -> None:
    async with client(ScriptedEngine(), api_key="k") as http:
        answer = await http.options(path, headers=asked)
    assert (answer.status_code, answer.content) == (200, b"")
    assert dict(answer.headers) == {
        "vary": VARY,
        "access-control-allow-origin": "*",
        "access-control-allow-methods": "GET,POST",
        "access-control-allow-headers": "content-type",
        "content-length": "0",
    }


async def test_pages_can_read_a_401() -> None:
    async with client(ScriptedEngine(), api_key="k") as http:
        answer = await http.post("/generate", json={"inputs": "x"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "*"


async def test_pages_can_read_a_500() -> None:
    app = make_app(ScriptedEngine())

    def broken() -> None:
        raise RuntimeError("a bug")

    app.add_api_route("/broken", broken)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://skiff") as http:
        answer = await http.get("/broken")
    assert answer.status_code == 500
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["vary"] == VARY
