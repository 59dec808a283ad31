"""A cache that does not fit is made a tenth smaller, in the memory that the failed one gives back.

The device of these tests counts the bytes of every KV cache that is alive, and has room for only
so many. What a failed engine keeps is missing to the next.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine import engine as engine_module
from engine.attention import kv_cache
from engine.attention.kv_cache import bytes_per_block
from engine.core.config import EngineConfig, LoadConfig
from engine.core.errors import LoadError
from engine.engine import Engine
from engine.loading import sizing
from engine.loading.loader import LoadedModel
from engine.loading.sizing import Limits
from engine.step.builder import StepInputs
from engine.step.runner import build_runner
from tests.engine.driving import check_greedy, greedy, run
from tests.engine.models import family, reference

Engines = list["weakref.ref[Engine]"]

ASKED = 2 * 8 * 256 // 16  # blocks that the engine asks for at first


class Room:
    """Stands for torch in `engine.attention.kv_cache`, with room for so many bytes of tensors."""

    def __init__(self, num_bytes: int):
        self.free = num_bytes

    def empty(self, *shape: int, **options: Any) -> torch.Tensor:
        tensor = torch.empty(*shape, **options)
        storage = tensor.untyped_storage()
        if storage.nbytes() > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self._take(storage.nbytes())
        weakref.finalize(storage, self._take, -storage.nbytes())
        return tensor

    def _take(self, num_bytes: int) -> None:
        self.free -= num_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def loaded() -> Iterator[LoadedModel]:
    model = family("llama")
    kv_cache.unbind_kv_cache(model.calls)
    yield model
    kv_cache.unbind_kv_cache(model.calls)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    """The engines that were begun. When one is, no other is alive."""
    begun: list[weakref.ref[Engine]] = []
    init = Engine.__init__

    def begin(engine: Engine, *args: Any) -> None:
        assert [ref() for ref in begun] == [None] * len(begun)
        begun.append(weakref.ref(engine))
        init(engine, *args)

    monkeypatch.setattr(Engine, "__init__", begin)
    return begun


def load(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, num_blocks: float) -> Engine:
    """Load an engine on a device with room for a KV cache of so many blocks."""
    room = Room(int(num_blocks * bytes_per_block(loaded.calls, torch.float32)))
    monkeypatch.setattr(kv_cache, "torch", room)
    monkeypatch.setattr(engine_module, "load", lambda *_: loaded)
    config = EngineConfig(max_batch_tokens=64, max_sequences=8)
    return Engine.load(LoadConfig("tiny"), config)


def test_a_cache_that_does_not_fit_is_a_tenth_smaller(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, engines: Engines
) -> None:
    """The values do not fit beside the keys, in the constructor."""
    engine = load(monkeypatch, loaded, 0.95 * ASKED)
    assert len(engines) == 2
    assert engine.limits.num_blocks == ASKED * 9 // 10
    request = greedy(b"once upon", 4)
    check_greedy(reference("llama"), run(engine, [(0, request)]), request)


@pytest.mark.slow
def test_it_is_as_large_as_fits_within_a_tenth(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, engines: Engines
) -> None:
    engine = load(monkeypatch, loaded, 0.5 * ASKED)
    assert 0.45 * ASKED < engine.limits.num_blocks <= 0.5 * ASKED
    assert len(engines) == 8


def test_a_warm_up_that_runs_out_gives_its_whole_cache_back(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, engines: Engines
) -> None:
    """The first engine was built, and its cache is all that there is room for."""
    warm_up = Engine.warm_up

    def warm_up_in_less(engine: Engine) -> None:
        warm_up(engine)
        if engine.limits.num_blocks == ASKED:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "warm_up", warm_up_in_less)
    engine = load(monkeypatch, loaded, ASKED)
    assert len(engines) == 2
    assert engine.limits.num_blocks == ASKED * 9 // 10


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=repr,
)
def test_a_forward_that_runs_out_in_the_warm_up_gives_its_whole_cache_back(
    error: Exception, monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, engines: Engines
) -> None:
    """The engine gives up the request of the warm-up, as it would any other."""

    def build_with_little_room(loaded: LoadedModel, limits: Limits, *rest: Any) -> Any:
        builder, runner = build_runner(loaded, limits, *rest)
        forward = runner.forward

        def run_out(inputs: StepInputs) -> torch.Tensor:
            if limits.num_blocks == ASKED:
                raise error
            return forward(inputs)

        runner.forward = run_out  # type: ignore[method-assign]
        return builder, runner

    monkeypatch.setattr(engine_module, "build_runner", build_with_little_room)
    engine = load(monkeypatch, loaded, ASKED)
    assert len(engines) == 2
    assert engine.limits.num_blocks == ASKED * 9 // 10


@pytest.mark.slow
def test_an_engine_that_fits_nowhere_is_a_load_error(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, engines: Engines
) -> None:
    monkeypatch.setattr(sizing, "run_largest_step", lambda *_: None)
    with pytest.raises(LoadError, match="out of memory with a KV cache of"):
        load(monkeypatch, loaded, 0)
    assert len(engines) > 8
