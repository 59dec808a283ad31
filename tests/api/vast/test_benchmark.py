"""The benchmark: measured in limited time, and kept for the next start."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from api.vast.benchmark import BenchmarkFailed, BenchmarkKey, max_perf, measure, source_digest
from engine.core.request import Event, Failed, Request
from tests.api.scripted import HOLD, ScriptedEngine, finished, output

pytestmark = pytest.mark.anyio
KEY = BenchmarkKey("model", "device", "version", "settings")


def as_many_as_asked(request: Request) -> Sequence[list[Event]]:
    count = request.stopping.max_new_tokens
    steps: list[list[Event]] = [[output("a")] for _ in range(count)]
    steps[-1].append(finished("a" * count, count))
    return steps


def engine_for(script: Any = as_many_as_asked, permits: int = 128) -> Any:
    return ScriptedEngine(script, permits)


def runs_of(engine: ScriptedEngine) -> list[int]:
    """Return the number of requests of each run."""
    counted = Counter(request.request_id.rsplit("-", 1)[0] for request in engine.requests)
    return list(counted.values())


async def test_the_benchmark_has_the_shape_of_vasts_own() -> None:
    engine = engine_for()
    assert await measure(engine, seconds=60) > 0
    assert runs_of(engine) == [1, 2, 4, 8, 16, 32, 50, 50]
    for request in engine.requests:
        assert len(request.prompt_ids) == 251  # random words, and the token in app
        assert request.stopping.max_new_tokens == 128
        assert request.stopping.ignore_eos
        assert request.sampling.temperature == 0.7
    assert len({tuple(request.prompt_ids) for request in engine.requests}) > 100


async def test_the_benchmark_sends_no_more_requests_than_there_are_permits() -> None:
    engine = engine_for(permits=3)
    await measure(engine, seconds=60)
    assert max(runs_of(engine)) == 3


async def test_the_benchmark_ends_in_time_and_counts_generated_tokens() -> None:
    engine = engine_for(lambda _: [*[[output("a")]] * 20, HOLD])
    perf = await measure(engine, seconds=0.2)
    assert runs_of(engine) == [1]
    assert perf == pytest.approx(20 / 0.2, rel=0.5)
    assert engine.num_aborts == 1


async def test_a_benchmark_without_a_token_in_time_fails() -> None:
    with pytest.raises(BenchmarkFailed, match="no token came in time"):
        await measure(engine_for(lambda _: [HOLD]), seconds=0.05)


async def test_a_benchmark_whose_engine_fails_fails() -> None:
    with pytest.raises(BenchmarkFailed, match="out of memory"):
        await measure(engine_for(lambda _: [[Failed("out of memory")]]), seconds=1)


async def test_a_restart_of_the_same_worker_skips_the_benchmark(tmp_path: Path) -> None:
    measured = await max_perf(engine_for(), KEY, tmp_path / "new", 60)
    again = engine_for()
    assert await max_perf(again, KEY, tmp_path / "new", 60) == measured
    assert again.requests == []


@pytest.mark.parametrize("field", ["model", "device", "version", "settings"])
@pytest.mark.slow
async def test_a_worker_that_differs_measures_again(field: str, tmp_path: Path) -> None:
    await max_perf(engine_for(), KEY, tmp_path, 60)
    other = engine_for()
    await max_perf(other, replace(KEY, **{field: "other"}), tmp_path, 60)
    assert other.requests


@pytest.mark.parametrize("path", ["engine/engine.py", "engine/step/runner.py", "kernels/ops.py"])
def test_the_version_changes_with_any_source_file_of_a_step(path: str, tmp_path: Path) -> None:
    before = source_digest(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text("x = 1")
    assert source_digest(tmp_path) != before


@pytest.mark.parametrize("content", ["", "[]", '{"tokens_per_second": 0}', '{"tokens_per_second"'])
async def test_an_invalid_cached_result_is_measured_again(content: str, tmp_path: Path) -> None:
    (tmp_path / KEY.file_name).write_text(content)
    engine = engine_for()
    assert await max_perf(engine, KEY, tmp_path, 60) > 0
    assert engine.requests


async def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert await max_perf(engine_for(), KEY, tmp_path / "file" / "folder", 60) > 0


async def test_a_cancelled_benchmark_caches_nothing(tmp_path: Path) -> None:
    running = asyncio.create_task(max_perf(engine_for(lambda _: [HOLD]), KEY, tmp_path, 60))
    await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert list(tmp_path.iterdir()) == []
