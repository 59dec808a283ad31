"""The cache gets the memory left beside the largest step, which is run to measure it."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from engine import engine as engine_module
from engine.attention.kv_cache import bytes_per_block
from engine.core.config import BLOCK_SIZE, EngineConfig, LoadConfig
from engine.core.errors import LoadError
from engine.device.memory import DeviceMemory
from engine.engine import Engine, measure_limits
from engine.loading.loader import LoadedModel
from engine.loading.sizing import Limits, decide_limits, run_largest_step
from engine.step.runner import build_runner
from kernels.ops import TRITON
from tests.engine.driving import check_greedy, greedy, run
from tests.engine.models import family, prepared, reference

MIB = 1 << 20


@dataclass
class ScriptedMemory:
    """A device with this much memory free, on which a step takes this much."""

    free: int
    step: int
    ran: list[object] = field(default_factory=list)

    def available(self) -> int:
        return self.free

    def peak_of(self, work: Callable[[], object]) -> int:
        self.ran.append(work())
        return self.step


def config(**options: object) -> EngineConfig:
    return EngineConfig(**({"max_batch_tokens": 64, "max_sequences": 8} | options))  # type: ignore[arg-type]


def test_the_largest_step_is_kept_free() -> None:
    loaded = family("llama")
    per_block = bytes_per_block(loaded.calls, torch.float32)
    memory = ScriptedMemory(free=100 * per_block, step=40 * per_block)
    limits = decide_limits(loaded, config(), memory)
    assert len(memory.ran) == 1
    assert limits.num_blocks == 100 - 40
    assert any("kept" in line and "tokens" in line for line in limits.reasons)


class _Graph:
    def replay(self) -> None:
        """The graphs of these tests only take memory."""


@dataclass
class GraphMemory(ScriptedMemory):
    """A device where each graph that is alive takes `graph` bytes, and the first takes `pool` more.

    The code of the kernels, `code` bytes, is loaded with the first one and stays.
    """

    graph: int = 0
    pool: int = 0
    code: int = 0
    alive: "weakref.WeakSet[_Graph]" = field(default_factory=weakref.WeakSet)
    num_captured: int = 0

    def available(self) -> int:
        kept = len(self.alive) * self.graph + bool(self.alive) * self.pool
        return self.free - kept - bool(self.num_captured) * self.code

    def capture(self, work: Callable[[], Any]) -> tuple[_Graph, Any]:
        graph = _Graph()
        self.alive.add(graph)
        self.num_captured += 1
        return graph, work()


@pytest.mark.slow
def test_what_all_graphs_keep_is_measured_by_capturing_some() -> None:
    """Three sizes of decodes and one of prefills have a forward and six kinds of sampling."""
    loaded = prepared("llama", TRITON, num_hidden_layers=1)
    block = bytes_per_block(loaded.calls, torch.float32)
    memory = GraphMemory(
        100 * block, step=40 * block, graph=block // 4, pool=5 * block, code=3 * block
    )
    sizes = config(max_sequences=4, max_batch_tokens=16)
    limits = measure_limits(loaded, sizes, memory, memory.capture)
    assert memory.num_captured == 3 * 7, "a few are enough"
    assert not memory.alive, "they are given up before the cache is allocated"
    assert limits.num_blocks == 100 - 40 - 3 - (7 + 5)
    kept = 12 * block / 2**30
    assert any(f"{kept:.2f} for graphs kept, measured" in line for line in limits.reasons)


def test_an_engine_without_graphs_keeps_nothing_for_them() -> None:
    loaded = family("llama")
    block = bytes_per_block(loaded.calls, torch.float32)
    memory = ScriptedMemory(100 * block, step=40 * block)
    assert measure_limits(loaded, config(), memory).num_blocks == 60


def test_graphs_that_do_not_fit_are_refused_in_tgis_words() -> None:
    def measure(_: Limits, __: DeviceMemory) -> int:
        raise torch.OutOfMemoryError("full")

    memory = ScriptedMemory(free=1 << 40, step=0)
    with pytest.raises(LoadError, match="--max-batch-prefill-tokens"):
        decide_limits(family("llama"), config(), memory, graph_bytes=measure)


def test_the_cache_is_no_larger_than_all_sequences_can_use() -> None:
    loaded = family("llama")
    limits = decide_limits(loaded, config(), ScriptedMemory(free=1 << 40, step=MIB))
    assert limits.num_blocks == 2 * 8 * loaded.max_positions // BLOCK_SIZE


def test_a_step_that_does_not_fit_is_refused_in_tgis_words() -> None:
    class FullMemory(ScriptedMemory):
        def peak_of(self, work: Callable[[], object]) -> int:
            work()
            raise torch.OutOfMemoryError("full")

    with pytest.raises(LoadError) as caught:
        decide_limits(family("llama"), config(), FullMemory(free=MIB, step=0))
    assert str(caught.value) == (
        "Not enough memory to handle 64 prefill tokens. "
        "You need to decrease `--max-batch-prefill-tokens`"
    )


def test_a_configuration_that_does_not_fit_is_refused_with_what_would_fit() -> None:
    memory = ScriptedMemory(free=MIB, step=2 * MIB)
    with pytest.raises(LoadError, match="no room"):
        decide_limits(family("llama"), config(), memory)
    loaded = family("llama")
    some = ScriptedMemory(free=8 * bytes_per_block(loaded.calls, torch.float32), step=0)
    with pytest.raises(LoadError, match="has room for 128"):
        decide_limits(loaded, config(max_total_tokens=200), some)


def test_a_configured_number_of_blocks_needs_no_measuring() -> None:
    memory = ScriptedMemory(free=MIB, step=0)
    assert decide_limits(family("llama"), config(num_blocks=33), memory).num_blocks == 33
    assert memory.ran == []


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_the_largest_step_can_be_run_on_a_few_blocks(name: str) -> None:
    run_largest_step(family(name), num_tokens=200, num_sampled=8)


# -- the first guess was too large ---------------------------------------------------------


def load_with_room_for(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, room: int, **options: object
) -> Engine:
    """`Engine.load` on a device that runs out of memory beyond `room` blocks."""

    def build_within(loaded: LoadedModel, limits: Limits, *rest: Any) -> Any:
        if limits.num_blocks > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build_runner(loaded, limits, *rest)

    monkeypatch.setattr(engine_module, "load", lambda *_: loaded)
    monkeypatch.setattr(engine_module, "build_runner", build_within)
    return Engine.load(LoadConfig("tiny"), config(**options))


@pytest.mark.slow
def test_a_cache_that_runs_out_of_memory_is_made_smaller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load_with_room_for(monkeypatch, family("llama"), room=200)
    assert 180 <= engine.limits.num_blocks <= 200
    assert "out of memory" in caplog.text
    assert any("ran out" in line for line in engine.limits.reasons)
    request = greedy(b"once upon", 4)
    check_greedy(reference("llama"), run(engine, [(0, request)]), request)


def test_a_configured_cache_is_not_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="smaller"):
        load_with_room_for(monkeypatch, family("llama"), room=200, num_blocks=201)


def test_a_warm_up_out_of_memory_makes_the_cache_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warm_up, attempts = Engine.warm_up, []

    def fail_once(engine: Engine) -> None:
        attempts.append(engine.limits.num_blocks)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        warm_up(engine)

    monkeypatch.setattr(Engine, "warm_up", fail_once)
    load_with_room_for(monkeypatch, family("llama"), room=1 << 30)
    assert attempts[1] == attempts[0] * 9 // 10
