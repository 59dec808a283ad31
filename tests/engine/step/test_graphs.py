"""A step is replayed as a graph: the same operations on the same memory, without Python.

Without a GPU the graph is a recording of the step's operations, which replays only those: a
value that a step decides in Python would be repeated wrongly, just as by a CUDA graph.
"""

import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from engine import engine as engine_module
from engine.core.config import EngineConfig
from engine.core.request import (
    Finished,
    Request,
    SamplingParams,
    StoppingParams,
)
from engine.device.stream import CpuStream
from engine.engine import Engine
from engine.loading.loader import LoadedModel
from engine.step.graphs import Graph
from engine.text.grammar import GrammarCompiler
from kernels import fused_sampling
from kernels.ops import TRITON
from tests.engine.driving import Answers, check_greedy, greedy, run
from tests.engine.models import VOCAB_SIZE, prepared, reference
from tests.engine.recording import HostWaits, Recording, capture, recorded, recorded_kernel

T = TypeVar("T")
PADDED = 1e-5
"""How far logprobs may differ because a graph's step is padded: for another number of rows the
CPU's matrix product adds in another order, a few last bits of float32.
"""
LAYERS = (1, 2)
PROMPTS = [list(b"once upon a time"), list(b"the quick brown fox jumps over"), list(b"a")]


@cache
def fused(name: str, num_layers: int = 2) -> LoadedModel:
    """Return a model on the Triton kernels, each of them one operation of a recording."""
    return prepared(name, recorded(TRITON), num_hidden_layers=num_layers)


@pytest.fixture(autouse=True)
def recorded_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("greedy", "sample"):
        kernel = getattr(fused_sampling, name)
        monkeypatch.setattr(fused_sampling, name, recorded_kernel(kernel))


def engine(loaded: LoadedModel, with_graphs: bool) -> Engine:
    config = EngineConfig(max_sequences=8, max_batch_tokens=64, num_blocks=64)
    return Engine(loaded, config, capture=capture if with_graphs else None)


def mixed_requests() -> list[Request]:
    """Return requests with every kind of sampling, for one batch."""
    kinds = [
        SamplingParams(logprobs=True),
        SamplingParams(do_sample=True, temperature=0.8, seed=7, logprobs=True),
        SamplingParams(do_sample=True, top_k=9, top_p=0.9, seed=8, top_n_tokens=3, logprobs=True),
        SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, logprobs=True),
        SamplingParams(presence_penalty=1.5, logprobs=True),
        SamplingParams(output_frequency_penalty=1.5, raw_logprobs=True, logprobs=True),
        SamplingParams(do_sample=True, seed=9, raw_logprobs=True, top_n_tokens=2, logprobs=True),
    ]
    return [
        Request(
            f"mixed-{i}", list(b"say it again, say it"), kind, StoppingParams(6, ignore_eos=True)
        )
        for i, kind in enumerate(kinds)
    ]


def answers(loaded: LoadedModel, requests: list[Request], with_graphs: bool) -> Answers:
    return run(engine(loaded, with_graphs), [(2 * i, r) for i, r in enumerate(requests)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_replayed_steps_give_the_models_own_tokens(name: str) -> None:
    requests = [greedy(prompt, 6) for prompt in PROMPTS]
    replayed = answers(fused(name), requests, with_graphs=True)
    for request in requests:
        check_greedy(reference(name, num_hidden_layers=2), replayed, request)


@pytest.mark.slow
def test_replayed_and_eager_steps_agree_in_every_kind_of_sampling() -> None:
    loaded, requests = fused("llama"), mixed_requests()
    eager = answers(loaded, requests, with_graphs=False)
    replayed = answers(loaded, requests, with_graphs=True)
    for request in requests:
        assert isinstance(replayed.last(request), Finished)
        assert replayed.ids(request) == eager.ids(request)
        assert replayed.logprobs(request) == pytest.approx(eager.logprobs(request), abs=PADDED)


def guided(loaded: LoadedModel) -> list[Request]:
    """Return requests with grammars, and one without.

    Words that a grammar forces are computed in chunks of several tokens, without a graph.
    """
    grammars = GrammarCompiler(loaded.tokenizer, VOCAB_SIZE, loaded.eos_token_ids)
    sampling = SamplingParams(do_sample=True, seed=3, logprobs=True)
    patterns = ["[a-f]{6}", "[0-9]{2} is the answer, [xyz]{3}"]
    return [
        *(
            Request(p, PROMPTS[0], sampling, StoppingParams(40), grammar=grammars.regex(p))
            for p in patterns
        ),
        greedy(PROMPTS[1], 10),
    ]


def watermarked(_: LoadedModel) -> list[Request]:
    kinds = [
        SamplingParams(watermark=True, logprobs=True),
        SamplingParams(watermark=True, do_sample=True, seed=5, top_k=9, logprobs=True),
        SamplingParams(logprobs=True),
    ]
    return [
        Request(f"marked-{i}", PROMPTS[0], kind, StoppingParams(4, ignore_eos=True))
        for i, kind in enumerate(kinds)
    ]


def biased(_: LoadedModel) -> list[Request]:
    bias = ((ord("a"), 4.0), (ord("b"), -100.0))
    kinds = [
        SamplingParams(logit_bias=bias, logprobs=True),
        SamplingParams(logit_bias=bias, do_sample=True, seed=6, temperature=0.9, logprobs=True),
        SamplingParams(logprobs=True),
    ]
    return [
        Request(f"biased-{i}", PROMPTS[0], kind, StoppingParams(4, ignore_eos=True))
        for i, kind in enumerate(kinds)
    ]


def reporting_raw(
    make: Callable[[LoadedModel], list[Request]],
) -> Callable[[LoadedModel], list[Request]]:
    """Have all but the last report the model's own logprobs, which needs its logits unchanged."""

    def make_raw(loaded: LoadedModel) -> list[Request]:
        *requests, last = make(loaded)
        return [
            *(replace(r, sampling=replace(r.sampling, raw_logprobs=True)) for r in requests),
            last,
        ]

    return make_raw


KINDS = {
    "masks": guided,
    "watermarks": watermarked,
    "biases": biased,
    "masks, raw": reporting_raw(guided),
    "watermarks, raw": reporting_raw(watermarked),
    "biases, raw": reporting_raw(biased),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_masks_watermarks_and_biases_are_applied_around_replayed_graphs(
    make: Callable[[LoadedModel], list[Request]],
) -> None:
    """They change a graph's own logits, which the next replay overwrites, or a copy of them."""
    loaded, requests = fused("llama", 1), make(fused("llama", 1))
    eager = answers(loaded, requests, with_graphs=False)
    replayed = answers(loaded, requests, with_graphs=True)
    for request in requests:
        assert replayed.ids(request) == eager.ids(request) != []
        assert replayed.logprobs(request) == pytest.approx(eager.logprobs(request), abs=PADDED)
        if request.grammar is not None:
            finished = replayed.last(request)
            assert isinstance(finished, Finished)
            assert re.fullmatch(request.request_id, finished.generated_text)
    check_greedy(reference("llama", num_hidden_layers=1), replayed, requests[-1])


@pytest.mark.slow
def test_capturing_every_graph_ahead_changes_no_answer() -> None:
    ahead = engine(fused("llama"), with_graphs=True)
    while ahead.capture_next_graph():
        pass
    sampler = ahead.runner.sampler
    steps = [
        ahead._builder.empty(shape, kind)
        for shape in ahead._builder.graph_shapes
        for kind in sampler.usual_kinds + sampler.rare_kinds
    ]
    assert not any(ahead.runner.needs_capture(step) for step in steps)
    request = greedy(PROMPTS[0], 3)
    check_greedy(reference("llama", num_hidden_layers=2), run(ahead, [(0, request)]), request)


@pytest.mark.slow
def test_no_kind_of_sampling_is_captured_while_requests_wait() -> None:
    loaded, captured = fused("llama", 1), []

    def remember(work: Callable[[], T]) -> tuple[Graph, T]:
        captured.append(work)
        return capture(work)

    config = EngineConfig(max_sequences=2, max_batch_tokens=16, num_blocks=64)
    ahead = Engine(loaded, config, capture=remember)
    while ahead.capture_next_graph():
        pass
    assert captured
    captured.clear()
    makers = (guided, watermarked, biased, reporting_raw(biased))
    for request in [*mixed_requests(), *(make(loaded)[0] for make in makers)]:
        short = replace(request, stopping=StoppingParams(2, ignore_eos=True))
        assert isinstance(run(ahead, [(0, short)]).last(short), Finished)
    assert captured == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "warned"),
    [
        pytest.param(PROMPTS[0], ["prefills", "decodes"], id="a prefill first"),
        pytest.param(PROMPTS[2], ["decodes and prefills"], id="a decode first"),
    ],
)
def test_a_step_that_cannot_be_captured_runs_kernel_by_kernel(
    prompt: list[int], warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Callable[[], T]) -> tuple[Graph, T]:
        raise RuntimeError("operation not permitted when stream is capturing")

    config = EngineConfig(max_sequences=8, max_batch_tokens=64, num_blocks=64)
    request = greedy(prompt, 3)
    answers = run(Engine(fused("llama"), config, capture=refuse), [(0, request)])
    check_greedy(reference("llama", num_hidden_layers=2), answers, request)
    warnings = [record.message for record in caplog.records if "kernel by kernel" in record.message]
    assert [message.partition(" are launched ")[0] for message in warnings] == warned


@pytest.mark.slow
def test_prompts_that_arrive_while_others_decode_are_replayed_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompts are short, or a cached prefix leaves little of them."""
    prepared = engine(fused("gemma2"), with_graphs=True)
    while prepared.capture_next_graph():
        pass
    monkeypatch.setattr(prepared.runner, "forward", None)  # any step without a graph fails
    long = list(range(60, 100))
    prompts = [*PROMPTS, long, [*long, 1, 2], PROMPTS[1]]
    requests = [greedy(prompt, 5) for prompt in prompts]
    replayed = run(prepared, [(2 * i, request) for i, request in enumerate(requests)])
    assert prepared.figures().num_prefix_hit_tokens > 0
    for request in requests:
        check_greedy(reference("gemma2", num_hidden_layers=2), replayed, request)


@pytest.mark.slow
def test_forks_are_replayed_from_their_leaders_logits() -> None:
    loaded = fused("llama")
    sampling = SamplingParams(do_sample=True, seed=1, logprobs=True)
    leader, *forks = (
        Request(
            f"fork-{i}", PROMPTS[1], replace(sampling, seed=i), StoppingParams(4, ignore_eos=True)
        )
        for i in range(3)
    )
    said = [
        run(engine(loaded, with_graphs), [(0, [leader, *forks])]) for with_graphs in (False, True)
    ]
    for request in (leader, *forks):
        assert said[0].ids(request) == said[1].ids(request) != []


def decode_recording(num_layers: int) -> Recording:
    """Return the recording of one decode step's forward."""
    recordings = []

    def remember(work: Callable[[], T]) -> tuple[Graph, T]:
        recording, result = capture(work)
        recordings.append(recording)
        return recording, result

    config = EngineConfig(max_sequences=4, max_batch_tokens=64, num_blocks=64)
    assert Engine(fused("llama", num_layers), config, capture=remember).capture_next_graph()
    return recordings[0]


class _Calls(TorchDispatchMode):
    """Counts the calls of torch by name. A replay counts as one, whatever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def capture(self, work: Callable[[], T]) -> tuple[Graph, T]:
        recording, result = capture(work)
        replay = recording.replay

        def counted() -> None:
            self.counts["replay"] += 1
            with _disable_current_modes():
                replay()

        recording.replay = counted  # type: ignore[method-assign]
        return recording, result


class _AtOnce(CpuStream):
    """Runs what is launched in the thread that launches it, where its calls are counted."""

    def launch(self, work: Callable[[], T]) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(work())
        return done


@pytest.mark.slow
def test_a_decode_step_calls_torch_seven_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call may hand the interpreter's lock to the event loop, which keeps it for a while.

    Two of them copy, to the device and back, and three say which part of a buffer is copied. In
    some of the steps the sequences get another block.
    """
    monkeypatch.setattr(engine_module, "make_stream", lambda _: _AtOnce())
    calls = _Calls()
    config = EngineConfig(max_sequences=4, max_batch_tokens=64, num_blocks=64)
    served = Engine(fused("llama", 1), config, capture=calls.capture)
    for i in range(2):
        sampling = SamplingParams(do_sample=True, seed=i, logprobs=True)
        stopping = StoppingParams(30, ignore_eos=True)
        served.add(Request(f"{i}", PROMPTS[0][: 14 + i], sampling, stopping))
    for _ in range(4):
        served.step()
    calls.counts.clear()
    with calls:
        for _ in range(20):
            served.step()
    counted = dict(calls.counts)
    while served.has_work:
        served.step()
    assert counted == {name: 20 * n for name, n in (("replay", 2), ("copy_", 2), ("slice", 3))}


@pytest.mark.slow
def test_decodes_are_captured_before_the_engine_is_ready() -> None:
    config = EngineConfig(max_sequences=4, max_batch_tokens=16, num_blocks=16)
    ready = Engine(fused("llama", 1), config, capture=capture)
    ready.capture_decodes()
    for shape in ready._builder.graph_shapes:
        for kind in ready.runner.sampler.usual_kinds:
            step = ready._builder.empty(shape, kind)
            assert ready.runner.needs_capture(step) == shape.prefills


@pytest.mark.slow
def test_all_graphs_leave_their_logits_in_one_buffer() -> None:
    config = EngineConfig(max_sequences=4, max_batch_tokens=32, num_blocks=16)
    ahead = Engine(fused("llama", 1), config, capture=capture)
    while ahead.capture_next_graph():
        pass
    assert ahead.runner._graphs is not None
    kept = [ahead.runner._graphs.get(shape) for shape in ahead._builder.graph_shapes]
    logits = [graphs.forward.result for graphs in kept if graphs and graphs.forward]
    assert len(logits) == len(ahead._builder.graph_shapes)
    assert {rows.untyped_storage().data_ptr() for rows in logits} == {logits[0].data_ptr()}
    assert logits[0].untyped_storage().nbytes() == 4 * VOCAB_SIZE * 4, "of 4 rows, in float32"


@pytest.mark.slow
def test_a_llama_layer_takes_nine_launches() -> None:
    few, many = (len(decode_recording(n).launches) for n in LAYERS)
    assert (many - few) / (LAYERS[1] - LAYERS[0]) == 9


@pytest.mark.slow
def test_a_decode_step_never_waits_for_the_device() -> None:
    recording = decode_recording(1)  # raises where it would
    assert len(recording.launches) > 9
    on_host = [call for call in recording.calls if "_to_copy" in call.name]
    assert not any(call.kwargs.get("device") for call in on_host)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
    ],
)
def test_a_recording_refuses_operations_that_wait_for_the_device(
    wait: Callable[[torch.Tensor], object],
) -> None:
    x = torch.arange(4)
    with pytest.raises(HostWaits), Recording():
        wait(x)
