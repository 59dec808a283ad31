"""The CORS headers that browsers need on every answer, including errors (section 1.11)."""

import httpx2
import pytest

from clients.wire import PROMPT, VARY

ANSWERS = [
    ("GET", "/health", None, 200),
    ("GET", "/info", None, 200),
    ("POST", "/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}, 200),
    ("POST", "/generate_stream", {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}, 200),
    ("POST", "/generate", {"inputs": ""}, 422),
    ("POST", "/generate", {}, 422),
    ("GET", "/generate", None, 405),
    ("GET", "/nowhere", None, 404),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), ANSWERS)
@pytest.mark.parametrize("origin", [None, "https://anywhere.example"])
def test_any_page_may_read_any_answer(
    url: str, method: str, path: str, body: object, status: int, origin: str | None
) -> None:
    headers = {"origin": origin} if origin else {}
    answer = httpx2.request(method, f"{url}{path}", json=body, headers=headers)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["vary"] == VARY


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/health", "/nowhere"])
def test_a_preflight_request_is_answered_on_every_path(url: str, path: str) -> None:
    headers = {
        "origin": "https://anywhere.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    for asked in (headers, {}):
        answer = httpx2.request("OPTIONS", f"{url}{path}", headers=asked)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["access-control-allow-methods"] == "GET,POST"
        assert answer.headers["access-control-allow-headers"] == "content-type"
