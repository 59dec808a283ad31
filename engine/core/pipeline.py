"""The steps in flight: launch the next step, then look at the one before it.

The device runs steps in the order of their launch. While it runs step N + 1, the host takes
the tokens of step N, so the device never waits for the host. Two things follow:

- A sequence that ends in step N may run in step N + 1 as well: its surplus token is dropped.
- A grammar (any `TokenConstraint`) must see the token of step N before the sampling of step
  N + 1. A step with guided sequences is launched in two parts: its forward at once, like any
  other, its sampling when it has become the oldest step in flight. When a grammar leaves only
  one continuation, the host appends those tokens itself, and the draws of the steps in flight
  for that sequence are discarded.

When a step fails, the steps launched after it ran on what it left behind. All of them are
taken back (their sequences return to what completed steps have computed), and the failed batch
is halved until the sequence that causes the failure is alone; that sequence fails, the others
go on.

This module needs no torch. The `Executor` is what launches a step on a device: the model in
production, a model of a device in the tests of random schedules.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, cast

from engine.core.errors import GrammarError
from engine.core.metrics import StepFigures
from engine.core.prefill_budget import PrefillBudget
from engine.core.request import ConstraintState
from engine.core.scheduler import Batch, Scheduler
from engine.core.sequence import Sequence, SequenceStatus

MAX_IN_FLIGHT = 2
"""Steps that are launched and not yet collected."""


class SampledToken(NamedTuple):
    """The token drawn for one sequence, or a token of its prompt.

    logprob  None unless it was asked for
    top      (token id, logprob) of the best alternatives, best first; empty unless asked for
    """

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]


# Past the checks of `__new__`, which take three times as long as the tuple.
new_sampled_token = cast(
    Callable[[tuple[int, float | None, list[tuple[int, float]]]], SampledToken],
    partial(tuple.__new__, SampledToken),
)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step produced, on the host.

    tokens         one for each scheduled sequence that samples, in the batch's order; None if
                   no sequence does
    prompt_tokens  one for each prompt row of the batch, in its order
    is_slowed      something else was done in the step's time, which tells nothing about others
    """

    tokens: Iterable[SampledToken] | None = None
    prompt_tokens: list[SampledToken] = field(default_factory=list)
    is_slowed: bool = False


class LaunchedStep(Protocol):
    """A step on its way through the device."""

    @property
    def needs_sampling(self) -> bool:
        """Whether only the forward was launched, and `sample` has to be called."""

    def sample(self, guided: list[tuple[int, ConstraintState]]) -> None:
        """Launch the sampling, under the constraints of these sampled rows."""

    def result(self) -> StepOutput:
        """Wait until the step is done. Raises what went wrong in it."""

    def wait(self) -> None:
        """Wait until the device is done with the step, whatever came of it."""


class Executor(Protocol):
    """Runs batches on a device, in the order in which they are launched."""

    def launch(self, batch: Batch) -> LaunchedStep:
        """Launch the step without waiting for it. May raise: then the device has not seen it."""

    def recover(self, error: Exception) -> None:
        """Make the device ready for the next step after one failed with `error`.

        Raises EngineDead if the device is lost.
        """


class Outputs(Protocol):
    """Receives what sequences produce."""

    def take_token(self, seq: Sequence, token: SampledToken) -> bool:
        """Take the last token of the sequence; True if the sequence has ended with it."""

    def take_prompt_tokens(self, seq: Sequence, start: int, tokens: list[SampledToken]) -> None:
        """Take the prompt's tokens after position `start`, with the logprobs asked for."""

    def take_failure(self, seq: Sequence, message: str) -> None:
        """The sequence has failed; nothing more comes from it."""


@dataclass(slots=True)
class _Step:
    """A step in flight.

    handle     what the executor returned, or the error that it raised instead
    discarded  sequences whose draw does not count
    """

    batch: Batch
    handle: LaunchedStep | Exception
    launch_time: float
    discarded: set[Sequence] = field(default_factory=set)

    @property
    def sampled(self) -> list[Sequence]:
        return [entry.sequence for entry in self.batch.scheduled if entry.samples]

    def result(self) -> StepOutput:
        if isinstance(self.handle, Exception):
            raise self.handle
        return self.handle.result()


class StepPipeline:
    """Drives the scheduler and the executor, one step at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        outputs: Outputs,
        prefill_budget: PrefillBudget,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """`clock` returns seconds from any point in time on."""
        self.scheduler = scheduler
        self.num_steps = 0
        self.last_step: StepFigures | None = None
        self._executor = executor
        self._outputs = outputs
        self._in_flight: deque[_Step] = deque()
        self._suspects: list[set[Sequence]] = []
        self._clock = clock
        self.prefill_budget = prefill_budget
        self._last_finished = clock()

    @property
    def in_flight(self) -> tuple[Batch, ...]:
        """The batches of the steps in flight, oldest first."""
        return tuple(step.batch for step in self._in_flight)

    @property
    def is_isolating(self) -> bool:
        """Whether the sequence that made a step fail is still being looked for."""
        return bool(self._suspects)

    # -- one step ---------------------------------------------------------------------

    def step(self, launched: Callable[[], None] = lambda: None) -> None:
        """Launch the next step, call `launched`, then collect the step before it. `launched` is
        called whether or not there was anything to launch.

        `last_step` has the figures of the collected step, None if none was collected. Raises
        EngineDead when the device is lost.
        """
        self.last_step = None
        has_room = False
        if self.is_isolating:
            self.launch_suspects()
        elif not self._launch_failed:
            has_launched = bool(self.launch().scheduled)
            has_room = has_launched and len(self._in_flight) < MAX_IN_FLIGHT
        launched()
        if self._in_flight and not has_room:
            self.collect()

    @property
    def _launch_failed(self) -> bool:
        """Whether the last launch failed. The device has missed what that step changed in the
        slots, so nothing may run on it until the step was collected and its sequences reset.
        """
        return bool(self._in_flight) and isinstance(self._in_flight[-1].handle, Exception)

    def launch(self, only: set[Sequence] | None = None) -> Batch:
        """Schedule a step and launch it, unless its batch is empty.

        With `only`, the step runs none but these sequences.
        """
        # A step to find what fails is no larger than the one that failed.
        limit = self.prefill_budget.limit() if only is None else None
        batch = self.scheduler.schedule(only, limit)
        if not batch.scheduled:
            return batch
        now = self._clock()
        for seq in batch.reset:
            seq.first_scheduled_time = seq.first_scheduled_time or now
        try:
            handle: LaunchedStep | Exception = self._executor.launch(batch)
        except Exception as error:
            handle = error
        self._in_flight.append(_Step(batch, handle, now))
        self._sample_next()
        self.num_steps += 1
        return batch

    def launch_suspects(self) -> Batch:
        """Launch a step of the next group of suspects alone."""
        return self.launch(only=self._suspects.pop())

    def _sample_next(self) -> None:
        """Launch the sampling of the oldest step, if it waited for its grammars."""
        if not self._in_flight:
            return
        step = self._in_flight[0]
        if isinstance(step.handle, Exception) or not step.handle.needs_sampling:
            return
        step.handle.sample(
            [
                (row, seq.constraint)
                for row, seq in enumerate(step.sampled)
                if seq.constraint is not None and seq not in step.discarded
            ]
        )

    # -- the step comes back ----------------------------------------------------------

    def collect(self) -> None:
        """Wait for the oldest step in flight and take what it produced."""
        step, failed, is_slowed = self._in_flight.popleft(), False, False
        try:
            output = step.result()
        except Exception as error:  # no variable keeps it, since it keeps what the step had
            finished, failed = self._clock(), True
            self._recover(step, error)
        else:
            finished, is_slowed = self._clock(), output.is_slowed
            self._take(step, output)
        self.last_step = figures = self._figures(step, finished, failed)
        if not (failed or is_slowed):
            # The device's time for the step, without the one before it.
            seconds = finished - max(step.launch_time, self._last_finished)
            num_prefill_tokens = figures.num_tokens - figures.num_decodes
            self.prefill_budget.observe(figures.num_decodes, num_prefill_tokens, seconds)
        self._last_finished = finished

    def _take(self, step: _Step, output: StepOutput) -> None:
        """The only loop over tokens on the host."""
        self.scheduler.complete(step.batch)
        self._take_prompt_tokens(step.batch, output.prompt_tokens)
        if output.tokens is None:
            self._sample_next()
            return
        drawn = [
            (seq, token)
            for seq, token in zip(step.sampled, output.tokens, strict=True)
            if seq.status is not SequenceStatus.FINISHED and seq not in step.discarded
        ]
        forced = {
            seq: self._follow(seq, seq.constraint, token)
            for seq, token in drawn
            if seq.constraint is not None
        }
        self._sample_next()
        for seq, token in drawn:
            try:
                self._append(seq, token)
                if forced:
                    self._append_forced(seq, forced.get(seq, []))
            except Exception as error:  # in its own text, stop strings or grammar
                self.fail(seq, str(error) or repr(error))

    def _take_prompt_tokens(self, batch: Batch, tokens: list[SampledToken]) -> None:
        end = 0
        for entry in (batch.scheduled[i] for i in batch.prompted):
            start, end = end, end + entry.num_prompt_rows
            if not entry.sequence.is_finished:
                self._outputs.take_prompt_tokens(entry.sequence, entry.start, tokens[start:end])

    def _follow(self, seq: Sequence, constraint: ConstraintState, token: SampledToken) -> list[int]:
        """Tell the grammar which token was drawn; return the tokens that have to follow it.

        If only one token is forced, the sampling already in flight produces it at no cost. Where
        the model's own logprobs are asked for, every token is sampled: only a step of the model
        can tell how likely it finds a token that the grammar forces.
        """
        constraint.accept(token.token_id)
        if seq.request.sampling.reports_raw:
            return []
        forced = constraint.forced()
        if len(forced) <= 1:
            return []
        for token_id in forced:
            constraint.accept(token_id)
        for step in self._in_flight:
            step.discarded.add(seq)
        return forced

    def _append(self, seq: Sequence, token: SampledToken) -> None:
        if seq.constraint is not None and seq.constraint.error:
            raise GrammarError(seq.constraint.error)
        seq.token_ids.append(token.token_id)
        if self._outputs.take_token(seq, token):
            self.scheduler.finish(seq)

    def _append_forced(self, seq: Sequence, token_ids: list[int]) -> None:
        """Append tokens that the grammar forces. No other could be drawn: probability 1."""
        for token_id in token_ids:
            if seq.is_finished:
                return
            self._append(seq, SampledToken(token_id, 0.0, [(token_id, 0.0)]))
        if token_ids and not seq.is_finished:
            self.scheduler.drop_in_flight(seq)

    def _figures(self, step: _Step, finished: float, failed: bool) -> StepFigures:
        lengths = [entry.num_scheduled_tokens for entry in step.batch.scheduled]
        num_decodes = lengths.count(1)
        return StepFigures(
            num_admitted=sum(seq.num_generated <= 1 for seq in step.batch.reset),
            num_prefills=len(lengths) - num_decodes - lengths.count(0),
            num_decodes=num_decodes,
            num_tokens=sum(lengths),
            forward_s=finished - step.launch_time,
            emit_s=self._clock() - finished,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            failed=failed,
        )

    # -- steps that fail --------------------------------------------------------------

    def fail(self, seq: Sequence, message: str) -> None:
        """Give up on a sequence and free its blocks."""
        self._outputs.take_failure(seq, message)
        self.scheduler.finish(seq)

    def _recover(self, failed: _Step, error: Exception) -> None:
        """Take back the steps in flight, and look for the cause by halving the failed batch.

        Each half runs alone before any other sequence does: a step that was merely too large
        fits in halves, and a sequence that fails by itself fails alone.
        """
        self._take_back(failed)
        self._executor.recover(error)
        suspects = [e.sequence for e in failed.batch.scheduled if not e.sequence.is_finished]
        if len(suspects) == 1:
            self.fail(suspects[0], f"{type(error).__name__}: {error}")
            return
        half = len(suspects) // 2
        self._suspects += [group for group in (set(suspects[half:]), set(suspects[:half])) if group]

    def take_back(self) -> None:
        """Rewind the sequences of all steps in flight, as if these had not been launched."""
        self._take_back(self._in_flight.popleft())

    def _take_back(self, failed: _Step) -> None:
        lost = [failed, *self._in_flight]
        self._in_flight.clear()
        for step in lost:
            if not isinstance(step.handle, Exception):
                step.handle.wait()
        sequences = {entry.sequence for step in lost for entry in step.batch.scheduled}
        # From the youngest: a sequence that goes back to waiting goes to the head of the queue.
        for seq in reversed(self.scheduler.sequences):
            if seq in sequences:
                self.scheduler.rewind(seq)
