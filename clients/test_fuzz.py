"""Random requests that schemathesis makes from the server's OpenAPI document. No request may cause
an internal error, and none may leave anything behind.

The default is about 60 requests, the same each time; `make fuzz` sends 2,000 new ones.
"""

import asyncio
import json
import os
from typing import Any

import httpx2
import pytest
import schemathesis

from clients.server import MAX_CONCURRENT_REQUESTS, Server
from clients.wire import PROMPT, events, typed_events

SHORT_FORM = 60
CASES = int(os.environ.get("FUZZ_CASES", SHORT_FORM))
MAX_NEW_TOKENS = 4
TYPED_STREAMS = ("/v1/responses", "/v1/messages")

REJECTIONS = {
    400: "Failed to parse the request body as JSON: ",
    413: "Failed to buffer the request body: length limit exceeded",
    415: "Expected request with `Content-Type: application/json`",
    422: "Failed to deserialize the JSON body into the target type: ",
}
"""Beginnings of the plain-text errors for bodies that cannot be parsed (section 5.3)."""


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    document = schemathesis.openapi.from_url(f"{url}/api-doc/openapi.json")
    posts = sum(found.ok().method == "post" for found in document.get_all_operations())
    config = document.config
    config.generation.max_examples = -(-CASES // posts)
    config.generation.deterministic = CASES == SHORT_FORM
    config.phases.coverage.enabled = CASES != SHORT_FORM
    return document


def limit_tokens(value: Any) -> Any:
    """Return the request with a low token limit, so that fuzzing does not wait for long answers."""
    if isinstance(value, list):
        return [limit_tokens(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: limit_tokens(item) for key, item in value.items()}
    if "inputs" in value:
        if value.get("parameters") is None:
            value["parameters"] = {}
        if isinstance(value["parameters"], dict):
            _limit(value["parameters"], "max_new_tokens")
    if "messages" in value or "prompt" in value:
        key = "max_completion_tokens" if "max_completion_tokens" in value else "max_tokens"
        _limit(value, key)
    if "input" in value:
        _limit(value, "max_output_tokens")
    return value


def _limit(parameters: dict[str, Any], key: str) -> None:
    asked = parameters.get(key)
    if asked is None or (isinstance(asked, int | float) and asked > MAX_NEW_TOKENS):
        parameters[key] = MAX_NEW_TOKENS


api = schemathesis.pytest.from_fixture("document")


@api.parametrize()
def test_no_request_causes_an_internal_error(case: Any, server: Server) -> None:
    case.body = limit_tokens(case.body)
    response = case.call(timeout=120)
    assert server.process.poll() is None, server.output()
    (kind,) = response.headers.get("content-type", [""])
    if response.status_code >= 500:
        # TGI answers 500 if an instance fails (section 1.8).
        assert case.path == "/vertex", response.text
        assert response.json()["error"] == "Incomplete generation"
    elif response.status_code >= 400 and kind == "application/json":
        check_error(response.json())
    elif response.status_code >= 400 and response.text:
        assert kind == "text/plain; charset=utf-8"
        assert response.text.startswith(REJECTIONS[response.status_code])
    elif kind.startswith("text/event-stream") and case.path in TYPED_STREAMS:
        assert typed_events(response.text)
    elif kind.startswith("text/event-stream"):
        assert all(event == "[DONE]" or isinstance(event, dict) for event in events(response.text))
    elif kind == "application/json":
        json.loads(response.content)


def check_error(body: Any) -> None:
    """Check that an error has TGI's shape, OpenAI's or Anthropic's."""
    if body.get("type") == "error":
        assert list(body) == ["type", "error", "request_id"]
        assert {"type", "message"} <= set(body["error"])
    elif isinstance(body["error"], dict):
        assert list(body) == ["error"]
        assert list(body["error"]) == ["message", "type", "param", "code"]
    else:
        assert list(body) == ["error", "error_type"]


@pytest.mark.anyio
async def test_random_requests_leave_nothing_behind(url: str) -> None:
    """All permits are free: as many concurrent requests as there are permits are answered."""
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        assert (await client.get("/health")).status_code == 200
        answers = await asyncio.gather(
            *(client.post("/generate", json=body) for _ in range(MAX_CONCURRENT_REQUESTS))
        )
        assert {answer.text for answer in answers} == {'{"generated_text":" Paris"}'}
        metrics = (await client.get("/metrics")).text
    lines = [line for line in metrics.splitlines() if line and line[0] != "#"]
    gauges = dict(line.rsplit(" ", 1) for line in lines)
    assert float(gauges["tgi_queue_size"]) == 0
    assert float(gauges["tgi_batch_current_size"]) == 0
