"""What fails on the device: it runs out of memory, refuses a capture, or says that it is lost."""

import gc
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from engine import engine as engine_module
from engine.attention.kv_cache import bytes_per_block, unbind_kv_cache
from engine.core.config import EngineConfig, LoadConfig
from engine.device.device import CudaDevice
from engine.engine import Engine
from engine.loading import sizing
from engine.loading.loader import LoadedModel
from engine.step.builder import StepInputs
from tests.engine.driving import greedy, run
from tests.engine.models import prepared

GIB = 1 << 30


@cache
def loaded() -> LoadedModel:
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
    }
    return prepared("llama", device="cuda", dtype=torch.bfloat16, **sizes)


def make_engine(cuda_graphs: bool = True) -> Engine:
    config = EngineConfig(
        max_sequences=16, max_batch_tokens=256, num_blocks=256, cuda_graphs=cuda_graphs
    )
    return Engine(loaded(), config)


def before_forward(engine: Engine, hook: Callable[[StepInputs], None]) -> None:
    """Have `hook` run in each forward that is launched kernel by kernel, or captured."""
    forward = engine.runner.forward

    def hooked(inputs: StepInputs) -> torch.Tensor:
        hook(inputs)
        return forward(inputs)

    engine.runner.forward = hooked  # type: ignore[method-assign]


def expected(prompt: bytes) -> list[int]:
    request = greedy(prompt, 12)
    return run(make_engine(), [(0, request)]).ids(request)


def test_a_forward_that_waits_is_never_captured_and_the_allocator_stays_sound(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, request = make_engine(), greedy(b"once upon a time", 12)
    before_forward(engine, lambda inputs: inputs.input_ids.sum().item())  # type: ignore[arg-type]
    assert run(engine, [(0, request)]).ids(request) == expected(b"once upon a time")
    assert any("kernel by kernel" in line for line in caplog.messages)
    assert any("synchroniz" in line for line in caplog.messages)
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.empty_cache()  # raises, after a capture that broke off (torch 2.11)
    captured = make_engine()
    assert captured.capture_next_graph()
    again = greedy(b"once upon a time", 12)
    assert run(captured, [(0, again)]).ids(again) == expected(b"once upon a time")


def test_waits_are_refused_only_in_a_trial() -> None:
    device, x = CudaDevice(torch.device("cuda")), torch.ones(3, device="cuda")
    for wait in (x.sum().item, x.nonzero, x.cpu, x.tolist, lambda: torch.ones(3).to("cuda")):
        with pytest.raises(RuntimeError, match="synchronizing"), device.refusing_waits():
            wait()
        wait()
    with device.refusing_waits():
        assert (x * 2).is_cuda


def test_out_of_memory_in_a_capture_gives_up_that_shape_alone() -> None:
    engine = make_engine()
    too_large = engine._builder.graph_shapes[-1]

    def run_out(inputs: StepInputs) -> None:
        if torch.cuda.is_current_stream_capturing() and len(inputs.sampled_slots) == too_large.rows:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    before_forward(engine, run_out)
    while engine.capture_next_graph():
        pass
    refused = [
        shape for shape in engine._builder.graph_shapes if not engine.runner._captures.allow(shape)
    ]
    assert refused == [too_large]
    torch.cuda.empty_cache()
    request = greedy(b"once upon a time", 12)
    assert run(engine, [(0, request)]).ids(request) == expected(b"once upon a time")


def test_out_of_memory_in_a_step_frees_what_the_step_had() -> None:
    """A step that takes most of the memory fails, and its halves have all of it again."""
    engine = make_engine(cuda_graphs=False)  # whose padding would make the halves as large
    requests = [greedy([i, i + 1, i + 2], 6) for i in range(4)]
    held: list[weakref.ref[torch.Tensor]] = []
    num_failed = 0

    def take_most(inputs: StepInputs) -> None:
        nonlocal num_failed
        if len(inputs.input_ids) < 8:
            return
        num_failed += 1
        assert [ref() for ref in held] == [None] * len(held)
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(free * 3 // 4, dtype=torch.uint8, device="cuda")
        held.append(weakref.ref(hog))
        torch.empty(free * 3 // 4, dtype=torch.uint8, device="cuda")

    before_forward(engine, take_most)
    answers = run(engine, [(0, request) for request in requests])
    answers.check_endings(requests)
    assert [len(answers.ids(request)) for request in requests] == [6] * 4
    assert num_failed


def test_a_cache_that_does_not_fit_is_a_tenth_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is asked for a cache of 1.05 times what is free, some 4 GiB."""
    model = loaded()
    unbind_kv_cache(model.calls)
    gc.collect()
    torch.cuda.empty_cache()
    ballast = torch.empty(torch.cuda.mem_get_info()[0] - 4 * GIB, dtype=torch.uint8, device="cuda")
    free, _ = torch.cuda.mem_get_info()
    asked = int(free * 1.05) // bytes_per_block(model.calls, torch.bfloat16)
    monkeypatch.setattr(sizing, "_cache_bytes", lambda *_: (int(free * 1.05), "forced"))
    monkeypatch.setattr(sizing, "_useful_blocks", lambda fitting, *_: fitting)
    monkeypatch.setattr(engine_module, "load", lambda *_: model)
    config = EngineConfig(max_batch_tokens=256, max_sequences=16)
    engine = Engine.load(LoadConfig("tiny"), config)
    assert engine.limits.num_blocks >= asked * 8 // 10
    request = greedy(b"once upon a time", 12)
    assert len(run(engine, [(0, request)]).ids(request)) == 12
    del ballast


def test_an_error_that_the_device_survives_fails_its_request_alone() -> None:
    engine = make_engine(cuda_graphs=False)
    good, bad = greedy(b"once upon a time", 6), greedy([7] * 20, 6)

    def launch_impossibly(inputs: StepInputs) -> None:
        if 7 in inputs.input_ids.tolist():
            raise torch.AcceleratorError("CUDA error: invalid configuration argument")

    before_forward(engine, launch_impossibly)
    answers = run(engine, [(0, good), (0, bad)])
    assert [len(answers.ids(request)) for request in (good, bad)] == [6, 0]


def test_every_kind_of_sampling_passes_the_trial() -> None:
    engine = make_engine()
    sampler = engine.runner.sampler
    for kind in sampler.usual_kinds + sampler.rare_kinds:
        step = engine._builder.empty(engine._builder.graph_shapes[-1], kind)
        engine.runner.launch(step).result()
        assert not engine.runner.needs_capture(step)
