"""The whole worker over real sockets: HTTP in front of a real engine and a tiny real model."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import uvicorn

from api.app import create_app
from api.generation.state import build_state
from api.settings.config import read_settings
from bench.load import run_load
from bench.workload import LengthMix, LoadPlan
from engine.async_engine import AsyncEngine
from engine.engine import Engine
from tests.engine.driving import LOGPROB_TOLERANCE, generate, make_engine
from tests.engine.models import byte_tokenizer, family, reference
from tests.engine.test_failures import sabotage

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

PROMPT = "The quick brown fox jumps over the lazy dog, again and again."


@dataclass
class Worker:
    engine: Engine
    served: AsyncEngine
    port: int

    def client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    async def open(self, path: str, body: dict[str, Any]) -> asyncio.StreamWriter:
        """Send a request and return its socket, so that the caller can close it at any time."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
        await writer.drain()
        return writer


@asynccontextmanager
async def worker(engine: Engine, **options: Any) -> AsyncIterator[Worker]:
    limits = {"max_concurrent_requests": 128, "stall_timeout_s": 60.0} | options
    served = AsyncEngine(engine, **limits)
    settings = read_settings(["--max-concurrent-requests", str(limits["max_concurrent_requests"])])
    app = create_app(build_state(served, settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", http="httptools"))
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    try:
        yield Worker(engine, served, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        await task


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def body(num_tokens: int, prompt: str = PROMPT, **parameters: Any) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": num_tokens} | parameters}


async def test_streamed_and_plain_answers_equal_transformers_generate() -> None:
    loaded = family("llama")
    ids = generate(reference("llama"), byte_tokenizer().encode(PROMPT), 16)
    async with worker(make_engine(loaded)) as w, w.client() as client:
        plain = (await client.post("/generate", json=body(16, details=True))).json()
        stream = await client.post("/generate_stream", json=body(16, details=True))
    events = [json.loads(e.removeprefix("data: ")) for e in stream.text.split("\n\n") if e]
    assert [t["id"] for t in plain["details"]["tokens"]] == ids
    assert [e["token"]["id"] for e in events] == ids
    assert [e["token"] for e in events] == plain["details"]["tokens"]
    assert events[-1]["generated_text"] == plain["generated_text"]
    assert "".join(e["token"]["text"] for e in events) == plain["generated_text"]


async def test_many_clients_at_once_are_all_answered() -> None:
    async with worker(make_engine(family("llama"), num_blocks=24, max_batch_tokens=32)) as w:
        plan = LoadPlan(
            api="tgi",
            num_requests=48,
            concurrency=16,
            input_len=LengthMix.parse("2:12"),
            output_len=LengthMix.parse("1:24"),
        )
        result = await run_load(f"http://127.0.0.1:{w.port}", plan)
        assert result.summary.completed == 48
        assert result.summary.failed == 0


def storm() -> list[tuple[str, dict[str, Any]]]:
    """Sixteen requests that need three times as many blocks as there are: route and body."""
    kinds: list[dict[str, Any]] = [
        {},
        {"do_sample": True, "temperature": 0.8},
        {"do_sample": True, "top_p": 0.9, "best_of": 2},
        {"do_sample": True, "top_k": 20, "repetition_penalty": 1.3},
    ]
    requests = []
    for number in range(16):
        # Half of the prompts begin with the same words: their blocks are shared.
        text = f"{PROMPT} {number}" if number % 2 else f"{number} {PROMPT}"
        asked = body(120 + number, text, details=True, **kinds[number % 4])
        is_plain = "best_of" in asked["parameters"] or number < 8
        requests.append(("/generate" if is_plain else "/generate_stream", asked))
    return requests


async def sequences_of(
    client: httpx2.AsyncClient, route: str, asked: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the text, the seed and the tokens of each sequence, streamed or not."""
    answer = await client.post(route, json=asked, timeout=120)
    assert answer.status_code == 200, answer.text
    if route == "/generate":
        whole = answer.json()
        best = whole["details"] | {"generated_text": whole["generated_text"]}
        return [best, *best.get("best_of_sequences", [])]
    events = [json.loads(e.removeprefix("data:")) for e in answer.text.split("\n\n") if e]
    return [
        events[-1]["details"]
        | {"generated_text": events[-1]["generated_text"]}
        | {"tokens": [event["token"] for event in events]}
    ]


async def test_every_answer_in_a_storm_of_preemptions_equals_its_solo_run() -> None:
    engine = make_engine(family("llama"), num_blocks=85, max_sequences=24, max_batch_tokens=64)
    async with worker(engine) as w, w.client() as client:
        answers = await asyncio.gather(*(sequences_of(client, *request) for request in storm()))
        assert engine.scheduler.num_preemptions >= 8
        assert engine.figures().num_used_blocks == 0
        engine.scheduler.pool.forget_cached()
        num_preemptions = engine.scheduler.num_preemptions
        for (_, asked), sequences in zip(storm(), answers, strict=True):
            assert len(sequences) == asked["parameters"].pop("best_of", 1)
            for sequence in sequences:
                asked["parameters"]["seed"] = sequence["seed"]
                (alone,) = await sequences_of(client, "/generate", asked)
                check_same_sequence(sequence, alone)
        assert engine.scheduler.num_preemptions == num_preemptions


def check_same_sequence(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["generated_text"] == other["generated_text"]
    assert [t["id"] for t in one["tokens"]] == [t["id"] for t in other["tokens"]]
    logprobs = [t["logprob"] for t in other["tokens"]]
    assert [t["logprob"] for t in one["tokens"]] == pytest.approx(logprobs, abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize("phase", ["queued", "prefilling", "decoding"])
async def test_a_client_that_goes_away_frees_its_slot_and_blocks_within_one_step(
    path: str, phase: str
) -> None:
    engine = make_engine(family("llama"), max_sequences=1, max_batch_tokens=16)
    gate = threading.Semaphore(0)
    sabotage(engine, lambda _: not gate.acquire(timeout=10), TimeoutError())
    async with worker(engine) as w:
        ahead = await w.open("/generate_stream", body(3, "x")) if phase == "queued" else None
        steps = {"queued": 0, "prefilling": 2, "decoding": 7}[phase]
        await eventually(lambda: engine.num_steps > 0 or ahead is None)
        leaver = await w.open(path, body(100))
        for _ in range(steps):
            gate.release()
        await eventually(lambda: len(w.served._generations) == (2 if ahead else 1))
        await eventually(lambda: engine.num_steps >= steps + 2 or ahead is not None)
        leaver.close()
        await eventually(lambda: len(w.served._generations) == (1 if ahead else 0))
        gate.release()  # the step in progress ends; the abort is heeded before the next
        await eventually(lambda: len(engine._live) == (1 if ahead else 0))
        assert engine.num_steps <= steps + 3
        assert ahead or engine.figures().num_used_blocks == 0
        gate.release(100)
        async with w.client() as client:
            assert (await client.post("/generate", json=body(2))).status_code == 200
        if ahead:
            ahead.close()


async def test_health_answers_at_once_while_a_step_runs_and_reports_a_stall() -> None:
    engine, release = make_engine(family("llama")), threading.Event()
    sabotage(engine, lambda _: not release.wait(10), TimeoutError())
    async with worker(engine, stall_timeout_s=2) as w, w.client() as client:
        assert (await client.get("/health")).status_code == 200
        task = asyncio.create_task(client.post("/generate", json=body(2)))
        await eventually(lambda: engine.num_steps > 0)
        assert (await client.get("/health")).status_code == 200
        await asyncio.sleep(2.1)
        stalled = await client.get("/health")
        assert stalled.status_code == 503
        assert stalled.json()["error_type"] == "healthcheck"
        assert "no progress" in stalled.json()["reason"]
        release.set()
        assert (await task).status_code == 200
        assert (await client.get("/health")).status_code == 200


async def test_a_dead_engine_fails_every_request_and_the_health_check() -> None:
    engine = make_engine(family("llama"))
    async with worker(engine) as w, w.client() as client:

        def die(**_: object) -> None:
            raise RuntimeError("the device is lost")

        engine.step = die  # type: ignore[method-assign, assignment]
        answer = await client.post("/generate", json=body(2))
        assert answer.status_code == 424
        assert answer.json() == {
            "error": "Request failed during generation: the device is lost",
            "error_type": "generation",
        }
        assert (await client.get("/health")).json()["reason"] == "the device is lost"
        assert (await client.post("/generate", json=body(2))).status_code == 424


async def test_requests_beyond_the_limit_are_refused_and_change_nothing() -> None:
    engine, release = make_engine(family("llama")), threading.Event()
    sabotage(engine, lambda _: not release.wait(10), TimeoutError())
    async with worker(engine, max_concurrent_requests=2) as w, w.client() as client:
        tasks = [asyncio.create_task(client.post("/generate", json=body(3))) for _ in range(2)]
        await eventually(lambda: w.served._free_permits == 0)
        refused = await client.post("/generate", json=body(3))
        assert refused.status_code == 429
        assert refused.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
        release.set()
        assert [(await task).status_code for task in tasks] == [200, 200]
        assert (await client.post("/generate", json=body(3))).status_code == 200


@pytest.mark.parametrize("stop", ["again", "qu"])
async def test_stop_sequences_end_a_generation(stop: str) -> None:
    """Stop the random model at two characters that it is known to generate."""
    async with worker(make_engine(family("llama"))) as w, w.client() as client:
        free = (await client.post("/generate", json=body(40))).json()["generated_text"]
        found = next((free[i : i + 2] for i in range(4, 36) if free[i : i + 2].isascii()), stop)
        answer = (await client.post("/generate", json=body(40, stop=[found], details=True))).json()
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["generated_text"] == free[: free.index(found) + len(found)]


async def test_truncate_keeps_the_end_and_full_text_has_the_whole_prompt() -> None:
    async with worker(make_engine(family("llama"))) as w, w.client() as client:
        last = (await client.post("/generate", json=body(6, PROMPT[-9:]))).json()
        cut = await client.post(
            "/generate", json=body(6, truncate=9, return_full_text=True, details=True)
        )
    assert cut.json()["generated_text"] == PROMPT + last["generated_text"]
    assert cut.headers["x-prompt-tokens"] == "9"


async def test_the_same_seed_gives_the_same_text_streamed_or_not() -> None:
    request = body(12, do_sample=True, temperature=0.9, seed=1234, details=True)
    async with worker(make_engine(family("llama"))) as w, w.client() as client:
        answers = [(await client.post("/generate", json=request)).json() for _ in range(2)]
        stream = await client.post("/generate_stream", json=request)
    last = json.loads(stream.text.split("data: ")[-1])
    assert answers[0] == answers[1]
    assert answers[0]["details"]["seed"] == 1234
    assert last["generated_text"] == answers[0]["generated_text"]
    assert last["details"]["seed"] == 1234
