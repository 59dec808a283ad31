"""The engine: requests in, events out, one step at a time.

Everything can be driven by hand: `add` requests, then call `step` until `has_work` is false.
How steps overlap, and what happens when one fails, is in `engine/core/pipeline.py`.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import torch
from tqdm import tqdm

from engine.attention.kv_cache import unbind_kv_cache
from engine.attention.plan import GraphShape
from engine.core.config import EngineConfig, LoadConfig
from engine.core.errors import LoadError
from engine.core.metrics import ColdStart, EngineFigures, StepFigures
from engine.core.pipeline import SampledToken, StepPipeline
from engine.core.prefill_budget import PrefillBudget
from engine.core.request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    StoppingParams,
    TokenOutput,
)
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence
from engine.device.device import Device, make_device
from engine.device.memory import DeviceMemory
from engine.device.stream import make_stream, run_in_temporary_thread
from engine.loading.compile_ahead import compile_ahead
from engine.loading.loader import LoadedModel, load
from engine.loading.reasons import is_out_of_memory
from engine.loading.rotary import freeze_rotary
from engine.loading.sizing import Limits, decide_limits, with_smaller_cache
from engine.output import SequenceOutput
from engine.sampling.sampler import SamplingKind
from engine.step.captures import Captures
from engine.step.executor import ModelExecutor
from engine.step.graph_memory import capture_ahead, graph_bytes
from engine.step.graphs import Capture, CudaCapture
from engine.step.rehearsal import rehearsals
from engine.step.runner import build_runner
from engine.text.grammar import GrammarCompiler, TokenMasks

Events = list[tuple[str, Event]]
"""(request id, event), in the order they happened."""

logger = logging.getLogger(__name__)


class Engine:
    """Owns the scheduler, the model and every sequence. One thread drives it."""

    @classmethod
    def load(
        cls, load_config: LoadConfig, config: EngineConfig, cold_start: ColdStart | None = None
    ) -> "Engine":
        """Load, size and warm up, with progress bars. Raises LoadError with what to do."""
        cold_start = cold_start or ColdStart()
        found = partial(compile_ahead, load_config, config)
        loaded = run_in_temporary_thread(lambda: load(load_config, cold_start, found))
        limits = run_in_temporary_thread(lambda: measure_limits(loaded, config))
        with cold_start.phase("warm-up"):
            while (engine := cls._warm(loaded, config, limits)) is None:
                unbind_kv_cache(loaded.calls)
                make_device(loaded.model.device).free_unused()
                limits = with_smaller_cache(loaded, config, limits)
                logger.warning("out of memory: trying a KV cache of %d blocks", limits.num_blocks)
        engine.grammars.prepare()
        engine.cold_start = cold_start
        engine.capture_decodes()
        return engine

    @classmethod
    def _warm(cls, loaded: LoadedModel, config: EngineConfig, limits: Limits) -> "Engine | None":
        """Return an engine that is warm; None if memory runs out.

        Then nothing refers to the engine that failed, once this function and its error are gone.
        """
        try:
            engine = run_in_temporary_thread(partial(cls, loaded, config, limits))
            engine.warm_up()
        except Exception as error:
            if is_out_of_memory(error):
                return None
            raise
        return engine

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        limits: Limits | None = None,
        capture: Capture | None = None,
        device: Device | None = None,
    ):
        """`capture` records steps as graphs. None: CUDA graphs on CUDA, no graphs on a CPU.

        `device` is asked what its state is after an error. None: the one that has the model.
        """
        capture = capture or _make_capture(loaded, config)
        self.limits = limits or decide_limits(loaded, config)
        self.info = loaded.info
        self.tokenizer = loaded.tokenizer
        self._eos_token_ids = loaded.eos_token_ids
        limits = self.limits
        freeze_rotary(loaded.model, limits.max_total_tokens)
        self.scheduler = Scheduler(
            limits.num_blocks,
            limits.max_sequences,
            limits.max_batch_tokens,
            config.prefix_caching,
            step_multiple=limits.step_multiple,
        )
        device = device or make_device(loaded.model.device)
        self._stream = make_stream(loaded.model.device)
        self._builder, self.runner = build_runner(
            loaded,
            limits,
            self._stream,
            capture,
            config.max_top_tokens,
            config.watermark,
            Captures(device),
        )
        sampler = self.runner.sampler
        # The last one is captured first.
        self._graphs_to_capture = [
            (shape, kind)
            for kinds in (sampler.rare_kinds, sampler.usual_kinds)
            for shape in self._builder.graph_shapes
            for kind in reversed(kinds)
        ]
        self._vocab_size = vocab_size = loaded.model.config.get_text_config().vocab_size
        self.grammars = GrammarCompiler(loaded.tokenizer, vocab_size, loaded.eos_token_ids)
        masks = TokenMasks(vocab_size)
        self._executor = ModelExecutor(self._builder, self.runner, masks, device)
        prefill_budget = PrefillBudget(
            limits.min_prefill_tokens,
            limits.max_batch_tokens,
            limits.mixed_step_s,
            limits.step_multiple,
        )
        self.pipeline = StepPipeline(self.scheduler, self._executor, self, prefill_budget)
        self._live: dict[str, tuple[Sequence, SequenceOutput]] = {}
        self._events: Events = []
        self.cold_start = ColdStart()

    def warm_up(self) -> None:
        """Run the largest prefill, a few sampled decodes and each kind of sampling before the
        first request does.

        Raises LoadError if that fails, torch.OutOfMemoryError if there is too little memory.
        """
        length = min(self.limits.max_batch_tokens, self.limits.max_total_tokens - 4)
        self.add(
            Request(
                request_id="warm-up",
                prompt_ids=[0] * length,
                sampling=SamplingParams(do_sample=True, temperature=0.7, logprobs=True),
                stopping=StoppingParams(max_new_tokens=4, ignore_eos=True),
            )
        )
        with tqdm(total=4, desc="Warming up") as progress:
            while self.has_work:
                for _, event in self.step():
                    if isinstance(event, Failed):
                        raise _warm_up_error(event.message)
                    progress.update(isinstance(event, TokenOutput))
        self.scheduler.pool.forget_cached()
        self.prepare_sampling()

    def prepare_sampling(self) -> None:
        """Compile every kernel that sampling can need, where sampling has kernels."""
        sampler = self.runner.sampler
        kinds = sampler.usual_kinds + sampler.rare_kinds
        if kinds:
            self.runner.prepare_sampling(rehearsals(self._builder, kinds, self._vocab_size))

    def summary(self) -> list[str]:
        """Return the model and the limits in effect, a line each, with where they come from."""
        info = self.info
        weights = f"{info.weight_bytes / 2**30:.2f} GiB of weights"
        if info.quantization is not None:
            weights += f" quantised by {info.quantization}"
        if info.unused_bytes:
            weights += f" and {info.unused_bytes / 2**30:.2f} GiB of unusable gaps"
        return [
            f"model {info.model_id} in {info.dtype}, {weights}, on {info.device}",
            *self.limits.reasons,
        ]

    # -- requests ---------------------------------------------------------------------

    def add(self, request: Request, forks: Seq[Request] = ()) -> None:
        """Accept a request. It gets exactly one `Finished` or `Failed`.

        `forks` are requests with the same prompt, which is computed once for all of them.
        """
        leader = Sequence(request)
        for seq in (leader, *(Sequence(fork, leader) for fork in forks)):
            output = SequenceOutput(seq, self.tokenizer, self._eos_token_ids)
            self._live[seq.request.request_id] = (seq, output)
            self.scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """Drop a request at once, in any phase. No event follows. Idempotent."""
        entry = self._live.pop(request_id, None)
        if entry is not None:
            self.scheduler.finish(entry[0])

    def fail_all(self, message: str) -> Events:
        """Fail every request."""
        self._events = []
        for seq, _ in list(self._live.values()):
            self.pipeline.fail(seq, message)
        return self._events

    @property
    def has_work(self) -> bool:
        return bool(self._live or self.pipeline.in_flight)

    def figures(self) -> EngineFigures:
        scheduler = self.scheduler
        return EngineFigures(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=scheduler.pool.num_blocks,
            num_used_blocks=scheduler.pool.num_used,
            num_steps=self.pipeline.num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            num_prefix_lookup_tokens=scheduler.num_prefix_lookup_tokens,
        )

    def close(self) -> None:
        self._stream.close()

    def capture_decodes(self) -> None:
        """Capture the graphs of decodes, for which the first requests would have to wait."""
        while self._graphs_to_capture and not self._graphs_to_capture[-1][0].prefills:
            self._capture(*self._graphs_to_capture.pop())

    def capture_next_graph(self) -> bool:
        """Capture the graphs of one shape and kind of sampling; False if none is missing.

        Called while there is no work, so that no step has to wait for a capture. If one fails, the
        rest are captured when they are first needed. Raises EngineDead if the device is lost.
        """
        while self._graphs_to_capture:
            if self._capture(*self._graphs_to_capture.pop()):
                return True
        return False

    def _capture(self, shape: GraphShape, kind: SamplingKind) -> bool:
        try:
            with self.cold_start.phase("graphs"):
                return capture_ahead(self._builder, self.runner, shape, kind)
        except Exception as error:
            self._executor.recover(error)
            self._graphs_to_capture.clear()
            return False

    # -- one step ---------------------------------------------------------------------

    def step(self, launched: Callable[[], None] = lambda: None) -> Events:
        """Launch the next step, call `launched`, and return the events of the step before it.

        Raises EngineDead when the device is lost.
        """
        self._events = []
        self.pipeline.step(launched)
        return self._events

    @property
    def last_step(self) -> StepFigures | None:
        """Figures of the step that the last call of `step` collected, if it did."""
        return self.pipeline.last_step

    @property
    def num_steps(self) -> int:
        return self.pipeline.num_steps

    # -- what sequences produce (the pipeline's `Outputs`) -----------------------------

    def take_token(self, seq: Sequence, token: SampledToken) -> bool:
        request_id, sampling = seq.request.request_id, seq.request.sampling
        token_id, logprob, top = token
        _, output = self._live[request_id]
        event, reason = output.push(
            token_id,
            logprob if sampling.logprobs else None,
            top if sampling.top_n_tokens else [],
        )
        self._events.append((request_id, event))
        if reason is None:
            return False
        self._events.append((request_id, _finished(seq, output, reason)))
        del self._live[request_id]
        return True

    def take_prompt_tokens(self, seq: Sequence, start: int, tokens: list[SampledToken]) -> None:
        _, output = self._live[seq.request.request_id]
        output.add_prompt_tokens(start, tokens)

    def take_failure(self, seq: Sequence, message: str) -> None:
        request_id = seq.request.request_id
        del self._live[request_id]
        self._events.append((request_id, Failed(message)))


def measure_limits(
    loaded: LoadedModel,
    config: EngineConfig,
    memory: DeviceMemory | None = None,
    capture: Capture | None = None,
) -> Limits:
    """Decide the limits, with room for the graphs that an engine will capture.

    `capture` and its default are those of `Engine`. Raises LoadError.
    """
    capture = capture or _make_capture(loaded, config)

    def measure_graphs(limits: Limits, memory: DeviceMemory) -> int:
        freeze_rotary(loaded.model, limits.max_total_tokens)
        stream = make_stream(loaded.model.device)
        captures = Captures(make_device(loaded.model.device))
        build = partial(
            build_runner,
            loaded,
            limits,
            stream,
            capture,
            config.max_top_tokens,
            config.watermark,
            captures,
        )
        try:
            return graph_bytes(build, memory)
        finally:
            stream.close()

    return decide_limits(loaded, config, memory, graph_bytes=measure_graphs if capture else None)


def _make_capture(loaded: LoadedModel, config: EngineConfig) -> Capture | None:
    """Return what captures graphs of this model's steps; None: its steps are not captured."""
    return CudaCapture() if config.cuda_graphs and loaded.model.device.type == "cuda" else None


def _finished(seq: Sequence, output: SequenceOutput, reason: FinishReason) -> Finished:
    started = seq.first_scheduled_time or seq.arrival_time
    return Finished(
        reason=reason,
        generated_text=output.generated_text(),
        num_prompt_tokens=seq.num_prompt_tokens,
        num_generated_tokens=seq.num_generated,
        seed=seq.request.sampling.seed if seq.request.sampling.do_sample else None,
        queue_s=started - seq.arrival_time,
        inference_s=time.perf_counter() - started,
        prompt=output.prompt(),
        prompt_top_tokens=output.prompt_top_tokens(),
        stop=output.reached_stop(),
    )


def _warm_up_error(message: str) -> Exception:
    if is_out_of_memory(RuntimeError(message)):
        return torch.OutOfMemoryError(message)
    return LoadError(f"the model fails to run: {message}")
