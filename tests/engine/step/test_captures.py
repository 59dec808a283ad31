"""Which steps are captured: none that waits for the device, and none while memory is short."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from engine.attention.plan import GraphShape
from engine.core.config import EngineConfig
from engine.core.errors import EngineDead
from engine.core.request import Failed
from engine.engine import Engine
from engine.step import captures as captures_module
from engine.step.builder import StepInputs
from engine.step.captures import Captures
from kernels.ops import TRITON
from tests.engine.driving import check_greedy, greedy, run
from tests.engine.fake_device import NO_MEMORY, FakeDevice, captures_greedy_steps
from tests.engine.models import VOCAB_SIZE, family, prepared, reference

DECODES, MORE_DECODES = GraphShape(4, 4), GraphShape(8, 8)
PREFILLS = GraphShape(16, 16, prefills=True)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING):
        yield


def allowed(captures: Captures) -> list[bool]:
    return [captures.allow(shape) for shape in (DECODES, MORE_DECODES, PREFILLS)]


# -- steps are tried before they are captured ----------------------------------------------


def test_a_step_that_waits_for_the_device_is_run_and_never_captured(
    device: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> str:
        device.wait()
        return "done"

    captures = Captures(device)
    assert captures.try_out(DECODES, work) == "done"
    assert allowed(captures) == [False, False, False]
    (line,) = caplog.messages
    assert line.startswith("decodes and prefills are launched kernel by kernel")
    assert "synchronizing" in line


def test_a_prefill_that_waits_leaves_decodes_to_be_captured(device: FakeDevice) -> None:
    captures = Captures(device)
    captures.try_out(PREFILLS, device.wait)
    assert allowed(captures) == [True, True, False]


def test_a_step_that_waits_for_nothing_runs_once(device: FakeDevice) -> None:
    ran: list[int] = []
    captures = Captures(device)
    captures.try_out(DECODES, lambda: ran.append(1))
    assert ran == [1]
    assert allowed(captures) == [True, True, True]


@pytest.mark.parametrize("error", [ValueError("poison"), RuntimeError("poison"), NO_MEMORY])
def test_an_error_of_the_step_itself_says_nothing_of_graphs(
    device: FakeDevice, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        raise error

    captures = Captures(device)
    with pytest.raises(type(error), match=str(error)):
        captures.try_out(DECODES, work)
    assert allowed(captures) == [True, True, True]
    assert caplog.messages == []


def test_what_is_not_to_be_captured_may_wait(device: FakeDevice) -> None:
    captures = Captures(device)
    captures.try_out(DECODES, device.wait)
    ran: list[int] = []
    captures.try_out(DECODES, lambda: ran.append(1))
    assert ran == [1]


# -- captures that fail --------------------------------------------------------------------


def fail(error: Exception) -> None:
    raise error


def test_out_of_memory_gives_up_one_shape_for_a_while(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captures = Captures(device)
    captures.attempt(MORE_DECODES, lambda: fail(NO_MEMORY))
    assert allowed(captures) == [True, False, True]
    (line,) = caplog.messages
    assert "no graph of decodes of 8 tokens" in line
    assert "out of memory" in line
    monkeypatch.setattr(captures_module, "_RETRY_S", 0.0)
    captures.attempt(DECODES, lambda: fail(NO_MEMORY))
    assert captures.allow(DECODES)


def test_another_error_gives_up_steps_of_that_kind(device: FakeDevice) -> None:
    captures = Captures(device)
    refused = torch.AcceleratorError("CUDA error: operation not permitted when capturing")
    captures.attempt(PREFILLS, lambda: fail(refused))
    assert allowed(captures) == [True, True, False]


@pytest.mark.parametrize(
    "error",
    [
        NO_MEMORY,
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_a_lost_device_is_never_reported_as_a_missing_graph(
    device: FakeDevice, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    device.lost = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Captures(device).attempt(DECODES, lambda: fail(error))
    assert caplog.messages == []


# -- the engine ----------------------------------------------------------------------------


def make_engine(device: FakeDevice) -> Engine:
    config = EngineConfig(max_sequences=8, max_batch_tokens=64, num_blocks=64)
    engine = Engine(family("llama"), config, capture=device.capture, device=device)
    return captures_greedy_steps(engine)


Hook = Callable[[StepInputs], None]


def before_forward(engine: Engine, hook: Hook) -> None:
    """Have `hook` run in each forward."""
    forward = engine.runner.forward

    def hooked(inputs: StepInputs) -> torch.Tensor:
        hook(inputs)
        return forward(inputs)

    engine.runner.forward = hooked  # type: ignore[method-assign]


def capture_all(engine: Engine, hook: Hook) -> None:
    """Capture all graphs of a model that does nothing but run `hook`."""

    def forward(inputs: StepInputs) -> torch.Tensor:
        hook(inputs)
        return torch.zeros(len(inputs.kept_rows), VOCAB_SIZE)

    engine.runner.forward = forward  # type: ignore[method-assign]
    while engine.capture_next_graph():
        pass


@pytest.mark.slow
def test_a_model_that_waits_is_served_kernel_by_kernel_and_no_capture_is_begun(
    device: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(max_sequences=8, max_batch_tokens=64, num_blocks=64)
    loaded = prepared("llama", TRITON, num_hidden_layers=1)
    engine = Engine(loaded, config, capture=device.capture, device=device)
    before_forward(engine, lambda _: device.wait())
    requests = [greedy(b"once upon", 3), greedy(b"a", 3)]
    answers = run(engine, [(i, request) for i, request in enumerate(requests)])
    for request in requests:
        check_greedy(reference("llama", num_hidden_layers=1), answers, request)
    assert (device.captured, device.spoilt) == (0, False)
    assert len([line for line in caplog.messages if "kernel by kernel" in line]) == 2


def test_an_idle_engine_that_cannot_capture_waits_for_requests(
    device: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(device)
    capture_all(engine, lambda _: device.wait())
    assert (device.captured, device.spoilt) == (0, False)
    (line,) = caplog.messages
    assert "kernel by kernel" in line


def test_an_idle_engine_survives_that_a_step_of_padding_fails(
    device: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(device)
    capture_all(engine, lambda _: fail(NO_MEMORY))
    assert "out of memory" in caplog.text
    assert device.num_freed == 1
    assert device.captured == 0


def test_an_idle_engine_captures_what_still_fits(device: FakeDevice) -> None:
    engine = make_engine(device)
    too_large = engine._builder.graph_shapes[-1]

    def run_out(inputs: StepInputs) -> None:
        if device._captures and len(inputs.input_ids) == too_large.tokens:
            fail(NO_MEMORY)

    capture_all(engine, run_out)
    allow = engine.runner._captures.allow
    assert [s for s in engine._builder.graph_shapes if not allow(s)] == [too_large]
    assert device.captured > 0
    assert not device.spoilt


def test_a_device_lost_in_a_capture_ends_an_idle_engine(device: FakeDevice) -> None:
    engine = make_engine(device)

    def lose(_: StepInputs) -> None:
        if device._captures:
            device.lost = "CUDA error: an illegal memory access was encountered"
            raise torch.AcceleratorError(device.lost)

    with pytest.raises(EngineDead, match="the device is lost"):
        capture_all(engine, lose)


def test_a_device_lost_in_a_capture_ends_the_engine_that_serves(device: FakeDevice) -> None:
    engine = make_engine(device)

    def lose(_: StepInputs) -> None:
        if device._captures:
            device.lost = "CUDA error: an illegal memory access was encountered"
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access")

    before_forward(engine, lose)
    with pytest.raises(EngineDead, match="the device is lost"):
        run(engine, [(0, greedy([1, 2], 3))])
    assert [type(event) for _, event in engine.fail_all("lost")] == [Failed]


def test_the_time_of_a_step_that_captured_says_nothing_about_others(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each new size of step would make the chunks of prompts small for a while."""
    engine = make_engine(device)
    observed: list[int] = []
    monkeypatch.setattr(
        engine.pipeline.prefill_budget, "observe", lambda *of_step: observed.append(of_step[0])
    )
    request = greedy([1, 2, 3], 6)
    assert len(run(engine, [(0, request)]).ids(request)) == 6
    assert device.captured == 2 * 2, "a prefill and a decode, forward and sampling each"
    assert len(observed) == 4, "the decodes after the first"
