"""The engine: requests in, events out, one step at a time. Everything here can be driven
by hand: `add`, then `step` until `has_work` is false.

A step launches the next batch and then looks at the one before, while the device works.
So sampled ids reach the next step on the device, and a sequence that turns out to have
ended has sometimes run once too often: its surplus token is dropped.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from engine.core.config import EngineConfig, LoadConfig
from engine.core.errors import EngineDead, GrammarError, LoadError
from engine.core.metrics import ColdStart, EngineFigures, StepFigures
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
from engine.core.scheduler import Batch, Scheduler
from engine.core.sequence import Sequence, SequenceStatus
from engine.device.packed_arrays import PackedArrays
from engine.device.stream import Pending, make_stream, run_in_temporary_thread
from engine.loading.loader import LoadedModel, freeze_rotary, load
from engine.loading.sizing import Limits, decide_limits, with_smaller_cache
from engine.output import SequenceOutput
from engine.sampling.sampler import SampledTokens
from engine.step.graphs import Capture, CudaCapture
from engine.step.runner import Forward, StepResult, build_runner
from engine.text.grammar import GrammarCompiler, TokenMasks

Events = list[tuple[str, Event]]
"""(request id, event), in the order they happened."""

Row = tuple[int, float | None, list[tuple[int, float]]]
"""What was drawn for a sequence: the token's id, its logprob, (id, logprob) of the best."""

_MAX_IN_FLIGHT = 2
_USUAL = (
    SamplingParams(do_sample=True, logprobs=True),
    SamplingParams(logprobs=True),
    SamplingParams(),
)
"""Kinds of sampling of which graphs are captured ahead, the last ones first."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Step:
    """A step in flight.

    pending    None while its sampling waits for what the step before has drawn
    forward    of a step whose sampling is launched apart
    discarded  sequences whose draw does not count
    """

    batch: Batch
    launched: float
    pending: Pending[StepResult] | None = None
    forward: Forward | None = None
    discarded: set[Sequence] = field(default_factory=set)

    @property
    def sampled(self) -> list[Sequence]:
        return [entry.sequence for entry in self.batch.scheduled if entry.samples]


@dataclass(frozen=True, slots=True)
class _FailedLaunch:
    """A step that never reached the device."""

    error: Exception

    def result(self) -> StepResult:
        raise self.error


class Engine:
    """Owns the scheduler, the model and every sequence. One thread drives it."""

    @classmethod
    def load(
        cls, load_config: LoadConfig, config: EngineConfig, cold_start: ColdStart | None = None
    ) -> "Engine":
        """Load, size and warm up, with progress bars. Raises LoadError with what to do."""
        cold_start = cold_start or ColdStart()
        loaded = run_in_temporary_thread(lambda: load(load_config, cold_start))
        limits = run_in_temporary_thread(lambda: decide_limits(loaded, config))
        while True:
            try:
                with cold_start.phase("warm-up"):
                    engine = run_in_temporary_thread(partial(cls, loaded, config, limits))
                    engine.warm_up()
            except torch.OutOfMemoryError:
                limits = with_smaller_cache(loaded, config, limits)
                logger.warning("out of memory: trying a KV cache of %d blocks", limits.num_blocks)
            else:
                engine.grammars.prepare()
                engine.cold_start = cold_start
                return engine

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        limits: Limits | None = None,
        capture: Capture | None = None,
    ):
        """`capture` records steps as graphs: CUDA's, where nothing else is said."""
        if capture is None and config.cuda_graphs and loaded.model.device.type == "cuda":
            capture = CudaCapture()
        self.limits = limits or decide_limits(loaded, config)
        self.info = loaded.info
        self.tokenizer = loaded.tokenizer
        self._eos_token_ids = loaded.eos_token_ids
        limits = self.limits
        freeze_rotary(loaded.model, limits.max_total_tokens)
        self.scheduler = Scheduler(
            limits.num_blocks, limits.max_sequences, limits.max_batch_tokens, config.prefix_caching
        )
        self._stream = make_stream(loaded.model.device)
        self._builder, self.runner = build_runner(
            loaded, limits, self._stream, capture, config.watermark
        )
        self._ahead = [(shape, kind) for shape in self._builder.graph_shapes for kind in _USUAL]
        vocab_size = loaded.model.config.get_text_config().vocab_size
        self.grammars = GrammarCompiler(loaded.tokenizer, vocab_size, loaded.eos_token_ids)
        self._masks = TokenMasks(vocab_size)
        self._live: dict[str, tuple[Sequence, SequenceOutput]] = {}
        self._in_flight: deque[_Step] = deque()
        self._suspects: list[set[Sequence]] = []
        self.cold_start = ColdStart()
        self.num_steps = 0
        self.last_step: StepFigures | None = None

    def warm_up(self) -> None:
        """Run the largest prefill and a few sampled decodes, so that no user is the first.

        Raises LoadError when even that does not work, torch.OutOfMemoryError when there is
        not the memory for it.
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

    def summary(self) -> list[str]:
        """What is served and under which limits, a line each, with where they come from."""
        info = self.info
        weights = f"{info.weight_bytes / 2**30:.2f} GiB of weights"
        if info.quantization is not None:
            weights += f" quantised by {info.quantization}"
        return [
            f"model {info.model_id} in {info.dtype}, {weights}, on {info.device}",
            *self.limits.reasons,
        ]

    # -- requests ---------------------------------------------------------------------

    def add(self, request: Request, forks: Seq[Request] = ()) -> None:
        """Accept a request; it will get exactly one `Finished` or `Failed`.

        `forks` are others of the same prompt, which is computed once for all of them.
        """
        leader = Sequence(request)
        for seq in (leader, *(Sequence(fork, leader) for fork in forks)):
            output = SequenceOutput(seq, self.tokenizer, self._eos_token_ids)
            self._live[seq.request.request_id] = (seq, output)
            self.scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """Forget a request at once, in whatever phase it is; no event follows. Idempotent."""
        entry = self._live.pop(request_id, None)
        if entry is not None:
            self.scheduler.finish(entry[0])

    def fail_all(self, message: str) -> Events:
        """Give up on every request."""
        return [
            event for request_id in list(self._live) for event in self._fail(request_id, message)
        ]

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._in_flight)

    def figures(self) -> EngineFigures:
        scheduler = self.scheduler
        return EngineFigures(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=scheduler.pool.num_blocks,
            num_used_blocks=scheduler.pool.num_used,
            num_steps=self.num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            num_prefix_lookup_tokens=scheduler.num_prefix_lookup_tokens,
        )

    def close(self) -> None:
        self._stream.close()

    def prepare(self) -> bool:
        """Do one thing ahead of the step that would need it; False when nothing is left to do.

        For when there is no work: captures a graph that is missing, decodes first.
        """
        while self._ahead:
            step = self._builder.empty(*self._ahead.pop())
            if self.runner.needs_capture(step):
                with self.cold_start.phase("graphs"):
                    self.runner.launch(step).result()
                return True
        return False

    # -- one step ---------------------------------------------------------------------

    def step(self) -> Events:
        """Launch the next batch, then collect the one before it; `last_step` has its figures,
        None where nothing was collected.

        Raises EngineDead when the device is lost.
        """
        self.last_step = None
        if self._suspects:
            return self._step_suspects()
        launched = self._launch(self.scheduler.schedule())
        if not self._in_flight or (launched and len(self._in_flight) < _MAX_IN_FLIGHT):
            return []
        return self._collect(self._in_flight.popleft())

    def _launch(self, batch: Batch) -> bool:
        if not batch.scheduled:
            return False
        now = time.perf_counter()
        for seq in batch.reset:
            seq.first_scheduled_time = seq.first_scheduled_time or now
        step = _Step(batch, now)
        try:
            inputs = self._builder.build(batch)
            if any(entry.sequence.grammar is not None for entry in batch.scheduled):
                step.forward = self.runner.launch_forward(inputs)
            else:
                step.pending = self.runner.launch(inputs)
        except Exception as error:
            step.pending = _FailedLaunch(error)
        self._in_flight.append(step)
        self._sample_next()
        self.num_steps += 1
        return True

    def _sample_next(self) -> None:
        """Launch the sampling that waits for grammars, when they know every token before it."""
        step = self._in_flight[0] if self._in_flight else None
        if step is None or step.forward is None or step.pending is not None:
            return
        guided = [
            (row, seq.grammar)
            for row, seq in enumerate(step.sampled)
            if seq.grammar is not None and seq not in step.discarded
        ]
        masks = None
        if guided:
            rows, grammars = zip(*guided, strict=True)
            masks = PackedArrays({"rows": np.array(rows), "masks": self._masks.fill(grammars)})
        step.pending = self.runner.launch_sampling(step.forward, masks)

    def _collect(self, step: _Step) -> Events:
        """Look at what a step produced."""
        assert step.pending is not None
        result: StepResult | None = None
        try:
            result = step.pending.result()
        except Exception as error:
            finished = time.perf_counter()
            events = self._recover(step, error)
        else:
            finished = time.perf_counter()
            events = self._take(step, result)
        self.last_step = self._step_figures(step, finished, failed=result is None)
        return events

    def _take(self, step: _Step, result: StepResult) -> Events:
        """The only loop over tokens on the host."""
        self.scheduler.complete(step.batch)
        if result.prompt_logprobs is not None:
            self._take_prompt_logprobs(step.batch, result.prompt_logprobs.tolist())
        if result.sampled is None:
            self._sample_next()
            return []
        drawn = [
            (seq, row)
            for seq, row in zip(step.sampled, _rows(result.sampled), strict=True)
            if seq.status is not SequenceStatus.FINISHED and seq not in step.discarded
        ]
        forced = {seq: self._follow(seq, row) for seq, row in drawn if seq.grammar is not None}
        self._sample_next()
        events: Events = []
        for seq, row in drawn:
            try:
                self._emit(events, seq, row)
                if forced:
                    self._emit_forced(events, seq, forced.get(seq, []))
            except Exception as error:  # its own text, stop strings or grammar: nobody else's fault
                events += self._fail(seq.request.request_id, str(error) or repr(error))
        return events

    def _step_figures(self, step: _Step, finished: float, failed: bool) -> StepFigures:
        lengths = [entry.num_tokens for entry in step.batch.scheduled]
        num_decodes = lengths.count(1)
        return StepFigures(
            num_admitted=sum(seq.num_generated <= 1 for seq in step.batch.reset),
            num_prefills=len(lengths) - num_decodes - lengths.count(0),
            num_decodes=num_decodes,
            num_tokens=sum(lengths),
            forward_s=finished - step.launched,
            emit_s=time.perf_counter() - finished,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            failed=failed,
        )

    def _take_prompt_logprobs(self, batch: Batch, logprobs: list[float]) -> None:
        end = 0
        for entry in (batch.scheduled[i] for i in batch.prompted):
            start, end = end, end + entry.num_prompt_rows
            live = self._live.get(entry.sequence.request.request_id)
            if live is not None:
                live[1].add_prompt_logprobs(entry.start, logprobs[start:end])

    def _follow(self, seq: Sequence, row: Row) -> list[int]:
        """Let its grammar know the token drawn; the tokens that then must come.

        One alone is left to the sampling, which is on its way and draws it for nothing.
        """
        assert seq.grammar is not None
        seq.grammar.accept(row[0])
        forced = seq.grammar.forced()
        if len(forced) <= 1:
            return []
        for token_id in forced:
            seq.grammar.accept(token_id)
        for step in self._in_flight:
            step.discarded.add(seq)
        return forced

    def _emit(self, events: Events, seq: Sequence, row: Row) -> None:
        token_id, logprob, top = row
        request = seq.request
        request_id, sampling = request.request_id, request.sampling
        if seq.grammar is not None and seq.grammar.error:
            raise GrammarError(seq.grammar.error)
        seq.token_ids.append(token_id)
        _, output = self._live[request_id]
        token, reason = output.push(
            token_id,
            logprob if sampling.logprobs else None,
            top if sampling.top_n_tokens else [],
        )
        events.append((request_id, token))
        if reason is not None:
            events.append((request_id, self._finish(seq, output, reason)))

    def _emit_forced(self, events: Events, seq: Sequence, token_ids: list[int]) -> None:
        """Nothing else could have been drawn, so their probability is 1."""
        for token_id in token_ids:
            if seq.is_finished:
                return
            self._emit(events, seq, (token_id, 0.0, [(token_id, 0.0)]))
        if token_ids and not seq.is_finished:
            self.scheduler.skip_ahead(seq)

    def _finish(self, seq: Sequence, output: SequenceOutput, reason: FinishReason) -> Finished:
        started = seq.first_scheduled_time or seq.arrival_time
        finished = Finished(
            reason=reason,
            generated_text=output.generated_text(),
            num_prompt_tokens=seq.num_prompt_tokens,
            num_generated_tokens=seq.num_generated,
            seed=seq.request.sampling.seed if seq.request.sampling.do_sample else None,
            queue_s=started - seq.arrival_time,
            inference_s=time.perf_counter() - started,
            prompt=output.prompt(),
        )
        self.scheduler.finish(seq)
        del self._live[seq.request.request_id]
        return finished

    # -- steps that fail --------------------------------------------------------------

    def _recover(self, failed: _Step, error: Exception) -> Events:
        """Take back what is in flight, and find who is to blame by halving the batch.

        Each half is run alone before anyone else: a step that is merely too large fits
        in halves, and a sequence that fails on its own fails alone.
        """
        lost = [failed, *self._in_flight]
        self._in_flight.clear()
        for step in lost[1:]:
            _wait(step)
        sequences = {entry.sequence for step in lost for entry in step.batch.scheduled}
        for seq in reversed(self.scheduler.sequences):  # each that has to wait goes to the head
            if seq in sequences:
                self.scheduler.rewind(seq)
        if _is_fatal(error):
            raise EngineDead(f"{type(error).__name__}: {error}") from error
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        suspects = [e.sequence for e in failed.batch.scheduled if not e.sequence.is_finished]
        if len(suspects) == 1:
            return self._fail(suspects[0].request.request_id, f"{type(error).__name__}: {error}")
        half = len(suspects) // 2
        self._suspects += [group for group in (set(suspects[half:]), set(suspects[:half])) if group]
        return []

    def _step_suspects(self) -> Events:
        batch = self.scheduler.schedule(only=self._suspects.pop())
        if not self._launch(batch):
            return []
        return self._collect(self._in_flight.popleft())

    def _fail(self, request_id: str, message: str) -> Events:
        seq, _ = self._live.pop(request_id)
        self.scheduler.finish(seq)
        return [(request_id, Failed(message))]


def _rows(sampled: SampledTokens) -> "zip[Row]":
    """Of each sampled sequence, as Python numbers."""
    ids = sampled.ids.tolist()
    logprobs = [None] * len(ids) if sampled.logprobs is None else sampled.logprobs.tolist()
    if sampled.top_ids is None or sampled.top_logprobs is None:
        top: list[list[tuple[int, float]]] = [[]] * len(ids)
    else:
        pairs = zip(sampled.top_ids.tolist(), sampled.top_logprobs.tolist(), strict=True)
        top = [list(zip(i, p, strict=True)) for i, p in pairs]
    return zip(ids, logprobs, top, strict=True)


def _wait(step: _Step) -> None:
    """Let a step that no longer counts run to its end."""
    with contextlib.suppress(Exception):
        if step.pending is not None:
            step.pending.result()
        elif step.forward is not None and step.forward.pending is not None:
            step.forward.pending.result()


def _warm_up_error(message: str) -> Exception:
    if message.startswith(torch.OutOfMemoryError.__name__):
        return torch.OutOfMemoryError(message)
    return LoadError(f"the model fails to run: {message}")


def _is_fatal(error: Exception) -> bool:
    """The device's context is gone: whatever runs next would fail the same way."""
    return isinstance(error, torch.AcceleratorError)
