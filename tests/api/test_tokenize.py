"""/tokenize and /chat_tokenize, whose spans count bytes of the text and not characters."""

import asyncio
import statistics
import time

import httpx2
import orjson
import pytest
from transformers import AutoTokenizer

from engine.core.config import DEFAULT_MODEL_ID
from engine.core.errors import TemplateError
from engine.loading.checkpoint import locate
from engine.text.tokenizer import Tokenizer
from tests.api.client import client
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "é"}]}


async def test_tokens_have_the_bytes_that_they_stand_for() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/tokenize", json={"inputs": "aé🙂"})
    assert answer.status_code == 200
    assert answer.content.decode() == (
        '[{"id":1,"text":"","start":0,"stop":0},{"id":3,"text":"aé","start":0,"stop":3},'
        '{"id":3,"text":"�","start":3,"stop":6},{"id":1,"text":"�","start":6,"stop":7}]'
    )
    assert not [name for name in answer.headers if name.startswith("x-")]


async def test_an_empty_text_and_bad_parameters_are_accepted() -> None:
    body = {"inputs": "", "parameters": {"truncate": 0, "max_new_tokens": 0}}
    async with client(ScriptedEngine(permits=0)) as http:
        answer = await http.post("/tokenize", json=body)
    assert answer.json() == [{"id": 1, "text": "", "start": 0, "stop": 0}]


async def test_a_chat_is_tokenized_as_its_prompt_without_special_tokens() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/chat_tokenize", json=CHAT)
    assert answer.content.decode() == (
        '{"tokenize_response":[{"id":3,"text":"use","start":0,"stop":3},'
        '{"id":3,"text":"r: ","start":3,"stop":6},{"id":2,"text":"é","start":6,"stop":8}],'
        '"templated_text":"user: é"}'
    )


async def test_tools_are_in_the_prompt() -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/chat_tokenize", json=CHAT | {"tools": tools})
    assert '"name":"clock"' in answer.json()["templated_text"]


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"inputs": "x"}), ("/chat_tokenize", CHAT)]
)
async def test_a_tokenizer_that_fails_is_a_validation_error(path: str, body: object) -> None:
    engine = ScriptedEngine()
    engine.tokenizer.error = ValueError("bad bytes")
    async with client(engine) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 422
    assert answer.content == (
        b'{"error":"Input validation error: tokenizer error bad bytes","error_type":"validation"}'
    )


async def test_a_template_that_fails_is_a_template_error() -> None:
    engine = ScriptedEngine()
    engine.tokenizer.template_error = TemplateError("template not found")
    async with client(engine) as http:
        answer = await http.post("/chat_tokenize", json=CHAT)
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "template_error"


async def test_bodies_of_another_shape_are_rejected() -> None:
    shape = "Failed to deserialize the JSON body into the target type: "
    async with client(ScriptedEngine()) as http:
        for path, field in (("/tokenize", "inputs"), ("/chat_tokenize", "messages")):
            answer = await http.post(path, json={})
            assert answer.text == f"{shape}missing field `{field}` at line 1 column 2"


# -- long texts ------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 1023, 1024, 1025, 16_384, 16_385, 40_000])
async def test_an_answer_of_any_length_is_one_list(num_tokens: int) -> None:
    text = "abc" * num_tokens
    async with client(ScriptedEngine()) as http:
        answer = await http.post(
            "/chat_tokenize", json={"messages": [{"role": "", "content": text[2:]}]}
        )
        plain = await http.post("/tokenize", json={"inputs": text})
    templated = ": " + text[2:]
    spans = [(start, start + 3) for start in range(0, len(templated), 3)]
    tokens = [{"id": 3, "text": templated[a:b], "start": a, "stop": b} for a, b in spans]
    assert answer.content == orjson.dumps(
        {"tokenize_response": tokens, "templated_text": templated}
    )
    assert plain.json()[1:] == [token | {"text": "abc"} for token in tokens]
    assert ("content-length" in plain.headers) == (num_tokens < 16_384)


async def watch(lags: list[float]) -> None:
    """Write down again and again for how long the event loop did something else."""
    while True:
        started = time.perf_counter()
        await asyncio.sleep(0.001)
        lags.append(time.perf_counter() - started)


async def size_of_answer(http: httpx2.AsyncClient, path: str, body: object) -> int:
    async with http.stream("POST", path, content=orjson.dumps(body), headers=JSON) as answer:
        assert answer.status_code == 200
        return sum([len(piece) async for piece in answer.aiter_bytes()])


@pytest.mark.parametrize("path", ["/tokenize", "/chat_tokenize", "/generate"])
async def test_a_text_of_megabytes_does_not_hold_up_the_event_loop(path: str) -> None:
    """The bounds are those of a busy machine: with all in one thread, it is several seconds."""
    engine = ScriptedEngine()
    source = AutoTokenizer.from_pretrained(locate(DEFAULT_MODEL_ID).path)
    engine.tokenizer = Tokenizer(source)  # type: ignore[assignment]
    text = "The quick brown fox's 7 naïve dogs, and more.\n" * 30_000
    body: object = {"inputs": text, "parameters": {"truncate": 100}}
    if path == "/chat_tokenize":
        body = {"messages": [{"role": "user", "content": text}]}
    lags: list[float] = []
    async with client(engine) as http:
        watching = asyncio.create_task(watch(lags))
        size = await size_of_answer(http, path, body)
        watching.cancel()
    assert path == "/generate" or size > 20_000_000
    assert statistics.quantiles(lags, n=20)[-1] < 0.05
    assert max(lags) < 1
