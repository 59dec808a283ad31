"""A server without work captures graphs, and whatever happens to that, it goes on."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from engine.core.config import EngineConfig
from engine.core.request import Finished
from engine.engine import Engine
from engine.step.builder import StepInputs
from tests.engine.driving import greedy
from tests.engine.fake_device import NO_MEMORY, FakeDevice, captures_greedy_steps
from tests.engine.models import VOCAB_SIZE, family
from tests.engine.test_async_engine import answer, eventually, serving

pytestmark = pytest.mark.anyio


def engine_that_computes_nothing(device: FakeDevice, hook: Callable[[], None]) -> Engine:
    """Return an engine whose forward runs `hook`, and knows one token."""
    config = EngineConfig(max_sequences=8, max_batch_tokens=64, num_blocks=64)
    engine = Engine(family("llama"), config, capture=device.capture, device=device)

    def forward(inputs: StepInputs) -> torch.Tensor:
        hook()
        return torch.zeros(len(inputs.kept_rows), VOCAB_SIZE)

    engine.runner.forward = forward  # type: ignore[method-assign]
    return captures_greedy_steps(engine)


@pytest.mark.parametrize("error", [NO_MEMORY, ValueError("in a step of padding")], ids=repr)
async def test_a_server_whose_captures_fail_serves_its_requests(error: Exception) -> None:
    failures = iter([error])

    def fail_at_first() -> None:
        if failure := next(failures, None):
            raise failure

    async with serving(engine_that_computes_nothing(FakeDevice(), fail_at_first)) as served:
        await eventually(lambda: served.is_prepared)
        assert isinstance((await answer(served, greedy([1, 2], 3)))[-1], Finished)
        assert served.status().state == "ready"


async def test_a_capture_that_hangs_while_there_is_no_work_is_a_stall() -> None:
    release = threading.Event()

    def hang() -> None:
        release.wait(10)

    engine = engine_that_computes_nothing(FakeDevice(), hang)
    async with serving(engine, stall_timeout_s=0.1) as served:
        await eventually(lambda: served.status().state == "stalled")
        release.set()
        await eventually(lambda: served.is_prepared)
        assert served.status().state == "ready"


async def test_a_server_that_waits_for_requests_is_not_stalled() -> None:
    engine = engine_that_computes_nothing(FakeDevice(), lambda: None)
    async with serving(engine, stall_timeout_s=0.1) as served:
        await eventually(lambda: served.is_prepared)
        time.sleep(0.3)
        assert served.status().state == "ready"


async def test_a_device_lost_while_there_is_no_work_is_reported() -> None:
    device = FakeDevice()

    def lose() -> None:
        device.lost = "CUDA error: an illegal memory access was encountered"
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    async with serving(engine_that_computes_nothing(device, lose)) as served:
        await eventually(lambda: served.status().state == "dead")
        assert "illegal memory access" in (served.status().reason or "")
