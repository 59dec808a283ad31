"""The engine keeps serving after any failure, and every request ends exactly once."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine import engine as engine_module
from engine.core.config import EngineConfig
from engine.core.errors import EngineDead
from engine.core.request import Failed, Finished, Request
from engine.device.stream import CpuStream, CudaStream, Stream
from engine.engine import Engine
from engine.loading.loader import LoadedModel
from engine.step.builder import StepInputs
from tests.engine.driving import Answers, check_greedy, greedy, make_engine, run
from tests.engine.fake_device import FakeDevice, FakeEvent, without_collection
from tests.engine.models import FUSED, family, prepared, reference

POISON = 255  # a token id that makes the forward raise, in the tests that want it


def sabotage(engine: Engine, fails: Callable[[StepInputs], bool], error: Exception) -> None:
    """Make the forward raise for some steps."""
    forward = engine.runner.forward

    def forward_or_raise(inputs: StepInputs) -> torch.Tensor:
        if fails(inputs):
            raise error
        return forward(inputs)

    engine.runner.forward = forward_or_raise  # type: ignore[method-assign]


def engine_on(device: FakeDevice, loaded: LoadedModel | None = None) -> Engine:
    config = EngineConfig(max_sequences=8, max_batch_tokens=64, num_blocks=128)
    return Engine(loaded or family("llama"), config, device=device)


def poisoned(inputs: StepInputs) -> bool:
    return POISON in inputs.input_ids.tolist()


def finished(answers: Answers, request: Request) -> bool:
    return isinstance(answers.last(request), Finished)


def test_a_poisoned_request_fails_alone() -> None:
    engine = make_engine(family("llama"))
    sabotage(engine, poisoned, ValueError("poison"))
    healthy = [greedy([i, i + 1, i + 2], 12) for i in range(5)]
    bad = greedy([9, POISON, 9], 12)
    answers = run(engine, [(i, r) for i, r in enumerate([*healthy, bad])])
    answers.check_endings([*healthy, bad])
    assert answers.last(bad) == Failed("ValueError: poison")
    for request in healthy:
        check_greedy(reference("llama"), answers, request)


def test_a_request_that_turns_poisonous_while_decoding_fails_alone() -> None:
    engine = make_engine(family("llama"))
    requests = [greedy([i, i + 1, i + 2], 12) for i in range(4)]
    sabotage(
        engine,
        lambda inputs: 9 in inputs.position_ids[inputs.token_slots == 2].tolist(),
        ValueError("poison"),
    )
    answers = run(engine, [(0, r) for r in requests])
    answers.check_endings(requests)
    assert [finished(answers, r) for r in requests] == [True, True, False, True]
    for request in requests[:2]:
        check_greedy(reference("llama"), answers, request)


@pytest.mark.slow
def test_a_step_that_runs_out_of_memory_is_run_in_halves() -> None:
    engine = make_engine(family("llama"))
    sabotage(
        engine,
        lambda inputs: len(inputs.sampled_slots) > 2,
        torch.OutOfMemoryError("out of memory"),
    )
    requests = [greedy([i, i + 1, i + 2], 8) for i in range(5)]
    answers = run(engine, [(0, r) for r in requests])
    answers.check_endings(requests)
    for request in requests:
        check_greedy(reference("llama"), answers, request)


@pytest.mark.parametrize(
    "parameters", [{"do_sample": True, "seed": 5}, {"repetition_penalty": 1.5}]
)
def test_a_retried_step_changes_no_answer(parameters: dict[str, object]) -> None:
    def serve(failing_steps: set[int]) -> list[list[int]]:
        engine = make_engine(family("llama"))
        sabotage(engine, lambda _: engine.num_steps in failing_steps, ValueError("once"))
        requests = [greedy([i, i + 1, i + 2], 12, **parameters) for i in range(3)]
        answers = run(engine, [(0, r) for r in requests])
        answers.check_endings(requests)
        return [answers.ids(r) for r in requests]

    assert serve({3, 11}) == serve(set())


def test_the_engine_survives_a_failure_on_the_host_side_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(family("llama"))
    request, later = greedy([1, 2, 3], 6), greedy([4, 5, 6], 6)
    build, calls = engine._builder.build, iter([True, False])

    def fail_once(batch: object) -> object:
        if next(calls, False):
            raise KeyError("inputs")
        return build(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._builder, "build", fail_once)
    answers = run(engine, [(0, request), (4, later)])
    answers.check_endings([request, later])
    assert isinstance(answers.last(request), Failed)
    assert finished(answers, later)


def test_a_token_whose_text_cannot_be_made_fails_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(family("llama"))
    bad, good = greedy([1, 2, 3], 6), greedy([4, 5, 6], 6)
    engine.add(bad)
    monkeypatch.setattr(engine._live[bad.request_id][1], "_text", None)
    answers = run(engine, [(0, good)])
    answers.check_endings([bad, good])
    assert isinstance(answers.last(bad), Failed)
    assert finished(answers, good)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_an_error_of_any_class_ends_the_engine_if_the_device_is_lost(error: Exception) -> None:
    device = FakeDevice()
    device.lost = "CUDA error: an illegal memory access was encountered"
    engine = engine_on(device)
    sabotage(engine, lambda _: True, error)
    requests = [greedy([i, 1], 4) for i in range(3)]
    with pytest.raises(EngineDead, match=r"the device is lost: .*illegal memory access"):
        run(engine, [(0, r) for r in requests])
    assert engine.num_steps <= 2  # none was tried in halves
    endings = engine.fail_all("the device is lost")
    assert [event for _, event in endings] == [Failed("the device is lost")] * 3


def test_an_error_of_a_device_that_goes_on_fails_its_request_alone() -> None:
    engine = engine_on(FakeDevice())
    sabotage(engine, poisoned, torch.AcceleratorError("CUDA error: invalid configuration"))
    good, bad = greedy([1, 2, 3], 6), greedy([9, POISON, 9], 6)
    answers = run(engine, [(0, good), (0, bad)])
    answers.check_endings([good, bad])
    assert answers.last(bad) == Failed("AcceleratorError: CUDA error: invalid configuration")
    check_greedy(reference("llama"), answers, good)


def test_a_failed_step_is_logged_with_where_it_failed(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(family("llama"))
    sabotage(engine, poisoned, ValueError("poison"))
    run(engine, [(0, greedy([9, POISON], 6))])
    assert "a step failed: " in caplog.text
    assert "ValueError: poison" in caplog.text
    assert "forward_or_raise" in caplog.text  # a function of the traceback


# -- what a failed step keeps --------------------------------------------------------------


class Activations:
    """Has a layer of the model fail half way, and knows which of its tensors are alive."""

    def __init__(self, engine: Engine, error: Exception, fails: Callable[[], bool]):
        self._engine, self._error, self._fails = engine, error, fails
        self._refs: list[weakref.ref[torch.Tensor]] = []
        self.left: list[int] = []
        """How many tensors of failed forwards were alive when the next forward began."""

    def __call__(self, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not self._fails():
            return
        activation = args[0] * 2
        self._refs += [weakref.ref(args[0]), weakref.ref(activation)]
        raise self._error

    def count(self, *_: object) -> None:
        if self._refs:
            self.left.append(sum(ref() is not None for ref in self._refs))


@pytest.mark.parametrize(
    "error", [ValueError("no"), torch.OutOfMemoryError("CUDA out of memory")], ids=repr
)
@pytest.mark.parametrize("stream", [CpuStream, CudaStream])
def test_a_failed_step_is_freed_before_the_next_forward(
    stream: Callable[[], Stream], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the next step is launched before the failed one is looked at."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(engine_module, "make_stream", lambda _: stream())
    loaded = prepared("llama", FUSED, num_hidden_layers=2)
    engine = engine_on(FakeDevice(), loaded)
    activations = Activations(engine, error, lambda: 1 < engine.num_steps < 4)
    layers: Any = loaded.model.model.layers
    layers[1].mlp.down_proj.register_forward_pre_hook(activations)
    loaded.model.register_forward_pre_hook(activations.count)
    requests = [greedy([i, i + 1], 8) for i in range(4)]
    with without_collection():
        answers = run(engine, [(0, r) for r in requests])
    answers.check_endings(requests)
    assert set(activations.left) == {0}


def test_a_forward_that_breaks_off_leaves_no_result_in_merged_linears() -> None:
    loaded = prepared("llama", FUSED, num_hidden_layers=1)
    engine = make_engine(loaded)
    layers: Any = loaded.model.model.layers
    inputs: list[weakref.ref[torch.Tensor]] = []

    def fail(_: object, args: tuple[torch.Tensor], __: object) -> None:
        inputs.append(weakref.ref(args[0]))
        raise ValueError("between a merged linear and the next")

    hook = layers[0].self_attn.q_proj.register_forward_hook(fail)
    run(engine, [(0, greedy([1, 2], 3))])
    hook.remove()
    assert [ref() for ref in inputs] == [None] * len(inputs) != []
    again = greedy([1, 2], 3)
    check_greedy(reference("llama", num_hidden_layers=1), run(engine, [(0, again)]), again)


def test_memory_is_freed_after_it_ran_out_and_only_then() -> None:
    for error, is_freed in [
        (ValueError("no"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
    ]:
        device = FakeDevice()
        engine = engine_on(device)
        sabotage(engine, poisoned, error)
        run(engine, [(0, greedy([POISON], 2))])
        assert bool(device.num_freed) is is_freed


@pytest.mark.parametrize("steps", range(7))
def test_an_abort_in_any_phase_frees_everything_at_once(steps: int) -> None:
    """The request waits, is in mid-prefill, decodes, or has its last token in flight."""
    engine = make_engine(family("llama"), max_batch_tokens=16)
    request = greedy(range(40), 3)
    engine.add(request)
    for _ in range(steps):
        engine.step()
    engine.abort(request.request_id)
    engine.abort(request.request_id)
    assert engine.figures().num_used_blocks == 0
    assert run(engine, []).events == {}


def test_blocks_of_a_cancelled_request_stay_usable() -> None:
    engine = make_engine(family("llama"))
    cancelled, again = greedy(range(50), 20), greedy(range(50), 5)
    answers = run(engine, [(0, cancelled), (8, again)], aborts={7: cancelled})
    check_greedy(reference("llama"), answers, again)
    assert engine.figures().num_prefix_hit_tokens == 48
