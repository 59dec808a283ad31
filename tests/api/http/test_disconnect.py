"""A disconnect frees the permit and aborts the generation at once, in every phase."""

import asyncio

import pytest

from tests.api.client import Connection, make_app, until
from tests.api.scripted import HOLD, ScriptedEngine, output

pytestmark = pytest.mark.anyio

PATHS = pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])


@PATHS
async def test_a_disconnect_while_the_body_arrives_submits_nothing(path: str) -> None:
    engine = ScriptedEngine()
    connection = Connection(make_app(engine), path, {"inputs": "x"}, partial=True)
    await asyncio.sleep(0.01)
    await connection.go_away()
    assert not engine.requests


@PATHS
async def test_a_disconnect_during_validation_frees_the_permit(path: str) -> None:
    engine = ScriptedEngine()
    engine.tokenizer.gate.clear()
    connection = Connection(make_app(engine), path, {"inputs": "x"})
    await until(lambda: engine.num_permits < engine.max_permits)
    await connection.go_away()
    assert engine.num_permits == engine.max_permits
    engine.tokenizer.gate.set()
    await asyncio.sleep(0.01)
    assert not engine.requests


@PATHS
async def test_a_disconnect_while_queued_aborts_the_generation(path: str) -> None:
    engine = ScriptedEngine(lambda _: [HOLD])
    connection = Connection(make_app(engine), path, {"inputs": "x"})
    await until(engine.holding.is_set)
    await connection.go_away()
    assert engine.num_aborts == 1
    assert engine.num_permits == engine.max_permits


@PATHS
async def test_a_disconnect_between_two_tokens_aborts_the_generation(path: str) -> None:
    engine = ScriptedEngine(lambda _: [[output("a")], HOLD])
    body = {"inputs": "x", "stream": path == "/"}
    connection = Connection(make_app(engine), path, body)
    await until(engine.holding.is_set)
    await connection.go_away()
    assert engine.num_aborts == 1
    assert engine.num_permits == engine.max_permits


async def test_a_disconnect_aborts_all_generations_of_a_request() -> None:
    engine = ScriptedEngine(lambda _: [[output("a")], HOLD])
    body = {"inputs": "x", "parameters": {"best_of": 2, "do_sample": True}}
    connection = Connection(make_app(engine), "/generate", body)
    await until(engine.holding.is_set)
    await connection.go_away()
    assert engine.num_aborts == 2
    assert engine.num_permits == engine.max_permits


async def test_a_disconnect_of_a_slow_reader_aborts_the_generation() -> None:
    engine = ScriptedEngine(lambda _: [[output("a")]] * 3)
    connection = Connection(make_app(engine), "/generate_stream", {"inputs": "x"}, num_reads=1)
    await until(lambda: engine.num_open == 1)
    await asyncio.sleep(0.01)
    await connection.go_away()
    assert engine.num_aborts == 1
    assert engine.num_permits == engine.max_permits


@PATHS
async def test_a_finished_generation_is_not_aborted(path: str) -> None:
    engine = ScriptedEngine()
    connection = Connection(make_app(engine), path, {"inputs": "x"})
    await connection.finished()
    assert engine.num_aborts == 0
