"""Decides which sequences compute how many tokens in the next step.

There are no phases. A sequence has tokens known and tokens computed; a step closes the gap
within a token budget. Prefill, chunked prefill, prefix hits, decoding, preemption and replay
after a fault are all this one arithmetic.

The rules, in order:

1. Running sequences that are one token behind (decodes) are scheduled first. The budget always
   holds all of them, so a prefill cannot starve them.
2. Running sequences that are further behind (prefills) follow, oldest first, in chunks. Beside
   decodes they get no more tokens than the caller allows, so that the step does not take long.
3. Waiting sequences are admitted strictly first come, first served, each with blocks for every
   token it knows. Blocks that already hold a prefix of it are shared.
4. The step that completes a prompt also starts the forks of its sequence: they share its full
   blocks, get a copy of the last block, and sample from the same logits.

Only a running sequence that has grown can find no idle block. Then the youngest running sequence
is preempted: its blocks are released, and it waits at the head of the queue to be recomputed.

Steps run on one stream in the order of their launch. So a block that is released while a
launched step still writes to it can be handed out at once: its next owner writes later, and
nothing in it is findable until a completed step registers it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, cast

from engine.core.block_pool import BlockHash, BlockHasher, BlockPool
from engine.core.config import BLOCK_SIZE
from engine.core.sequence import NO_SLOT, Sequence, SequenceStatus

PROMPT_LOGPROB_ROWS = 256
"""Rows of logits that one step keeps for prompt logprobs, at most."""


class ScheduledSequence(NamedTuple):
    """A sequence's share of one step: its tokens from position `start`.

    slot                  index of the sequence's state on the device
    num_scheduled_tokens  how many tokens the step computes; 0 in the first step of a fork, which
                          samples from the logits of the entry before it
    samples               these are the sequence's last known tokens: the step samples the next
    num_preemptions       of the sequence, when it was scheduled
    """

    sequence: Sequence
    slot: int
    start: int
    num_scheduled_tokens: int
    samples: bool
    num_preemptions: int

    @property
    def end(self) -> int:
        return self.start + self.num_scheduled_tokens

    @property
    def num_prompt_rows(self) -> int:
        """How many of its first tokens have logits that are needed for prompt logprobs."""
        seq = self.sequence
        if not seq.request.prompt_logprobs:
            return 0
        return max(min(self.end, seq.num_prompt_tokens - 1) - self.start, 0)

    @property
    def is_current(self) -> bool:
        """Whether the sequence still owns the blocks that this step writes to."""
        seq = self.sequence
        return not seq.is_finished and seq.num_preemptions == self.num_preemptions


# Skips the checks of `__new__`, which take three times as long as making the tuple.
_entry = cast(
    Callable[[tuple[Sequence, int, int, int, bool, int]], ScheduledSequence],
    partial(tuple.__new__, ScheduledSequence),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of one step, and what has changed in their slots since the last step.

    scheduled  what each sequence computes, in the order of the packed row
    reset      scheduled sequences that are new to their slot or were rewound, so the slot's state
               has to be written anew
    grown      blocks appended to block tables: (slot, index in the table, block)
    copies     blocks to copy after the step's forward: (source, target)
    prompted   indices of scheduled sequences with rows for prompt logprobs
    """

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    reset: list[Sequence] = field(default_factory=list)
    grown: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    prompted: list[int] = field(default_factory=list)

    @property
    def num_scheduled_tokens(self) -> int:
        return sum(entry.num_scheduled_tokens for entry in self.scheduled)


@dataclass(slots=True)
class _Budget:
    """What a step can still take."""

    tokens: int
    prompt_rows: int = PROMPT_LOGPROB_ROWS

    def chunk(self, seq: Sequence) -> int:
        """How many of the sequence's known tokens can be computed within the budget."""
        chunk = min(seq.num_tokens - seq.num_computed, self.tokens)
        return min(chunk, self.prompt_rows) if seq.wants_prompt_logprobs else chunk

    def take(self, entry: ScheduledSequence) -> None:
        self.tokens -= entry.num_scheduled_tokens
        self.prompt_rows -= entry.num_prompt_rows


class _Refused(NamedTuple):
    """The head of the waiting queue, for which there were too few idle blocks.

    num_tokens  that it knew then
    num_needed  idle blocks that it needs, those of its cached prefix among them
    following   hash of the first block behind that prefix, if its prompt has one
    """

    sequence: Sequence
    num_tokens: int
    num_needed: int
    following: list[BlockHash]


class Scheduler:
    """Owns the waiting and running queues, the block pool and the slots. Knows no tensors."""

    def __init__(
        self,
        num_blocks: int,
        max_sequences: int,
        max_batch_tokens: int,
        prefix_caching: bool = True,
        hash_key: bytes | None = None,
        step_multiple: int = 1,
    ):
        """Beside decodes, prompts that are long enough fill a step up to a multiple of
        `step_multiple` tokens: captured steps have such sizes.
        """
        assert max_sequences <= max_batch_tokens, "the budget must hold every decode"
        self.pool = BlockPool(num_blocks)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._max_batch_tokens = max_batch_tokens
        self._step_multiple = step_multiple
        self._prefix_caching = prefix_caching
        self._refused: _Refused | None = None
        self._hasher = BlockHasher(hash_key)
        # Running sequences whose slot holds other state, until a step resets it.
        self._stale: set[Sequence] = set()
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0
        self.num_prefix_lookup_tokens = 0

    # -- requests come and go ---------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. A fork must be added before the first step of its leader.

        A fork that needs prompt logprobs is queued like any other sequence, because it has to
        compute the prompt itself.
        """
        if seq.leader is None or seq.wants_prompt_logprobs:
            seq.leader = None
            self.waiting.append(seq)
        else:
            seq.leader.forks.append(seq)

    def finish(self, seq: Sequence) -> None:
        """Remove the sequence from its queue and release its blocks. Idempotent."""
        if seq.is_finished:
            return
        place = 0
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        elif seq.leader is not None:
            seq.leader.forks.remove(seq)
        else:
            place = self.waiting.index(seq)
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        self._orphan(seq.forks, place)
        seq.forks = []

    def drop_in_flight(self, seq: Sequence) -> None:
        """Ignore what steps in flight sample: the host has appended forced tokens instead."""
        seq.num_tokens = len(seq.token_ids)
        if seq.status is SequenceStatus.RUNNING:
            self._stale.add(seq)  # its slot counts other tokens

    def _orphan(self, forks: list[Sequence], place: int = 0) -> None:
        """Queue forks that can no longer share their leader's prompt, to compute it themselves.

        place  index in the waiting queue: its head, or where their leader was
        """
        for seq in reversed(forks):
            seq.leader = None
            self.waiting.insert(place, seq)

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    # -- one step ---------------------------------------------------------------------

    def schedule(
        self, only: set[Sequence] | None = None, prefill_limit: int | None = None
    ) -> Batch:
        """Schedule the next step. Its batch is empty when nothing can run.

        With `only`, just these running sequences and their forks are scheduled. Beside decodes,
        prefills get at most `prefill_limit` tokens together; None leaves them the whole budget.
        """
        batch, budget = Batch(), _Budget(self._max_batch_tokens)
        self._schedule_decodes(batch, budget, only)
        if batch.scheduled and prefill_limit is not None:
            num_decodes = self._max_batch_tokens - budget.tokens
            budget.tokens = min(budget.tokens, self._filling(prefill_limit, num_decodes))
        self._schedule_prefills(batch, budget, only)
        if only is None:
            self._admit(batch, budget)
        return batch

    def _filling(self, prefill_limit: int, num_decodes: int) -> int:
        """Return the most tokens within the limit that make a step of a whole size."""
        surplus = (num_decodes + prefill_limit) % self._step_multiple
        return prefill_limit - surplus if surplus < prefill_limit else prefill_limit

    def _schedule_decodes(self, batch: Batch, budget: _Budget, only: set[Sequence] | None) -> None:
        """Schedule the sequences that are one token behind.

        Sequences further behind get their blocks here as well: that may preempt another
        sequence, which must not be scheduled in this step yet.
        """
        for seq in tuple(self.running):
            num_tokens = seq.num_tokens
            behind = num_tokens - seq.num_computed
            if (
                behind == 0
                or num_tokens >= seq.max_tokens
                or (only is not None and seq not in only)
            ):
                continue
            if num_tokens > len(seq.block_table) * BLOCK_SIZE and not self._grow(batch, seq):
                continue
            if behind == 1:
                self._schedule(batch, seq, 1, samples=True)
                budget.tokens -= 1
                if seq.forks:
                    self._start_forks(batch, seq)

    def _schedule_prefills(self, batch: Batch, budget: _Budget, only: set[Sequence] | None) -> None:
        for seq in tuple(self.running):
            if seq.num_tokens - seq.num_computed > 1 and (only is None or seq in only):
                self._commit(batch, budget, seq)

    def _admit(self, batch: Batch, budget: _Budget) -> None:
        while self.waiting and self._free_slots and budget.chunk(self.waiting[0]) > 0:
            seq = self.waiting[0]
            # A preempted sequence may have ids that only the device knows yet.
            if seq.num_in_flight or not self._take_blocks(seq):
                return
            self.waiting.popleft()
            self._start(seq, len(self.running))
            self._commit(batch, budget, seq)

    def _start(self, seq: Sequence, index: int) -> None:
        self.running.insert(index, seq)
        seq.status = SequenceStatus.RUNNING
        seq.slot = self._free_slots.pop()
        self._stale.add(seq)

    def _commit(self, batch: Batch, budget: _Budget, seq: Sequence) -> None:
        """Schedule as many of the sequence's tokens as the budget allows."""
        num_tokens = budget.chunk(seq)
        if num_tokens == 0:
            return
        samples = seq.num_computed + num_tokens == seq.num_tokens
        entry = self._schedule(batch, seq, num_tokens, samples)
        budget.take(entry)
        if entry.num_prompt_rows:
            batch.prompted.append(len(batch.scheduled) - 1)
        if samples and seq.forks:
            self._start_forks(batch, seq)

    def _schedule(
        self, batch: Batch, seq: Sequence, num_tokens: int, samples: bool
    ) -> ScheduledSequence:
        start = seq.num_computed
        entry = _entry((seq, seq.slot, start, num_tokens, samples, seq.num_preemptions))
        batch.scheduled.append(entry)
        seq.num_computed = start + num_tokens
        seq.num_tokens += samples
        if seq in self._stale:
            self._stale.remove(seq)
            batch.reset.append(seq)
        return entry

    def _start_forks(self, batch: Batch, leader: Sequence) -> None:
        """Start the forks of a leader whose prompt this step completes, or queue them if there is
        no room.
        """
        forks, leader.forks = leader.forks, []
        index = self.running.index(leader)
        while forks and self._free_slots and self._share_prompt(batch, leader, forks[0]):
            seq, index = forks.pop(0), index + 1
            self._start(seq, index)  # right after its leader: equally old
            self._schedule(batch, seq, num_tokens=0, samples=True)
        self._orphan(forks)

    def _share_prompt(self, batch: Batch, leader: Sequence, seq: Sequence) -> bool:
        """Give a fork the blocks of its leader's prompt; False if there is no idle block.

        A last block that is not full is copied at once, not on the first write: leader and fork
        both write to it in the next step.
        """
        num_full, in_last = divmod(seq.num_tokens, BLOCK_SIZE)
        if in_last and self.pool.num_idle == 0:
            return False
        full = leader.block_table[:num_full]
        self.pool.share(full)
        last = self.pool.allocate(1) if in_last else []
        batch.copies.extend(zip(leader.block_table[num_full : num_full + 1], last, strict=True))
        seq.block_table = full + last
        seq.num_computed = seq.num_tokens
        return True

    # -- blocks -----------------------------------------------------------------------

    def _grow(self, batch: Batch, seq: Sequence) -> bool:
        """Append the blocks that the sequence needs for its known tokens.

        Returns False if the sequence is not running any more: it was preempted here, or to make
        room for an older sequence.
        """
        if seq.status is not SequenceStatus.RUNNING:
            return False
        length = len(seq.block_table)
        while seq.num_tokens > len(seq.block_table) * BLOCK_SIZE:
            while self.pool.num_idle == 0:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is seq:
                    return False
            seq.block_table += self.pool.allocate(1)
        # Listed at the end: if it is preempted half way, its slot may get a new owner in this step.
        grown = enumerate(seq.block_table[length:], start=length)
        batch.grown.extend((seq.slot, index, block) for index, block in grown)
        return True

    def _take_blocks(self, seq: Sequence) -> bool:
        """Take blocks for every known token, sharing a cached prefix; False if they do not fit."""
        if self._is_still_refused(seq):
            return False
        hits = self._find_prefix(seq)
        num_new = -(-seq.num_tokens // BLOCK_SIZE) - len(hits)
        num_needed = num_new + self.pool.count_idle(hits)
        if num_needed > self.pool.num_idle:
            following = seq.block_hashes[len(hits) : (seq.num_tokens - 1) // BLOCK_SIZE][:1]
            self._refused = _Refused(seq, seq.num_tokens, num_needed, following)
            return False
        self._refused = None
        self.pool.share(hits)
        seq.block_table = hits + self.pool.allocate(num_new)
        seq.num_computed = seq.num_completed = len(hits) * BLOCK_SIZE
        seq.num_registered = len(hits)
        self.num_prefix_hit_tokens += seq.num_computed
        self.num_prefix_lookup_tokens += seq.num_tokens
        return True

    def _is_still_refused(self, seq: Sequence) -> bool:
        """Whether the head of the queue needs too many blocks, as it did when it was looked up.

        Until the block after its cached prefix is findable too, it cannot need fewer: no other
        sequence is admitted meanwhile and shares idle blocks of that prefix.
        """
        refused = self._refused
        return (
            refused is not None
            and refused.sequence is seq
            and refused.num_tokens == seq.num_tokens
            and refused.num_needed > self.pool.num_idle
            and not self.pool.find(refused.following)
        )

    def _find_prefix(self, seq: Sequence) -> list[int]:
        """Return the blocks of the longest cached prefix that leaves one token to compute."""
        if not self._prefix_caching or seq.wants_prompt_logprobs:
            return []
        num_blocks = (seq.num_tokens - 1) // BLOCK_SIZE
        self._extend_hashes(seq, num_blocks)
        return self.pool.find(seq.block_hashes[:num_blocks])

    def _extend_hashes(self, seq: Sequence, num_blocks: int) -> None:
        hashes = seq.block_hashes
        if len(hashes) < num_blocks:
            parent = hashes[-1] if hashes else self._hasher.root(seq.request.cache_salt)
            unhashed = seq.token_ids[len(hashes) * BLOCK_SIZE : num_blocks * BLOCK_SIZE]
            hashes += self._hasher.chain(parent, unhashed)

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release(seq)
        seq.num_computed = seq.num_completed = seq.num_registered = 0
        seq.num_preemptions += 1
        seq.leader = None  # a fork in its first step has to compute its prompt itself now
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _release(self, seq: Sequence) -> None:
        self.pool.release(seq.block_table)
        seq.block_table = []
        self._free_slots.append(seq.slot)
        self._stale.discard(seq)
        seq.slot = NO_SLOT

    # -- steps come back --------------------------------------------------------------

    def complete(self, batch: Batch) -> None:
        """Note that the step has run: its KV is on the device, and full blocks become findable."""
        for entry in batch.scheduled:
            if not entry.is_current:
                continue
            seq = entry.sequence
            seq.leader = None
            seq.num_completed = end = entry.start + entry.num_scheduled_tokens
            if end >= (seq.num_registered + 1) * BLOCK_SIZE and self._prefix_caching:
                self._register(seq)

    def _register(self, seq: Sequence) -> None:
        num_full = seq.num_completed // BLOCK_SIZE
        self._extend_hashes(seq, num_full)
        for index in range(seq.num_registered, num_full):
            self.pool.register(seq.block_table[index], seq.block_hashes[index])
        seq.num_registered = num_full

    def rewind(self, seq: Sequence) -> None:
        """Return the sequence to what completed steps have computed; steps in flight were lost."""
        seq.num_tokens = len(seq.token_ids)
        seq.num_computed = seq.num_completed
        if seq.leader is not None and seq.status is SequenceStatus.RUNNING:
            self._preempt(seq)  # a fork whose prompt was lost, in blocks shared with its leader
        elif seq.status is SequenceStatus.RUNNING:
            self._stale.add(seq)

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, slots and queues agree."""
        self.pool.check_integrity([seq.block_table for seq in self.running])
        slots = [seq.slot for seq in self.running] + self._free_slots
        assert len(set(slots)) == len(slots), "a slot with two owners"
        forks = [fork for seq in self.sequences for fork in seq.forks]
        assert all(not seq.block_table and seq.slot == NO_SLOT for seq in [*self.waiting, *forks])
        assert self._stale <= set(self.running), "a slot to reset that has no owner"
        for seq in self.running:
            assert seq.num_completed <= seq.num_computed <= seq.num_tokens <= seq.max_tokens
            assert seq.num_computed <= len(seq.block_table) * BLOCK_SIZE
