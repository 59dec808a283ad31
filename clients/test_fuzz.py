"""Requests made up by schemathesis from the server's own OpenAPI document: whatever is sent, the
answer is none of a server in trouble, and nothing is left behind.

About 60 requests here, the same each time; `make fuzz` makes 2,000, others each time.
"""

import asyncio
import json
import os
from typing import Any

import httpx2
import pytest
import schemathesis

from clients.server import MAX_CONCURRENT_REQUESTS, Server
from clients.wire import PROMPT, events

SHORT_FORM = 60
CASES = int(os.environ.get("FUZZ_CASES", SHORT_FORM))
MAX_NEW_TOKENS = 4

REJECTIONS = {
    400: "Failed to parse the request body as JSON: ",
    413: "Failed to buffer the request body: length limit exceeded",
    415: "Expected request with `Content-Type: application/json`",
    422: "Failed to deserialize the JSON body into the target type: ",
}
"""Bodies that are not even read are refused in words, by section 5.3."""


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    document = schemathesis.openapi.from_url(f"{url}/api-doc/openapi.json")
    posts = sum(found.ok().method == "post" for found in document.get_all_operations())
    config = document.config
    config.generation.max_examples = -(-CASES // posts)
    config.generation.deterministic = CASES == SHORT_FORM
    config.phases.coverage.enabled = CASES != SHORT_FORM
    return document


def shortened(value: Any) -> Any:
    """The same request, asking for few tokens: fuzzing is not to wait for a model to speak."""
    if isinstance(value, list):
        return [shortened(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: shortened(item) for key, item in value.items()}
    if "inputs" in value:
        if value.get("parameters") is None:
            value["parameters"] = {}
        if isinstance(value["parameters"], dict):
            _limit(value["parameters"], "max_new_tokens")
    if "messages" in value or "prompt" in value:
        key = "max_completion_tokens" if "max_completion_tokens" in value else "max_tokens"
        _limit(value, key)
    return value


def _limit(parameters: dict[str, Any], key: str) -> None:
    asked = parameters.get(key)
    if asked is None or (isinstance(asked, int | float) and asked > MAX_NEW_TOKENS):
        parameters[key] = MAX_NEW_TOKENS


api = schemathesis.pytest.from_fixture("document")


@api.parametrize()
def test_no_request_brings_the_server_into_trouble(case: Any, server: Server) -> None:
    case.body = shortened(case.body)
    response = case.call(timeout=120)
    assert server.process.poll() is None, server.said()
    (kind,) = response.headers.get("content-type", [""])
    if response.status_code >= 500:
        # TGI's way of telling that an instance could not be answered, section 1.8.
        assert case.path == "/vertex", response.text
        assert response.json()["error"] == "Incomplete generation"
    elif response.status_code >= 400 and kind == "application/json":
        assert list(response.json()) == ["error", "error_type"]
    elif response.status_code >= 400 and response.text:
        assert kind == "text/plain; charset=utf-8"
        assert response.text.startswith(REJECTIONS[response.status_code])
    elif kind.startswith("text/event-stream"):
        assert all(event == "[DONE]" or isinstance(event, dict) for event in events(response.text))
    elif kind == "application/json":
        json.loads(response.content)


@pytest.mark.anyio
async def test_afterwards_nothing_is_left_behind(url: str) -> None:
    """Every permit is free: as many requests at once as there are permits are all answered."""
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
