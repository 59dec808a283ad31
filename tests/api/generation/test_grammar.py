"""The grammar and the prompt logprobs of a request: what the engine and the client get."""

import asyncio
import threading

import pytest

from tests.api.client import client
from tests.api.scripted import ScriptedEngine, ScriptedGrammar

pytestmark = pytest.mark.anyio

SCHEMA = {"properties": {"a": {"type": "integer"}}}
JSON = ScriptedGrammar("json", SCHEMA)
GRAMMARS: list[tuple[object, object]] = [
    ({"type": "json", "value": SCHEMA}, JSON),
    (
        {"type": "json", "value": '{"properties":{"a":{"type":"integer"}}}'},
        JSON,
    ),
    ({"type": "json_object", "value": SCHEMA}, JSON),
    (
        {"type": "json_schema", "value": {"schema": SCHEMA, "strict": True}},
        JSON,
    ),
    ({"type": "regex", "value": "[a-z]+"}, ScriptedGrammar("regex", "[a-z]+")),
]


@pytest.mark.parametrize(("grammar", "compiled"), GRAMMARS)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_grammar_is_compiled_for_the_engine(
    path: str, grammar: object, compiled: object
) -> None:
    engine = ScriptedEngine()
    async with client(engine) as http:
        answer = await http.post(path, json={"inputs": "x", "parameters": {"grammar": grammar}})
    assert answer.status_code == 200
    assert engine.requests[0].grammar == compiled


async def test_a_header_names_the_parts_of_a_grammar_that_are_ignored() -> None:
    async with client(ScriptedEngine()) as http:
        for schema, told in ((SCHEMA, None), (SCHEMA | {"not": {}}, "not: ignored")):
            body = {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": schema}}}
            answer = await http.post("/generate", json=body)
            assert answer.headers.get("x-grammar-warnings") == told


async def test_a_slow_grammar_does_not_delay_other_requests() -> None:
    engine, gate = ScriptedEngine(), threading.Event()
    compile = engine.grammars.regex

    def compile_slowly(pattern: str) -> ScriptedGrammar:
        gate.wait(5)
        return compile(pattern)

    engine.grammars.regex = compile_slowly  # type: ignore[method-assign]
    slow = {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "a"}}}
    async with client(engine) as http:
        waiting = [asyncio.create_task(http.post("/generate", json=slow)) for _ in range(4)]
        for _ in range(3):
            assert (await http.post("/generate", json={"inputs": "x"})).status_code == 200
        assert not any(task.done() for task in waiting)
        gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 4


async def test_a_grammar_that_takes_too_long_to_compile_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.generation.grammar._TIMEOUT_S", 0.01)
    engine, gate = ScriptedEngine(), threading.Event()

    def compile_slowly(pattern: str) -> ScriptedGrammar:
        gate.wait(5)
        return ScriptedGrammar("regex", pattern)

    engine.grammars.regex = compile_slowly  # type: ignore[method-assign]
    async with client(engine) as http:
        body = {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "a"}}}
        answer = await http.post("/generate", json=body)
    gate.set()
    assert answer.status_code == 422
    assert answer.json()["error"].endswith("grammar is not valid: it takes too long to compile")


async def test_prefill_logprobs_need_the_servers_permission() -> None:
    body = {"inputs": "x", "parameters": {"decoder_input_details": True}}
    for enabled in (False, True):
        engine = ScriptedEngine()
        async with client(engine, enable_prefill_logprobs=enabled) as http:
            answer = await http.post("/generate", json=body)
        assert engine.requests[0].prompt_logprobs is enabled
        assert answer.json()["details"]["prefill"] == []  # the script has no prompt tokens


async def test_only_the_first_of_several_sequences_computes_prompt_logprobs() -> None:
    engine = ScriptedEngine()
    parameters = {"decoder_input_details": True, "best_of": 2, "do_sample": True}
    async with client(engine, enable_prefill_logprobs=True) as http:
        await http.post("/generate", json={"inputs": "x", "parameters": parameters})
    assert [request.prompt_logprobs for request in engine.requests] == [True, False]
