"""Requests and answers as they are on the wire, without a client library."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx2

from clients.server import MAX_CONCURRENT_REQUESTS

VARY = "origin, access-control-request-method, access-control-request-headers"
"""The `vary` header of every answer (section 1.11)."""
PROMPT = "The capital of France is"
CHAT_PROMPT = "<|im_start|>user\nSay OK.<|im_end|>\n<|im_start|>assistant\n"
"""A prompt whose answer ends with the model's end-of-sequence token."""
MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the weather in a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]},
        },
        "required": ["city"],
    },
}
"""A function whose arguments are short, so that a small model completes them in time."""
TOOL = {"type": "function", "function": WEATHER}

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]},
        "capital": {"type": "boolean"},
    },
    "required": ["name", "capital"],
}


def name_of(value: object) -> str | None:
    """Return a test id made of the names of request parameters; empty for any other value."""
    return "-".join(value) if isinstance(value, dict) else ""


def events(body: str) -> list[Any]:
    """Return the JSON of each event, and `[DONE]` as it is. The framing must be exact."""
    assert body.endswith("\n\n")
    frames = [frame for frame in body[:-2].split("\n\n") if frame != ":"]
    for frame in frames:
        assert frame.startswith("data: "), frame
        assert "\n" not in frame, frame
    texts = [frame.removeprefix("data: ") for frame in frames]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def typed_events(body: str) -> list[Any]:
    """Return the JSON of each event of a stream whose events are named by their types."""
    assert body.endswith("\n\n")
    frames = [frame for frame in body[:-2].split("\n\n") if frame != ":"]
    found = []
    for frame in frames:
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}", frame
    return found


@contextmanager
def every_permit_taken(url: str) -> Iterator[None]:
    """Hold every permit with a long stream. At the end, cancel the streams and wait until a request
    is answered again: the server learns of closed connections one after the other.
    """
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 400}}
    with httpx2.Client(base_url=url, timeout=60) as client, ExitStack() as streams:
        for _ in range(MAX_CONCURRENT_REQUESTS):
            response = streams.enter_context(client.stream("POST", "/generate_stream", json=body))
            assert response.status_code == 200
        yield
    short = {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}
    deadline = time.monotonic() + 10
    while httpx2.post(f"{url}/generate", json=short).status_code == 429:
        assert time.monotonic() < deadline
