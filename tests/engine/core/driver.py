"""Drives the engine's own scheduler and step pipeline over a model of the device.

The device model checks the contents of every block that a step reads. The driver checks every
batch that is scheduled, and after each operation that queues, slots and blocks agree.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

from engine.core.config import BLOCK_SIZE
from engine.core.pipeline import MAX_IN_FLIGHT, SampledToken, StepPipeline
from engine.core.prefill_budget import PrefillBudget
from engine.core.request import Request, SamplingParams, StoppingParams
from engine.core.scheduler import PROMPT_LOGPROB_ROWS, Batch, Scheduler
from engine.core.sequence import Sequence, SequenceStatus
from tests.engine.core.device_model import (
    END,
    Constraint,
    Device,
    ExpectedText,
    StepLost,
    num_blocks_for,
)

_request_numbers = count()


@dataclass(frozen=True)
class SchedulerState:
    """The scheduler's state before a step, to check the step's batch against.

    behind  tokens known and not yet computed
    forks   by leader, the forks that wait for its prompt
    """

    running: list[Sequence]
    num_tokens: dict[Sequence, int]
    behind: dict[Sequence, int]
    num_preemptions: dict[Sequence, int]
    forks: dict[Sequence, list[Sequence]]

    @classmethod
    def of(cls, scheduler: Scheduler, live: list[Sequence]) -> "SchedulerState":
        return cls(
            list(scheduler.running),
            {seq: seq.num_tokens for seq in live},
            {seq: seq.num_tokens - seq.num_computed for seq in live},
            {seq: seq.num_preemptions for seq in live},
            {seq: list(seq.forks) for seq in live if seq.forks},
        )


class CheckedScheduler(Scheduler):
    """Lets the driver check every batch, and reports forks that a rewind sends to the queue."""

    def __init__(self, driver: "Driver"):
        super().__init__(
            driver.num_blocks,
            driver.max_sequences,
            driver.max_batch_tokens,
            driver.prefix_caching,
            step_multiple=driver.step_multiple,
        )
        self._driver = driver

    def schedule(
        self, only: set[Sequence] | None = None, prefill_limit: int | None = None
    ) -> Batch:
        before = SchedulerState.of(self, self._driver.live)
        batch = super().schedule(only, prefill_limit)
        self._driver.check_schedule(batch, before, only, prefill_limit)
        return batch

    def rewind(self, seq: Sequence) -> None:
        was_running = seq.status is SequenceStatus.RUNNING
        super().rewind(seq)
        assert seq.num_tokens == len(seq.token_ids)
        assert seq.num_computed == seq.num_completed
        if was_running and seq.status is SequenceStatus.WAITING:
            self._driver.rewound_forks.append(seq)


@dataclass
class Driver:
    """The engine's scheduler and pipeline over a model of the device; implements `Outputs`."""

    num_blocks: int = 16
    max_sequences: int = 4
    max_batch_tokens: int = 64
    prefix_caching: bool = True
    can_end: bool = False
    token_s: float = 0.0
    step_multiple: int = 1

    live: list[Sequence] = field(default_factory=list)
    """Sequences that have not ended, in order of arrival, each fork behind its leader.

    The scheduler has the same order at all times, except that forks which cannot share their
    leader's prompt go behind all running sequences.
    """
    finished: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)
    rewound_forks: list[Sequence] = field(default_factory=list)
    """Forks that a rewind has sent back to the queue."""
    prompt_tokens: dict[Sequence, list[SampledToken]] = field(default_factory=dict)
    orphans: list[Sequence] = field(default_factory=list)
    """Forks whose leader has failed."""

    def __post_init__(self) -> None:
        self.device = Device(self.num_blocks, self.max_sequences, self.token_s)
        self.scheduler = CheckedScheduler(self)
        budget = PrefillBudget(min(self.max_batch_tokens, 4), self.max_batch_tokens)
        self.pipeline = StepPipeline(
            self.scheduler, self.device, self, budget, lambda: self.device.now
        )

    @property
    def expected(self) -> dict[Sequence, ExpectedText]:
        return self.device.expected

    @property
    def in_flight(self) -> tuple[Batch, ...]:
        return self.pipeline.in_flight

    # -- requests ---------------------------------------------------------------------

    def add(
        self,
        prompt: Iterable[int],
        max_new_tokens: int,
        salt: bytes = b"",
        num_forks: int = 0,
        prompt_logprobs: bool = False,
        guided: bool = False,
    ) -> Sequence:
        """Queue a request and its forks; return its sequence, the leader.

        Tokens can be forced on `guided` sequences.
        """
        prompt = list(prompt)
        leader: Sequence | None = None
        for variant in range(num_forks + 1):
            request = Request(
                f"request-{next(_request_numbers)}",
                prompt,
                SamplingParams(),
                StoppingParams(max_new_tokens),
                salt,
                grammar=Constraint() if guided else None,
                prompt_logprobs=prompt_logprobs and leader is None,
            )
            seq = Sequence(request, leader)
            assert num_blocks_for(seq.max_tokens) <= self.num_blocks, "the request can never run"
            self.expected[seq] = text = ExpectedText(seq, self.can_end, variant)
            if isinstance(seq.constraint, Constraint):
                seq.constraint.tokens = text.tokens
                seq.constraint.num_seen = len(prompt)
            self.live.append(seq)
            self.scheduler.add(seq)
            leader = leader or seq
        self.check()
        assert leader is not None
        return leader

    def abort(self, seq: Sequence) -> None:
        orphans = list(seq.forks) if seq in self.scheduler.running else []
        if seq in self.live:
            self.live.remove(seq)
        self.scheduler.finish(seq)
        self._move_behind_running(orphans)
        self.check()

    def force(self, seq: Sequence, num_tokens: int) -> None:
        """Force this many tokens after the one that is sampled next."""
        assert isinstance(seq.constraint, Constraint), "only guided sequences have forced tokens"
        seq.constraint.num_forced = num_tokens

    @property
    def _pending(self) -> set[Sequence]:
        """Forks that wait for their leader's prompt."""
        return {fork for seq in self.live for fork in seq.forks}

    def _move_behind_running(self, orphans: list[Sequence]) -> None:
        """Move forks that have to compute their prompt themselves to the head of the queue."""
        if orphans:
            kept = [seq for seq in self.live if seq not in orphans]
            running = [i for i, seq in enumerate(kept, 1) if seq in self.scheduler.running]
            index = max(running, default=0)
            while index < len(kept) and kept[index] in self._pending:
                index += 1
            self.live = kept[:index] + orphans + kept[index:]

    # -- what sequences produce ---------------------------------------------------------

    def take_token(self, seq: Sequence, token: SampledToken) -> bool:
        tokens = self.expected[seq].tokens
        assert token.token_id == seq.token_ids[-1]
        assert seq.token_ids == tokens[: len(seq.token_ids)], "the sequence got a wrong token"
        if seq.request.prompt_logprobs:
            num_known = len(self.prompt_tokens.get(seq, []))
            assert num_known == seq.num_prompt_tokens - 1, (
                "a token came before the prompt's logprobs"
            )
        if token.token_id != END and len(seq.token_ids) < seq.max_tokens:
            return False
        self.live.remove(seq)
        self.finished.append(seq)
        return True

    def take_prompt_tokens(self, seq: Sequence, start: int, tokens: list[SampledToken]) -> None:
        assert seq.request.prompt_logprobs
        assert seq in self.live
        assert start + len(tokens) < seq.num_prompt_tokens
        assert tokens == self.expected[seq].prompt_tokens(start, len(tokens))
        known = self.prompt_tokens.setdefault(seq, [])
        assert start <= len(known), "the logprobs of some positions were skipped"
        known[start : start + len(tokens)] = tokens

    def take_failure(self, seq: Sequence, message: str) -> None:
        """Note the failure. A sequence fails only if it was alone in a lost step."""
        assert message.startswith(StepLost.__name__), message
        self.orphans += seq.forks if seq in self.scheduler.running else []
        self.live.remove(seq)
        self.failed.append(seq)

    # -- one step ---------------------------------------------------------------------

    def step(self) -> None:
        """Take one step of the pipeline, as the engine does."""
        if len(self.in_flight) == MAX_IN_FLIGHT:
            self.collect()
        self._observe(self.pipeline.step)

    def launch(self, only: set[Sequence] | None = None, built: bool = True) -> Batch:
        """Schedule a step and launch it unless it is empty. The launch fails if not `built`."""
        assert len(self.in_flight) < MAX_IN_FLIGHT
        self.device.fails_next = not built
        batch = self.pipeline.launch(only)
        self.device.fails_next = False
        self.check()
        return batch

    def launch_suspects(self, built: bool = True) -> Batch:
        self.device.fails_next = not built
        batch = self.pipeline.launch_suspects()
        self.device.fails_next = False
        self.check()
        return batch

    def collect(self) -> None:
        self._observe(self.pipeline.collect)

    def lose(self, isolate: bool = True) -> None:
        """Let the oldest step in flight fail, and take back the steps after it.

        With `isolate`, the pipeline also looks for the sequence that causes the failure.
        """
        self.device.lose()
        if isolate:
            self.collect()
            return
        self._observe(self.pipeline.take_back)
        self.device.recover(StepLost())

    def _observe(self, work: Callable[[], None]) -> None:
        """Run a part of the pipeline in which steps may fail, and keep the order of `live`."""
        work()
        self._move_behind_running([seq for seq in self.live if seq in self.rewound_forks])
        self._move_behind_running(self.orphans)
        self.rewound_forks, self.orphans = [], []
        self.check()

    def drain(self) -> None:
        """Run until no sequence is left.

        Each step computes at least one token of the oldest sequence, which bounds their number.
        """
        num_steps = 16 + sum(2 * seq.max_tokens + 8 for seq in self.live)
        for _ in range(num_steps):
            if not self.live and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"no progress in {num_steps} steps")

    def check_schedule(
        self,
        batch: Batch,
        before: SchedulerState,
        only: set[Sequence] | None,
        prefill_limit: int | None,
    ) -> None:
        """Check a batch that was just scheduled."""
        started = {entry.sequence for entry in batch.scheduled if entry.num_scheduled_tokens == 0}
        for leader, forks in before.forks.items():
            if not leader.forks:
                self._move_behind_running([fork for fork in forks if fork not in started])
        self._check_batch(batch, before, only, prefill_limit)

    # -- checks -----------------------------------------------------------------------

    def check(self) -> None:
        """Check the state between any two operations."""
        if self.device.violation is not None:
            raise self.device.violation
        scheduler, pool = self.scheduler, self.scheduler.pool
        scheduler.check_integrity()
        pending = self._pending
        present = [seq for seq in self.live if seq not in pending]
        assert scheduler.sequences == present, "a sequence was lost, or is out of order"
        assert all(fork.leader is seq for seq in self.live for fork in seq.forks)
        used = {block for seq in scheduler.running for block in seq.block_table}
        assert pool.num_used == len(used)
        assert pool.num_used + pool.num_idle == self.num_blocks
        assert 0 <= pool.num_cached <= pool.num_idle
        assert len(scheduler.running) <= self.max_sequences
        for seq in self.live:
            assert 0 <= seq.num_in_flight <= len(self.in_flight)
            is_running = seq in scheduler.running
            assert seq.status is (SequenceStatus.RUNNING if is_running else SequenceStatus.WAITING)

    def _check_batch(
        self,
        batch: Batch,
        before: SchedulerState,
        only: set[Sequence] | None,
        prefill_limit: int | None,
    ) -> None:
        budget = self.max_batch_tokens
        num_decodes = sum(
            entry.num_scheduled_tokens == 1 == before.behind[entry.sequence]
            for entry in batch.scheduled
            if entry.sequence in before.running
        )
        if num_decodes and prefill_limit is not None:
            most = num_decodes + prefill_limit
            whole = most // self.step_multiple * self.step_multiple
            budget = min(budget, whole if whole > num_decodes else most)
        assert batch.num_scheduled_tokens <= budget
        assert all(seq.slot >= 0 for seq in batch.reset), "a sequence without a slot is reset"
        self._check_entries(batch, before)
        started = self._check_forks(batch, before)
        running = [seq for seq in self.scheduler.running if seq not in started]
        preempted = [s for s in before.running if s.num_preemptions > before.num_preemptions[s]]
        kept = before.running[: len(before.running) - len(preempted)]
        admitted = running[len(kept) :]
        assert preempted == before.running[len(kept) :], "an older sequence was preempted"
        assert not preempted or preempted[0] is not self.live[0], (
            "the oldest sequence was preempted"
        )
        assert running[: len(kept)] == kept
        if only is not None:  # forks start with their leader
            only = only | {seq for seq in started if seq.leader in only}
        self._check_fairness(batch, before, kept, admitted, only, budget)
        self._check_admission(batch, admitted, only, budget)
        if only is None and self.live:
            assert batch.scheduled or self.in_flight, "no sequence runs, and none ever will"

    def _check_forks(self, batch: Batch, before: SchedulerState) -> list[Sequence]:
        """Check the forks that start in this step, and return them.

        A fork starts right behind its leader, in the batch and in the running queue, with the
        leader's full blocks and a copy of its last one. After that no fork waits for the leader.
        """
        entries, started = batch.scheduled, []
        copies = dict(zip(*reversed(tuple(zip(*batch.copies, strict=True))), strict=True))
        running = self.scheduler.running
        assert len(set(copies)) == len(batch.copies), "two blocks are copied to the same block"
        owners = [block for seq in running for block in seq.block_table]
        for index, entry in enumerate(entries):
            seq = entry.sequence
            if entry.num_scheduled_tokens > 0:
                continue
            leader, num_full = seq.leader, seq.num_prompt_tokens // BLOCK_SIZE
            assert leader is not None
            assert entry.samples
            assert entry.end == seq.num_prompt_tokens == len(seq.token_ids)
            assert seq in batch.reset
            before_it = entries[index - 1]
            assert before_it.sequence is leader or before_it.sequence.leader is leader
            assert running[running.index(seq) - 1] is before_it.sequence
            assert before_it.samples
            assert before_it.end == entry.end
            assert seq.block_table[:num_full] == leader.block_table[:num_full]
            for block, source in zip(
                seq.block_table[num_full:],
                leader.block_table[num_full : num_blocks_for(entry.end)],
                strict=True,
            ):
                assert copies.pop(block) == source
                assert owners.count(block) == 1, "a block is copied to a shared block"
            started.append(seq)
        assert not copies, "a block is copied for no fork"
        completed = {e.sequence for e in entries if e.samples and e.sequence in before.forks}
        assert all(not seq.forks for seq in completed), "a fork still waits for a completed prompt"
        for seq in before.forks.keys() - completed:
            assert seq.forks == before.forks[seq], (
                "a fork started or was lost before its prompt was complete"
            )
        return started

    def _check_entries(self, batch: Batch, before: SchedulerState) -> None:
        """Check the positions of each entry, and that it writes to no shared block.

        Blocks that forks begin to share in this very step may still be written.
        """
        forks = {entry.sequence for entry in batch.scheduled if entry.num_scheduled_tokens == 0}
        running = [seq for seq in self.scheduler.running if seq not in forks]
        owners = [block for seq in running for block in seq.block_table]
        sequences = [entry.sequence for entry in batch.scheduled]
        assert len(set(sequences)) == len(sequences)
        for entry in batch.scheduled:
            seq = entry.sequence
            assert entry.is_current
            assert entry.slot == seq.slot >= 0
            assert entry.end == seq.num_computed < seq.max_tokens
            assert entry.samples == (entry.end == before.num_tokens[seq])
            assert seq.num_tokens == before.num_tokens[seq] + entry.samples
            if seq in forks:
                continue
            written = seq.block_table[entry.start // BLOCK_SIZE : num_blocks_for(entry.end)]
            assert len(written) == num_blocks_for(entry.end) - entry.start // BLOCK_SIZE
            assert all(owners.count(block) == 1 for block in written), (
                "the step writes to a shared block"
            )

    def _check_fairness(
        self,
        batch: Batch,
        before: SchedulerState,
        kept: list[Sequence],
        admitted: list[Sequence],
        only: set[Sequence] | None,
        budget: int,
    ) -> None:
        """Check that every decode runs, then prefills, oldest first, as long as the budget lasts.

        The budget counts tokens, and rows of logits for prompt logprobs.
        """
        entries = {entry.sequence: entry for entry in batch.scheduled}
        if only is not None:
            assert set(entries) <= only
            kept = [seq for seq in kept if seq in only]
        for seq in kept:
            if before.behind[seq] == 1 and before.num_tokens[seq] < seq.max_tokens:
                assert seq in entries, "a decode was left out"
        prefills = [seq for seq in kept if before.behind[seq] > 1] + admitted
        scheduled = [seq for seq in prefills if seq in entries]
        if self._num_prompt_rows(batch) == PROMPT_LOGPROB_ROWS:
            return
        assert scheduled == prefills[: len(scheduled)], "a younger prefill ran first"
        assert all(entries[seq].samples for seq in scheduled[:-1]), "a younger prefill ran first"
        if len(scheduled) < len(prefills) or any(not e.samples for e in batch.scheduled):
            assert batch.num_scheduled_tokens == budget, "the budget was not used up"

    def _num_prompt_rows(self, batch: Batch) -> int:
        rows = [entry.num_prompt_rows for entry in batch.scheduled]
        assert batch.prompted == [i for i, num_rows in enumerate(rows) if num_rows]
        assert sum(rows) <= PROMPT_LOGPROB_ROWS
        return sum(rows)

    def _check_admission(
        self, batch: Batch, admitted: list[Sequence], only: set[Sequence] | None, budget: int
    ) -> None:
        entries = {entry.sequence: entry for entry in batch.scheduled}
        assert only is None or not admitted
        for seq in admitted:
            assert seq in batch.reset
            num_known = seq.num_tokens - entries[seq].samples
            assert num_known == len(seq.token_ids), "a sequence was admitted with tokens in flight"
            assert len(seq.block_table) == num_blocks_for(num_known)
        waiting = self.scheduler.waiting
        has_room = len(self.scheduler.running) < self.max_sequences
        if only is None and waiting and has_room and batch.num_scheduled_tokens < budget:
            head = waiting[0]
            if head.wants_prompt_logprobs and self._num_prompt_rows(batch) == PROMPT_LOGPROB_ROWS:
                return
            fits = num_blocks_for(head.num_tokens) <= self.scheduler.pool.num_idle
            assert head.num_in_flight or not fits, (
                "the head of the queue fits, and was not admitted"
            )


def prompt(num_tokens: int, stem: int = 0) -> list[int]:
    """Make a prompt. Prompts of one stem are prefixes of each other; prompts of different stems
    differ in their first token.
    """
    return [1 + (stem >> (i % 8) & 1) for i in range(num_tokens)]


def ranges(batch: Batch) -> dict[Sequence, tuple[int, int]]:
    """Return the positions [start, end) that the step computes of each sequence."""
    return {entry.sequence: (entry.start, entry.end) for entry in batch.scheduled}


def decode(driver: Driver, num_steps: int) -> None:
    """Launch and collect steps one by one, with no second step in flight."""
    for _ in range(num_steps):
        driver.launch()
        driver.collect()
