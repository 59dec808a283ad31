"""A model of the device, which checks every block that a step reads.

For each position of each block, the device remembers which prefix its KV was computed from.
Its stream runs steps in the order of their launch, so in this model a step writes when it is
launched. Every launch then checks that each sequence finds its own prefix, and nothing else, at
every position it attends to. Any mistake with blocks (two owners, use after free, a hit on a
block whose step is still in flight) shows as a position that holds another prefix.

The tokens of a sequence are a function of its prefix and its fork, so the right output of a
request is known beforehand. Some of them may be forced, as a grammar does: the host appends
these.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count
from zlib import crc32

from engine.core.config import BLOCK_SIZE
from engine.core.pipeline import SampledToken, StepOutput
from engine.core.request import ConstraintState
from engine.core.scheduler import (
    Batch,
    ScheduledSequence,
)
from engine.core.sequence import Sequence

END = 0
"""The token that ends a sequence. The host sees it when the next step is already in flight."""

Prefix = tuple[bytes, bytes]
"""(cache salt, every token up to and including the position)."""

_step_numbers = count()


def next_token(tokens: Iterable[int], variant: int = 0) -> int:
    """Return the token that follows these in the given variant of the text."""
    digest = crc32(bytes(tokens), variant)
    return END if digest % 31 == 0 else 1 + digest % 2


def num_blocks_for(num_tokens: int) -> int:
    """Return how many blocks hold this many tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class ExpectedText:
    """The tokens that a sequence has to produce, up to `max_tokens` even if it ends before.

    Each fork of a prompt has its own `variant` of the text.
    """

    def __init__(self, seq: Sequence, can_end: bool, variant: int = 0):
        self.tokens = list(seq.token_ids)
        while len(self.tokens) < seq.max_tokens:
            token = next_token(self.tokens, variant)
            self.tokens.append(token if can_end else max(token, 1))
        self.prefixes: list[Prefix] = [
            (seq.request.cache_salt, bytes(self.tokens[: i + 1])) for i in range(len(self.tokens))
        ]

    def prompt_tokens(self, start: int, num_rows: int) -> list[SampledToken]:
        """Return the tokens after these positions, their logprobs one number a prefix."""
        prefixes = self.prefixes[start + 1 : start + 1 + num_rows]
        return [SampledToken(tokens[-1], -float(crc32(tokens)), []) for _, tokens in prefixes]


@dataclass(frozen=True, slots=True)
class KV:
    """The KV at one position of a block; `prefix` is None if the step that wrote it was lost."""

    prefix: Prefix | None
    step: int


class StepLost(Exception):
    """Raised by a step that the device has lost."""


class Step:
    """A step on the model of the device; implements `LaunchedStep`.

    The forward runs at launch. So does the sampling, unless a sequence of the step is guided.
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
        """Sample every row. A guided row without its mask gets a token that does not count."""
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
        assert not self.needs_sampling, "the step was collected before its sampling was launched"
        self.wait()
        if self.is_lost:
            raise StepLost
        samples = any(entry.samples for entry in self.batch.scheduled)
        return StepOutput(
            [SampledToken(token, None, []) for token in self._tokens] if samples else None,
            self._device.prompt_tokens(self),
        )

    def wait(self) -> None:
        if not self.is_done:
            self._device.now += 1 + self.batch.num_scheduled_tokens * self._device.token_s
        self.is_done = True


class Constraint:
    """A grammar that allows every token; implements `TokenConstraint` and `ConstraintState`.

    It forces `num_forced` tokens after the token that is sampled next.
    """

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
        assert self.tokens[self.num_seen] == token_id, (
            "the sequence got a token that is not its next one"
        )
        self.num_seen += 1

    def forced(self) -> list[int]:
        """Return the tokens that have to follow. The pipeline samples a single one as usual."""
        num_forced, self.num_forced = self.num_forced, 0
        return self.tokens[self.num_seen : self.num_seen + num_forced]


class Device:
    """The KV of each block, and the state of each slot; implements `Executor`.

    The slot state stands for that of the real step builder, sampler and model runner.
    """

    def __init__(self, num_blocks: int, max_sequences: int, token_s: float = 0.0):
        """A step takes a second, and each of its tokens `token_s` more."""
        self.token_s = token_s
        self.now = 1.0
        """The time in seconds, which passes while steps run."""
        self.kv: list[list[KV | None]] = [[None] * BLOCK_SIZE for _ in range(num_blocks)]
        self.block_tables = [[0] * num_blocks for _ in range(max_sequences)]
        self.owners: list[Sequence | None] = [None] * max_sequences
        self.tokens: list[list[int]] = [[] for _ in range(max_sequences)]
        self.expected: dict[Sequence, ExpectedText] = {}
        self.steps: list[Step] = []
        """Launched steps that may still be running."""
        self.fails_next = False
        """Whether the next launch fails before the device sees it."""
        self.has_failed = False
        """Whether the last launch failed and the device has not recovered from it yet."""
        self.violation: AssertionError | None = None
        """The check that a launch has failed, if any."""

    def launch(self, batch: Batch) -> Step:
        try:
            return self._launch(batch)
        except AssertionError as error:  # the pipeline would take it for a failed launch
            self.violation = error
            raise

    def _launch(self, batch: Batch) -> Step:
        assert not self.has_failed, "a step was launched before the failed launch was collected"
        if self.fails_next:
            self.fails_next, self.has_failed = False, True
            raise StepLost
        step = Step(next(_step_numbers), batch, self)
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
            self._write(step.number, entry, self.expected[entry.sequence])
        for entry in step.batch.scheduled:
            if entry.num_scheduled_tokens > 0:
                self._check_reads(entry, self.expected[entry.sequence])
        self._copy(step)
        for entry in step.batch.scheduled:
            self._check_reads(entry, self.expected[entry.sequence])
            if entry.sequence in step.batch.reset and entry.num_scheduled_tokens > 0:
                self._check_written_before(entry, self._in_flight())

    def sample(self, step: Step, unmasked: set[int]) -> list[int]:
        """Sample one token a row; -1 for a guided row without its mask."""
        drawn = []
        for row, entry in enumerate(entry for entry in step.batch.scheduled if entry.samples):
            assert self.owners[entry.slot] is entry.sequence
            drawn.append(-1 if row in unmasked else self.expected[entry.sequence].tokens[entry.end])
            self.tokens[entry.slot].append(drawn[-1])
        return drawn

    def prompt_tokens(self, step: Step) -> list[SampledToken]:
        return [
            token
            for entry in step.batch.scheduled
            for token in self.expected[entry.sequence].prompt_tokens(
                entry.start, entry.num_prompt_rows
            )
        ]

    def _copy(self, step: Step) -> None:
        for source, target in step.batch.copies:
            self.kv[target] = [
                None if kv is None else replace(kv, step=step.number) for kv in self.kv[source]
            ]

    def lose(self) -> None:
        """Lose all steps in flight: the oldest fails, and the others ran on what it left behind.

        Whatever they wrote is invalid from now on.
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
        """Check that the slot has the block table and the tokens of the entry's sequence."""
        seq, slot = entry.sequence, entry.slot
        assert self.owners[slot] is seq, "the slot still belongs to another sequence"
        assert self.block_tables[slot][: len(seq.block_table)] == seq.block_table
        known = self.tokens[slot]
        assert known[: len(seq.token_ids)] == seq.token_ids, (
            "the slot has other tokens than the sequence"
        )
        assert entry.end <= len(known), "the step reads tokens that were never sampled"
        if entry.num_scheduled_tokens > 1:
            assert entry.end <= len(seq.token_ids), (
                "the host does not know all tokens of a chunk yet"
            )
        if entry.samples:
            assert entry.end == len(known)

    def _write(self, number: int, entry: ScheduledSequence, text: ExpectedText) -> None:
        seq, table = entry.sequence, self.block_tables[entry.slot]
        assert (
            self.tokens[entry.slot][entry.start : entry.end] == text.tokens[entry.start : entry.end]
        )
        assert entry.end <= len(seq.block_table) * BLOCK_SIZE, (
            "the step writes past its block table"
        )
        assert entry.start >= seq.num_registered * BLOCK_SIZE, (
            "the step writes to a registered block"
        )
        for position in range(entry.start, entry.end):
            block, offset = table[position // BLOCK_SIZE], position % BLOCK_SIZE
            self.kv[block][offset] = KV(text.prefixes[position], number)

    def _read(self, entry: ScheduledSequence, num_tokens: int) -> list[KV | None]:
        table = self.block_tables[entry.slot][: num_blocks_for(num_tokens)]
        return [kv for block in table for kv in self.kv[block]][:num_tokens]

    def _check_reads(self, entry: ScheduledSequence, text: ExpectedText) -> None:
        for position, kv in enumerate(self._read(entry, entry.end)):
            assert kv is not None, f"position {position} was never written"
            assert kv.prefix == text.prefixes[position], f"position {position} holds another prefix"

    def _check_written_before(self, entry: ScheduledSequence, in_flight: Iterable[Step]) -> None:
        """Check that a cached prefix, or one kept by a rewind, was written by steps that are done.

        A sequence with forced tokens may also build on its own steps in flight.
        """
        others = {
            step.number
            for step in in_flight
            if not any(e.sequence is entry.sequence and e.is_current for e in step.batch.scheduled)
        }
        for kv in self._read(entry, entry.start):
            assert kv is not None
            assert kv.step not in others, (
                "a prefix was used while the step that writes it is in flight"
            )
