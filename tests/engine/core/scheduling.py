"""The engine's scheduler and step pipeline, driven over a model of the device.

The device remembers, for each position of each block, which prefix its KV was computed
from. Its stream runs steps in the order of their launch, so here a step writes when it is
launched. Every launch then checks that each sequence finds its own prefix, and nothing
else, at every position it attends to: whatever goes wrong with blocks (two owners, use
after free, a hit on what is not there yet) shows as a position with another's content.

"Text" is a function of the prefix, and of which fork it is, so what a request must answer is
known beforehand. A part of it may be forced, as a grammar does: the host appends it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from zlib import crc32

from engine.core.config import BLOCK_SIZE
from engine.core.pipeline import MAX_IN_FLIGHT, SampledToken, StepOutput, StepPipeline
from engine.core.request import ConstraintState, Request, SamplingParams, StoppingParams
from engine.core.scheduler import (
    PROMPT_LOGPROB_ROWS,
    Batch,
    ScheduledSequence,
    Scheduler,
)
from engine.core.sequence import Sequence, SequenceStatus

END = 0
"""The token that ends a sequence: found at the collection, when the next step is launched."""

Prefix = tuple[bytes, bytes]
"""(cache salt, every token up to and including the position)."""

_numbers = count()


def next_token(tokens: Iterable[int], variant: int = 0) -> int:
    digest = crc32(bytes(tokens), variant)
    return END if digest % 31 == 0 else 1 + digest % 2


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


class Truth:
    """What a sequence's tokens are, up to `max_tokens`, whether or not the end comes before.

    Forks of one prompt go different ways, each by its `variant`.
    """

    def __init__(self, seq: Sequence, can_end: bool, variant: int = 0):
        self.tokens = list(seq.token_ids)
        while len(self.tokens) < seq.max_tokens:
            token = next_token(self.tokens, variant)
            self.tokens.append(token if can_end else max(token, 1))
        self.prefixes: list[Prefix] = [
            (seq.request.cache_salt, bytes(self.tokens[: i + 1])) for i in range(len(self.tokens))
        ]


@dataclass(frozen=True, slots=True)
class KV:
    """One position of a block; `prefix` is None for what a lost step has left."""

    prefix: Prefix | None
    step: int


class StepLost(Exception):
    """What a step raises that the model of the device has lost."""


class Step:
    """A step on the model of the device. Satisfies `LaunchedStep`.

    Its forward runs when it is launched. Its sampling does, too, unless it has guided sequences.
    """

    def __init__(self, number: int, batch: Batch, device: "Device"):
        self.number = number
        self.batch = batch
        self.is_lost = False
        self.is_done = False
        self.needs_sampling = any(e.sequence.constraint is not None for e in batch.scheduled)
        self._device = device
        self._tokens: list[int] = []
        device.run(self)
        if not self.needs_sampling:
            self._tokens = device.sample(self, set())

    def sample(self, guided: list[tuple[int, ConstraintState]]) -> None:
        """A guided row without its mask draws a token that does not count."""
        assert self.needs_sampling
        self.needs_sampling = False
        rows = {row for row, _ in guided}
        sampled = [entry for entry in self.batch.scheduled if entry.samples]
        unmasked = {
            row
            for row, entry in enumerate(sampled)
            if entry.sequence.constraint is not None and row not in rows
        }
        self._tokens = self._device.sample(self, unmasked)

    def result(self) -> StepOutput:
        assert not self.needs_sampling, "collected before its sampling was launched"
        self.wait()
        if self.is_lost:
            raise StepLost
        samples = any(entry.samples for entry in self.batch.scheduled)
        rows = [entry.num_prompt_rows for entry in self.batch.scheduled]
        return StepOutput(
            [SampledToken(token, None, []) for token in self._tokens] if samples else None,
            [0.0] * sum(rows),
        )

    def wait(self) -> None:
        self.is_done = True


class Constraint:
    """Allows every token, and forces as many as it is told behind the next one that is drawn."""

    warnings: tuple[str, ...] = ()
    is_finished = False
    error = ""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.num_seen = 0
        self.num_forced = 0

    def start(self) -> ConstraintState:
        return Constraint()

    def accept(self, token_id: int) -> None:
        assert self.tokens[self.num_seen] == token_id, "not the token that comes next"
        self.num_seen += 1

    def forced(self) -> list[int]:
        """At least two: a token forced alone is left to the sampling."""
        num_forced, self.num_forced = self.num_forced, 0
        return self.tokens[self.num_seen : self.num_seen + num_forced]


class Device:
    """KV by block; by slot, what `StepBuilder`, `Sampler` and `ModelRunner` keep. Satisfies
    `Executor`.
    """

    def __init__(self, num_blocks: int, max_sequences: int):
        self.kv: list[list[KV | None]] = [[None] * BLOCK_SIZE for _ in range(num_blocks)]
        self.block_tables = [[0] * num_blocks for _ in range(max_sequences)]
        self.owners: list[Sequence | None] = [None] * max_sequences
        self.tokens: list[list[int]] = [[] for _ in range(max_sequences)]
        self.truths: dict[Sequence, Truth] = {}
        self.steps: list[Step] = []
        """Those that are not known to be done."""
        self.fails_next = False
        """The next launch fails before the device sees it."""
        self.has_failed = False
        """The last launch failed, and the device has not recovered from it yet."""
        self.violation: AssertionError | None = None
        """What a launch did that it must not do."""

    def launch(self, batch: Batch) -> Step:
        try:
            return self._launch(batch)
        except AssertionError as error:  # which the pipeline takes for a launch that failed
            self.violation = error
            raise

    def _launch(self, batch: Batch) -> Step:
        assert not self.has_failed, "a launch on top of a failed one"
        if self.fails_next:
            self.fails_next, self.has_failed = False, True
            raise StepLost
        step = Step(next(_numbers), batch, self)
        self.steps = [*self._in_flight(), step]
        return step

    def recover(self, error: Exception) -> None:
        assert isinstance(error, StepLost), error
        self.has_failed = False

    def _in_flight(self) -> list[Step]:
        return [step for step in self.steps if not step.is_done]

    def run(self, step: Step) -> None:
        self._update_slots(step.batch)
        for entry in step.batch.scheduled:
            self._check_slot(entry)
            self._write(step.number, entry, self.truths[entry.sequence])
        for entry in step.batch.scheduled:
            if entry.num_tokens > 0:
                self._check_reads(entry, self.truths[entry.sequence])
        self._copy(step)
        for entry in step.batch.scheduled:
            self._check_reads(entry, self.truths[entry.sequence])
            if entry.sequence in step.batch.reset and entry.num_tokens > 0:
                self._check_written_before(entry, self._in_flight())

    def sample(self, step: Step, unmasked: set[int]) -> list[int]:
        """Draw for each sampled row; -1 for a row that has no mask and needs one."""
        drawn = []
        for row, entry in enumerate(entry for entry in step.batch.scheduled if entry.samples):
            assert self.owners[entry.slot] is entry.sequence
            drawn.append(-1 if row in unmasked else self.truths[entry.sequence].tokens[entry.end])
            self.tokens[entry.slot].append(drawn[-1])
        return drawn

    def _copy(self, step: Step) -> None:
        for source, target in step.batch.copies:
            self.kv[target] = [
                None if kv is None else replace(kv, step=step.number) for kv in self.kv[source]
            ]

    def lose(self) -> None:
        """The oldest step in flight fails, and those after it ran on what it left: all of them
        have left rubbish wherever they wrote.
        """
        for step in self._in_flight():
            step.is_lost = True
            for block in self.kv:
                for offset, kv in enumerate(block):
                    if kv is not None and kv.step == step.number:
                        block[offset] = KV(None, step.number)
            for entry in step.batch.scheduled:
                self.tokens[entry.slot].append(-1)

    def _update_slots(self, batch: Batch) -> None:
        for seq in batch.reset:
            self.block_tables[seq.slot][: len(seq.block_table)] = seq.block_table
            self.owners[seq.slot] = seq
            self.tokens[seq.slot] = list(seq.token_ids)
        for slot, index, block in batch.grown:
            self.block_tables[slot][index] = block

    def _check_slot(self, entry: ScheduledSequence) -> None:
        """The mirror is exact, and the inputs are the sequence's tokens."""
        seq, slot = entry.sequence, entry.slot
        assert self.owners[slot] is seq, "the slot still holds another's state"
        assert self.block_tables[slot][: len(seq.block_table)] == seq.block_table
        known = self.tokens[slot]
        assert known[: len(seq.token_ids)] == seq.token_ids, "the slot counts other tokens"
        assert entry.end <= len(known), "a step on tokens that nobody knows"
        if entry.num_tokens > 1:
            assert entry.end <= len(seq.token_ids), "the host builds a chunk of ids it has not seen"
        if entry.samples:
            assert entry.end == len(known)

    def _write(self, number: int, entry: ScheduledSequence, truth: Truth) -> None:
        seq, table = entry.sequence, self.block_tables[entry.slot]
        assert (
            self.tokens[entry.slot][entry.start : entry.end]
            == truth.tokens[entry.start : entry.end]
        )
        assert entry.end <= len(seq.block_table) * BLOCK_SIZE, "a write outside the table"
        assert entry.start >= seq.num_registered * BLOCK_SIZE, "a write to a findable block"
        for position in range(entry.start, entry.end):
            block, offset = table[position // BLOCK_SIZE], position % BLOCK_SIZE
            self.kv[block][offset] = KV(truth.prefixes[position], number)

    def _read(self, entry: ScheduledSequence, num_tokens: int) -> list[KV | None]:
        table = self.block_tables[entry.slot][: num_blocks_for(num_tokens)]
        return [kv for block in table for kv in self.kv[block]][:num_tokens]

    def _check_reads(self, entry: ScheduledSequence, truth: Truth) -> None:
        for position, kv in enumerate(self._read(entry, entry.end)):
            assert kv is not None, f"position {position} was never written"
            assert kv.prefix == truth.prefixes[position], f"position {position} is not its own"

    def _check_written_before(self, entry: ScheduledSequence, in_flight: Iterable[Step]) -> None:
        """A prefix that was found, or kept by a rewind, was written by steps that are done.

        One whose tokens were forced goes on from what its own steps in flight write.
        """
        others = {
            step.number
            for step in in_flight
            if not any(e.sequence is entry.sequence and e.is_current for e in step.batch.scheduled)
        }
        for kv in self._read(entry, entry.start):
            assert kv is not None
            assert kv.step not in others, "found while its step is in flight"


@dataclass(frozen=True)
class Before:
    """What a batch is judged against."""

    running: list[Sequence]
    num_tokens: dict[Sequence, int]
    behind: dict[Sequence, int]
    num_preemptions: dict[Sequence, int]

    forks: dict[Sequence, list[Sequence]]
    """Those that wait for their leader's prompt, by leader."""

    @classmethod
    def of(cls, scheduler: Scheduler, live: list[Sequence]) -> "Before":
        return cls(
            list(scheduler.running),
            {seq: seq.num_tokens for seq in live},
            {seq: seq.num_tokens - seq.num_computed for seq in live},
            {seq: seq.num_preemptions for seq in live},
            {seq: list(seq.forks) for seq in live if seq.forks},
        )


class CheckedScheduler(Scheduler):
    """Has the driver check every batch, and tells it which forks lose their prompt."""

    def __init__(self, driver: "Driver"):
        super().__init__(
            driver.num_blocks,
            driver.max_sequences,
            driver.max_batch_tokens,
            driver.prefix_caching,
        )
        self._driver = driver

    def schedule(self, only: set[Sequence] | None = None) -> Batch:
        before = Before.of(self, self._driver.live)
        batch = super().schedule(only)
        self._driver.check_schedule(batch, before, only)
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
    """The engine's own scheduler and pipeline over a model of the device. Satisfies `Outputs`."""

    num_blocks: int = 16
    max_sequences: int = 4
    max_batch_tokens: int = 64
    prefix_caching: bool = True
    can_end: bool = False

    live: list[Sequence] = field(default_factory=list)
    """In the order of arrival, a fork behind its leader. That is the scheduler's order too,
    whatever happens, but for forks that cannot share: those go behind all that run.
    """
    finished: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)
    rewound_forks: list[Sequence] = field(default_factory=list)
    orphans: list[Sequence] = field(default_factory=list)
    """Forks whose leader has failed."""

    def __post_init__(self) -> None:
        self.device = Device(self.num_blocks, self.max_sequences)
        self.scheduler = CheckedScheduler(self)
        self.pipeline = StepPipeline(self.scheduler, self.device, outputs=self)

    @property
    def truths(self) -> dict[Sequence, Truth]:
        return self.device.truths

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
        """The leader, if it has forks. Tokens can be forced on `guided` sequences."""
        prompt = list(prompt)
        leader: Sequence | None = None
        for variant in range(num_forks + 1):
            request = Request(
                f"request-{next(_numbers)}",
                prompt,
                SamplingParams(),
                StoppingParams(max_new_tokens),
                salt,
                grammar=Constraint() if guided else None,
                prompt_logprobs=prompt_logprobs and leader is None,
            )
            seq = Sequence(request, leader)
            assert num_blocks_for(seq.max_tokens) <= self.num_blocks, "a request that can never run"
            self.truths[seq] = truth = Truth(seq, self.can_end, variant)
            if isinstance(seq.constraint, Constraint):
                seq.constraint.tokens = truth.tokens
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
        """So many tokens are forced behind the next that is drawn for it."""
        assert isinstance(seq.constraint, Constraint), "only guided sequences have forced tokens"
        seq.constraint.num_forced = num_tokens

    @property
    def _pending(self) -> set[Sequence]:
        """Forks that wait for their leader's prompt."""
        return {fork for seq in self.live for fork in seq.forks}

    def _move_behind_running(self, orphans: list[Sequence]) -> None:
        """Forks that have to compute their prompts are the first that wait."""
        if orphans:
            kept = [seq for seq in self.live if seq not in orphans]
            running = [i for i, seq in enumerate(kept, 1) if seq in self.scheduler.running]
            index = max(running, default=0)
            while index < len(kept) and kept[index] in self._pending:
                index += 1
            self.live = kept[:index] + orphans + kept[index:]

    # -- what sequences produce ---------------------------------------------------------

    def take_token(self, seq: Sequence, token: SampledToken) -> bool:
        tokens = self.truths[seq].tokens
        assert token.token_id == seq.token_ids[-1]
        assert seq.token_ids == tokens[: len(seq.token_ids)], "not the sequence's own token"
        if token.token_id != END and len(seq.token_ids) < seq.max_tokens:
            return False
        self.live.remove(seq)
        self.finished.append(seq)
        return True

    def take_prompt_logprobs(self, seq: Sequence, start: int, logprobs: list[float]) -> None:
        assert seq.request.prompt_logprobs
        assert start + len(logprobs) < seq.num_prompt_tokens

    def take_failure(self, seq: Sequence, message: str) -> None:
        """A sequence fails only alone in a step that was lost."""
        assert message.startswith(StepLost.__name__), message
        self.orphans += seq.forks if seq in self.scheduler.running else []
        self.live.remove(seq)
        self.failed.append(seq)

    # -- one step ---------------------------------------------------------------------

    def step(self) -> None:
        """One step of the pipeline, as the engine takes it."""
        if len(self.in_flight) == MAX_IN_FLIGHT:
            self.collect()
        self._observe(self.pipeline.step)

    def launch(self, only: set[Sequence] | None = None, built: bool = True) -> Batch:
        """Schedule a step and launch it unless it is empty. One that is not `built` fails."""
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
        """The oldest step in flight fails, and the ones behind it are taken back; `isolate`
        looks for the sequence that is to blame.
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
        """Until nothing is left: a step computes at least one token of the oldest sequence."""
        num_steps = 16 + sum(2 * seq.max_tokens + 8 for seq in self.live)
        for _ in range(num_steps):
            if not self.live and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"no progress in {num_steps} steps")

    def check_schedule(self, batch: Batch, before: Before, only: set[Sequence] | None) -> None:
        """What must hold of every batch that is scheduled."""
        started = {entry.sequence for entry in batch.scheduled if entry.num_tokens == 0}
        for leader, forks in before.forks.items():
            if not leader.forks:
                self._move_behind_running([fork for fork in forks if fork not in started])
        self._check_batch(batch, before, only)

    # -- what must hold ---------------------------------------------------------------

    def check(self) -> None:
        """After every operation."""
        if self.device.violation is not None:
            raise self.device.violation
        scheduler, pool = self.scheduler, self.scheduler.pool
        scheduler.check_integrity()
        pending = self._pending
        present = [seq for seq in self.live if seq not in pending]
        assert scheduler.sequences == present, "lost, or out of order"
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

    def _check_batch(self, batch: Batch, before: Before, only: set[Sequence] | None) -> None:
        assert batch.num_tokens <= self.max_batch_tokens
        assert all(seq.slot >= 0 for seq in batch.reset), "a reset of a sequence without a slot"
        self._check_entries(batch, before)
        started = self._check_forks(batch, before)
        running = [seq for seq in self.scheduler.running if seq not in started]
        preempted = [s for s in before.running if s.num_preemptions > before.num_preemptions[s]]
        kept = before.running[: len(before.running) - len(preempted)]
        admitted = running[len(kept) :]
        assert preempted == before.running[len(kept) :], "an older one preempted"
        assert not preempted or preempted[0] is not self.live[0], "the oldest one preempted"
        assert running[: len(kept)] == kept
        if only is not None:  # forks go with their leader
            only = only | {seq for seq in started if seq.leader in only}
        self._check_fairness(batch, before, kept, admitted, only)
        self._check_admission(batch, admitted, only)
        if only is None and self.live:
            assert batch.scheduled or self.in_flight, "nothing runs and nothing will"

    def _check_forks(self, batch: Batch, before: Before) -> list[Sequence]:
        """Those that start do so directly behind their leader, in the batch and in the order of
        the running, on its full blocks and a copy of its last one; no other waits for it.
        """
        entries, started = batch.scheduled, []
        copies = dict(zip(*reversed(tuple(zip(*batch.copies, strict=True))), strict=True))
        running = self.scheduler.running
        assert len(set(copies)) == len(batch.copies), "two copies to one block"
        owners = [block for seq in running for block in seq.block_table]
        for index, entry in enumerate(entries):
            seq = entry.sequence
            if entry.num_tokens > 0:
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
                assert owners.count(block) == 1, "a copy to a shared block"
            started.append(seq)
        assert not copies, "a copy for nobody"
        completed = {e.sequence for e in entries if e.samples and e.sequence in before.forks}
        assert all(not seq.forks for seq in completed), "a fork left to wait for nothing"
        for seq in before.forks.keys() - completed:
            assert seq.forks == before.forks[seq], "a fork started or lost without a prompt"
        return started

    def _check_entries(self, batch: Batch, before: Before) -> None:
        """A step may write to blocks that forks share from this step on."""
        forks = {entry.sequence for entry in batch.scheduled if entry.num_tokens == 0}
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
            assert all(owners.count(block) == 1 for block in written), "a write to a shared block"

    def _check_fairness(
        self,
        batch: Batch,
        before: Before,
        kept: list[Sequence],
        admitted: list[Sequence],
        only: set[Sequence] | None,
    ) -> None:
        """Every decode; then prefills, oldest first, for as long as the budget lasts, of tokens
        or of logits for the logprobs of prompts.
        """
        entries = {entry.sequence: entry for entry in batch.scheduled}
        if only is not None:
            assert set(entries) <= only
            kept = [seq for seq in kept if seq in only]
        for seq in kept:
            if before.behind[seq] == 1 and before.num_tokens[seq] < seq.max_tokens:
                assert seq in entries, "a decode left out"
        prefills = [seq for seq in kept if before.behind[seq] > 1] + admitted
        scheduled = [seq for seq in prefills if seq in entries]
        if self._num_prompt_rows(batch) == PROMPT_LOGPROB_ROWS:
            return
        assert scheduled == prefills[: len(scheduled)], "a younger prefill first"
        assert all(entries[seq].samples for seq in scheduled[:-1]), "a younger prefill first"
        if len(scheduled) < len(prefills) or any(not e.samples for e in batch.scheduled):
            assert batch.num_tokens == self.max_batch_tokens, "budget left over"

    def _num_prompt_rows(self, batch: Batch) -> int:
        rows = [entry.num_prompt_rows for entry in batch.scheduled]
        assert batch.prompted == [i for i, num_rows in enumerate(rows) if num_rows]
        assert sum(rows) <= PROMPT_LOGPROB_ROWS
        return sum(rows)

    def _check_admission(
        self, batch: Batch, admitted: list[Sequence], only: set[Sequence] | None
    ) -> None:
        entries = {entry.sequence: entry for entry in batch.scheduled}
        assert only is None or not admitted
        for seq in admitted:
            assert seq in batch.reset
            num_known = seq.num_tokens - entries[seq].samples
            assert num_known == len(seq.token_ids), "admitted with ids in flight"
            assert len(seq.block_table) == num_blocks_for(num_known)
        waiting = self.scheduler.waiting
        has_room = len(self.scheduler.running) < self.max_sequences
        if only is None and waiting and has_room and batch.num_tokens < self.max_batch_tokens:
            head = waiting[0]
            if head.wants_prompt_logprobs and self._num_prompt_rows(batch) == PROMPT_LOGPROB_ROWS:
                return
            fits = num_blocks_for(head.num_tokens) <= self.scheduler.pool.num_idle
            assert head.num_in_flight or not fits, "the head of the queue fits, and waits"
