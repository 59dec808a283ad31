"""A scheduler driven as the engine drives it, over a model of the device.

The device remembers, for each position of each block, which prefix its KV was computed
from. Its stream runs steps in the order of their launch, so here a step writes when it is
launched. Every launch then checks that each sequence finds its own prefix, and nothing
else, at every position it attends to: whatever goes wrong with blocks (two owners, use
after free, a hit on what is not there yet) shows as a position with another's content.

"Text" is a function of the prefix, and of which fork it is, so what a request must answer is
known beforehand. A part of it may be forced, as a grammar does: the host appends it.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from zlib import crc32

from engine.core.config import BLOCK_SIZE
from engine.core.request import Request, SamplingParams, StoppingParams
from engine.core.scheduler import (
    PROMPT_LOGPROB_ROWS,
    Batch,
    ScheduledSequence,
    Scheduler,
)
from engine.core.sequence import Sequence, SequenceStatus

END = 0
"""The token that ends a sequence: found at the collection, when the next step is launched."""

MAX_IN_FLIGHT = 2

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


@dataclass(frozen=True, slots=True)
class Step:
    """`built` is False for a step that failed before the device or the slots saw it.

    What it draws for the `discarded` sequences does not count.
    """

    number: int
    batch: Batch
    built: bool
    discarded: set[Sequence] = field(default_factory=set)

    @property
    def sequences(self) -> list[Sequence]:
        """Those still wanted."""
        entries = self.batch.scheduled
        return [entry.sequence for entry in entries if not entry.sequence.is_finished]


class Device:
    """KV by block; by slot, what `StepBuilder`, `Sampler` and `ModelRunner` keep."""

    def __init__(self, num_blocks: int, max_sequences: int):
        self.kv: list[list[KV | None]] = [[None] * BLOCK_SIZE for _ in range(num_blocks)]
        self.block_tables = [[0] * num_blocks for _ in range(max_sequences)]
        self.owners: list[Sequence | None] = [None] * max_sequences
        self.tokens: list[list[int]] = [[] for _ in range(max_sequences)]

    def run(self, step: Step, truths: dict[Sequence, Truth], in_flight: Iterable[Step]) -> None:
        """`in_flight` are the steps before it that are not known to be done."""
        self._update_slots(step.batch)
        for entry in step.batch.scheduled:
            self._check_slot(entry)
            self._write(step.number, entry, truths[entry.sequence])
        for entry in step.batch.scheduled:
            if entry.num_tokens > 0:
                self._check_reads(entry, truths[entry.sequence])
        self._copy(step)
        for entry in step.batch.scheduled:
            self._check_reads(entry, truths[entry.sequence])
            if entry.sequence in step.batch.reset and entry.num_tokens > 0:
                self._check_written_before(entry, in_flight)
            if entry.samples:
                self.tokens[entry.slot].append(truths[entry.sequence].tokens[entry.end])

    def _copy(self, step: Step) -> None:
        for source, target in step.batch.copies:
            self.kv[target] = [
                None if kv is None else replace(kv, step=step.number) for kv in self.kv[source]
            ]

    def forget_draws(self, step: Step, seq: Sequence) -> None:
        """What the step has drawn for the sequence is not what comes next."""
        for entry in step.batch.scheduled:
            if entry.sequence is seq and entry.samples and self.owners[entry.slot] is seq:
                self.tokens[entry.slot][entry.end] = -1

    def lose(self, step: Step) -> None:
        """The step has left rubbish wherever it wrote."""
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


@dataclass
class Driver:
    """`Engine` without a model: the same calls on the scheduler in the same order."""

    num_blocks: int = 16
    max_sequences: int = 4
    max_batch_tokens: int = 64
    prefix_caching: bool = True
    can_end: bool = False

    truths: dict[Sequence, Truth] = field(default_factory=dict)
    live: list[Sequence] = field(default_factory=list)
    """In the order of arrival, a fork behind its leader. That is the scheduler's order too,
    whatever happens, but for forks that cannot share: those go behind all that run.
    """
    forced: dict[Sequence, int] = field(default_factory=dict)
    """How many tokens will be forced behind the next one that is drawn."""
    finished: list[Sequence] = field(default_factory=list)
    in_flight: deque[Step] = field(default_factory=deque)
    suspects: list[set[Sequence]] = field(default_factory=list)
    num_launched: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self.num_blocks, self.max_sequences, self.max_batch_tokens, self.prefix_caching
        )
        self.device = Device(self.num_blocks, self.max_sequences)

    # -- requests ---------------------------------------------------------------------

    def add(
        self,
        prompt: Iterable[int],
        max_new_tokens: int,
        salt: bytes = b"",
        num_forks: int = 0,
        prompt_logprobs: bool = False,
    ) -> Sequence:
        """The leader, if it has forks."""
        prompt = list(prompt)
        leader: Sequence | None = None
        for variant in range(num_forks + 1):
            request = Request(
                f"request-{next(_numbers)}",
                prompt,
                SamplingParams(),
                StoppingParams(max_new_tokens),
                salt,
                prompt_logprobs=prompt_logprobs and leader is None,
            )
            seq = Sequence(request, leader)
            assert num_blocks_for(seq.max_tokens) <= self.num_blocks, "a request that can never run"
            self.truths[seq] = Truth(seq, self.can_end, variant)
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
        self.forced[seq] = num_tokens

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

    # -- one step ---------------------------------------------------------------------

    def step(self) -> None:
        """As `Engine.step`."""
        if self.suspects:
            if self.launch(only=self.suspects.pop()).scheduled:
                self.collect()
            return
        if len(self.in_flight) == MAX_IN_FLIGHT:
            self.collect()
        launched = bool(self.launch().scheduled)
        if self.in_flight and not (launched and len(self.in_flight) < MAX_IN_FLIGHT):
            self.collect()

    def launch(self, only: set[Sequence] | None = None, built: bool = True) -> Batch:
        """Schedule a step and launch it unless it is empty. One that is not `built` fails."""
        assert len(self.in_flight) < MAX_IN_FLIGHT
        assert all(step.built for step in self.in_flight), "a launch on top of a failed one"
        before = Before.of(self.scheduler, self.live)
        batch = self.scheduler.schedule(only)
        started = {entry.sequence for entry in batch.scheduled if entry.num_tokens == 0}
        for leader, forks in before.forks.items():
            if not leader.forks:
                self._move_behind_running([fork for fork in forks if fork not in started])
        self._check_batch(batch, before, only)
        if batch.scheduled:
            step = Step(self.num_launched, batch, built)
            self.num_launched += 1
            if built:
                self.device.run(step, self.truths, self.in_flight)
            self.in_flight.append(step)
        self.check()
        return batch

    def collect(self) -> None:
        if not self.in_flight[0].built:
            self.lose()
            return
        step = self.in_flight.popleft()
        self.scheduler.complete(step.batch)
        for entry in step.batch.scheduled:
            seq = entry.sequence
            if entry.samples and not seq.is_finished and seq not in step.discarded:
                self._append(seq)
                self._append_forced(seq, self.forced.pop(seq, 0))
        self.check()

    def _append_forced(self, seq: Sequence, num_tokens: int) -> None:
        """As `Engine._follow` and `Engine._emit_forced`."""
        if num_tokens == 0:
            return
        for step in self.in_flight:
            step.discarded.add(seq)
            if step.built:
                self.device.forget_draws(step, seq)
        for _ in range(num_tokens):
            if not seq.is_finished:
                self._append(seq)
        if not seq.is_finished:
            self.scheduler.skip_ahead(seq)

    def _append(self, seq: Sequence) -> None:
        tokens = self.truths[seq].tokens
        seq.token_ids.append(tokens[len(seq.token_ids)])
        assert seq.token_ids == tokens[: len(seq.token_ids)]
        if seq.token_ids[-1] == END or len(seq.token_ids) == seq.max_tokens:
            self.scheduler.finish(seq)
            self.live.remove(seq)
            self.finished.append(seq)

    def lose(self, isolate: bool = True) -> None:
        """The oldest step in flight has failed, and those after it ran on what it left."""
        failed, lost = self.in_flight[0], tuple(self.in_flight)
        self.in_flight.clear()
        for step in lost:
            if step.built:
                self.device.lose(step)
        sequences = {seq for step in lost for seq in step.sequences}
        forks = [
            entry.sequence
            for step in lost
            for entry in step.batch.scheduled
            if entry.num_tokens == 0 and entry.is_current
        ]
        for seq in reversed(self.live):
            if seq in sequences:
                self.scheduler.rewind(seq)
                assert seq.num_tokens == len(seq.token_ids)
                assert seq.num_computed == seq.num_completed
        self._move_behind_running([seq for seq in self.live if seq in forks])
        if isolate:
            half = -(-len(failed.sequences) // 2)
            halves = set(failed.sequences[half:]), set(failed.sequences[:half])
            self.suspects += [group for group in halves if group]
        self.check()

    def drain(self) -> None:
        """Until nothing is left: a step computes at least one token of the oldest sequence."""
        num_steps = 8 + len(self.suspects) + sum(2 * seq.max_tokens + 8 for seq in self.live)
        for _ in range(num_steps):
            if not self.live and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"no progress in {num_steps} steps")

    # -- what must hold ---------------------------------------------------------------

    def check(self) -> None:
        """After every operation."""
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
