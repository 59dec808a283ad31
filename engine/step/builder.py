"""Building one step's inputs from the scheduler's batch of ids, with numpy.

What stays the same from step to step (block tables, sampling parameters) lives in arrays
indexed by slot and is updated by difference; the rest is computed here in a few numpy
calls and reaches the device in one copy.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from engine.attention.interface import StepMetadata
from engine.attention.plan import PADDING, AttentionPlanner, GraphShape, StepSequences
from engine.core.config import BLOCK_SIZE
from engine.core.scheduler import Batch
from engine.core.sequence import Sequence
from engine.device.packed_arrays import PackedArrays
from engine.sampling.sampler import Sampler, SamplingKind

ON_DEVICE = -1
"""Stands for a token id that only the device knows yet."""
_WRITE_NOTHING = -1
"""Stands in the slot mapping for a token whose K and V are not stored."""
_MIN_TABLE_ROOM = 64
"""Changes of block tables for which every graph has room: those of a prompt of 1024 tokens."""
_NO_ROWS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The packed row of a step, on the device.

    input_ids      [num_tokens] int64, `ON_DEVICE` for the last token sampled in its slot
    token_slots    [num_tokens] int64: the slot each token belongs to
    position_ids   [num_tokens] int64
    kept_rows      [num_sampled + prompt rows] int64: rows whose logits are needed, the
                   sampled rows first
    sampled_slots  [num_sampled] int64
    attention      metadata for the attention kernels
    arrays         all of the step's arrays by name: the sampler finds its own among them
    """

    input_ids: Tensor
    token_slots: Tensor
    position_ids: Tensor
    kept_rows: Tensor
    sampled_slots: Tensor
    attention: StepMetadata
    arrays: dict[str, Tensor]


class NewContext(NamedTuple):
    """What is known of a sequence that is new to its slot and has a penalty.

    counts_prompt  whether the prompt's tokens are counted, not only marked
    """

    slot: int
    num_tokens: int
    num_prompt_tokens: int
    counts_prompt: bool


@dataclass(frozen=True, slots=True)
class NewContexts:
    """The known tokens of sequences that are new to their slots and have a penalty.

    token_ids  the known tokens of all these sequences, one after the other
    """

    contexts: list[NewContext]
    token_ids: PackedArrays


@dataclass(frozen=True, slots=True)
class HostStep:
    """One step as plain data, which can be pickled: all that the runner needs to launch it.

    arrays          to upload
    host_arrays     that attention reads on the host
    sampling        which kind of sampling; None when nothing is sampled
    graph           shape of the captured graph that runs the step; None: no graph
    num_sampled     number of sampled rows, not counting the padding of a graph
    num_prompt_top  how many alternatives to each prompt token are asked for
    update          block tables that changed, if they have no room among a graph's arrays
    contexts        tokens to count before sampling
    extras          arrays for optional work, which most steps do not have and graphs leave out:
                    `watermarked` [n] int64 indices of sampled rows, the arrays of
                    `SamplingSlots.biases`, `prompt_ids` [prompt rows] int64 whose logprobs are
                    asked for, `copied` [2, n] int64 blocks from and to
    """

    arrays: PackedArrays
    host_arrays: dict[str, np.ndarray]
    sampling: SamplingKind | None
    graph: GraphShape | None
    num_sampled: int
    num_prompt_top: int = 0
    update: PackedArrays | None = None
    contexts: NewContexts | None = None
    extras: PackedArrays | None = None

    def inputs(self, arrays: dict[str, Tensor], planner: AttentionPlanner) -> StepInputs:
        """Return the step's tensors, given its arrays on the device."""
        return StepInputs(
            input_ids=arrays["input_ids"],
            token_slots=arrays["token_slots"],
            position_ids=arrays["position_ids"],
            kept_rows=arrays["kept_rows"],
            sampled_slots=arrays["sampled_slots"],
            attention=planner.metadata(arrays, self.host_arrays),
            arrays=arrays,
        )


class StepBuilder:
    """Turns batches into steps; holds the block table of each slot.

    The extra last slot pads captured graphs.
    """

    def __init__(
        self,
        tables_shape: tuple[int, int],
        sampler: Sampler,
        planner: AttentionPlanner,
        graph_shapes: tuple[GraphShape, ...],
    ):
        self._block_tables = np.zeros(tables_shape, dtype=np.int64)
        self._sampler = sampler
        self._planner = planner
        self.graph_shapes = graph_shapes
        self._padding_slot = tables_shape[0] - 1

    def build(self, batch: Batch) -> HostStep:
        """Update the slots' state by the batch, and pack the step."""
        contexts = self._start_sequences(batch.reset)
        changed = self._update_tables(batch)
        _, *columns, _ = zip(*batch.scheduled, strict=True)
        slots, starts, lengths = np.array(columns[:3], dtype=np.int64)
        samples = np.array(columns[3], dtype=np.bool_)
        input_ids = _token_ids(batch, int(lengths.sum()))

        graph = None if batch.prompted else self._graph_for(lengths, samples)
        extras = self._extra_arrays(batch, slots[samples])
        if graph is not None:
            padding = graph.tokens - len(input_ids)
            slots = _padded(slots, padding, self._padding_slot)
            starts = _padded(starts, padding, PADDING)
            lengths = _padded(lengths, padding, 1)
            samples = _padded(samples, padding, False)
            input_ids = _padded(input_ids, padding, 0)
        sequences = StepSequences(slots, starts, lengths)
        prompt_rows = _prompt_rows(batch, lengths)
        step = self._pack(sequences, input_ids, samples, prompt_rows, changed, graph)
        num_top = max(
            (batch.scheduled[i].sequence.request.prompt_top_tokens for i in batch.prompted),
            default=0,
        )
        return replace(step, num_prompt_top=num_top, contexts=contexts, extras=extras)

    def empty(self, graph: GraphShape, kind: SamplingKind) -> HostStep:
        """Return a step of padding alone for this graph, with this kind of sampling."""
        slots = np.full(graph.tokens, self._padding_slot)
        step = self._pack(
            StepSequences(slots, np.full_like(slots, PADDING), np.ones_like(slots)),
            np.zeros_like(slots),
            np.zeros(graph.tokens, dtype=np.bool_),
            _NO_ROWS,
            _NO_ROWS,
            graph,
        )
        return replace(step, sampling=kind)

    def rehearsal(self, rows: int, kind: SamplingKind) -> HostStep:
        """Return a step without a graph whose rows belong to no sequence, sampled in this way.

        It writes keys and values to the first block of the cache, which must be unused.
        """
        slots = np.full(rows, self._padding_slot)
        step = self._pack(
            StepSequences(slots, np.zeros_like(slots), np.ones_like(slots)),
            np.zeros_like(slots),
            np.ones(rows, dtype=np.bool_),
            _NO_ROWS,
            _NO_ROWS,
            None,
        )
        return replace(step, sampling=kind)

    def _pack(
        self,
        step: StepSequences,
        input_ids: np.ndarray,
        samples: np.ndarray,
        prompt_rows: np.ndarray,
        changed: np.ndarray,
        graph: GraphShape | None,
    ) -> HostStep:
        """Pack the rows of a step, of which the graph's padding is already a part.

        changed  [n] int64 indices of changed entries of the flattened block tables
        """
        positions = step.positions
        token_slots = np.repeat(step.slots, step.lengths)
        blocks = self._block_tables[token_slots, positions // BLOCK_SIZE]
        slot_mapping = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        sampled_slots, sampled_ends = step.slots[samples], step.ends[samples]
        num_sampled = len(sampled_slots)
        kept_rows = np.cumsum(step.lengths)[samples] - 1
        if graph is not None:
            slot_mapping = np.where(positions == PADDING, _WRITE_NOTHING, slot_mapping)
            positions = np.maximum(positions, 0)
            padding = graph.rows - num_sampled
            sampled_slots = _padded(sampled_slots, padding, self._padding_slot)
            sampled_ends = _padded(sampled_ends, padding, 0)
            kept_rows = _padded(kept_rows, padding, 0)
        riding, update = self._table_update(changed, graph)
        attention = self._planner.plan(step.with_tokens(), self._block_tables, graph)
        sampling = self._sampler.plan(sampled_slots, sampled_ends) if len(sampled_slots) else None
        arrays = {
            "input_ids": input_ids,
            "token_slots": token_slots,
            "position_ids": positions,
            "slot_mapping": slot_mapping,
            "kept_rows": np.concatenate([kept_rows, prompt_rows]),
            "sampled_slots": sampled_slots,
            **({} if sampling is None else sampling.arrays),
            **riding,
            **attention.arrays,
        }
        return HostStep(
            arrays=PackedArrays(arrays, attention.capacity),
            host_arrays=attention.host_arrays,
            sampling=None if sampling is None else sampling.kind,
            graph=graph,
            num_sampled=num_sampled,
            update=update,
        )

    def _table_update(
        self, changed: np.ndarray, graph: GraphShape | None
    ) -> tuple[dict[str, np.ndarray], PackedArrays | None]:
        """Return the changes of block tables that ride among the step's arrays, and those apart.

        A graph has room for a block of each decode, and for the tables of its prompts. Only that of
        a long cached prefix is larger.
        """
        tables = self._block_tables.reshape(-1)
        if graph is None:
            return (self._planner.update(changed, tables) if len(changed) else {}), None
        room = max(graph.tokens, _MIN_TABLE_ROOM)
        if len(changed) <= room:
            return self._planner.update(changed, tables, room), None
        apart = self._planner.update(changed, tables)
        riding = self._planner.update(_NO_ROWS, tables, room)
        return riding, PackedArrays(apart) if apart else None

    def _extra_arrays(self, batch: Batch, sampled_slots: np.ndarray) -> PackedArrays | None:
        watermarked = self._sampler.slots.watermarked(sampled_slots)
        biases = self._sampler.slots.biases(sampled_slots)
        if not (watermarked.size or biases or batch.prompted or batch.copies):
            return None
        arrays = {
            "watermarked": watermarked,
            **biases,
            "prompt_ids": np.array(_prompt_ids(batch), dtype=np.int64),
            "copied": np.array(batch.copies, dtype=np.int64).reshape(-1, 2).T,
        }
        return PackedArrays({name: array for name, array in arrays.items() if array.size})

    def _graph_for(self, lengths: np.ndarray, samples: np.ndarray) -> GraphShape | None:
        """Return the smallest graph that serves the step; None if there is none."""
        num_tokens, num_sampled = int(lengths.sum()), int(samples.sum())
        prefills = not (samples.all() and (lengths == 1).all())
        fitting = (
            graph
            for graph in self.graph_shapes
            if graph.prefills == prefills
            and graph.tokens >= num_tokens
            and graph.rows >= num_sampled
        )
        return next(fitting, None)

    def _start_sequences(self, sequences: list[Sequence]) -> NewContexts | None:
        """Store the parameters of sequences that are new to their slots."""
        for seq in sequences:
            self._sampler.set_parameters(seq.slot, seq.request.sampling)
        slots = self._sampler.slots
        counted = [seq for seq in sequences if slots.needs_counts(seq.slot)]
        if not counted:
            return None
        token_ids = [np.array(seq.token_ids, dtype=np.int64) for seq in counted]
        contexts = [
            NewContext(
                seq.slot, len(seq.token_ids), seq.num_prompt_tokens, slots.counts_prompt(seq.slot)
            )
            for seq in counted
        ]
        return NewContexts(contexts, PackedArrays({"token_ids": np.concatenate(token_ids)}))

    def _update_tables(self, batch: Batch) -> np.ndarray:
        """Note the batch's blocks; return the indices of the changed entries, perhaps repeated."""
        width = self._block_tables.shape[1]
        index, blocks = [], []
        for seq in batch.reset:
            index.append(seq.slot * width + np.arange(len(seq.block_table)))
            blocks.append(np.array(seq.block_table, dtype=np.int64))
        if batch.grown:
            slots, columns, grown = np.array(batch.grown, dtype=np.int64).T
            index.append(slots * width + columns)
            blocks.append(grown)
        if not index:
            return _NO_ROWS
        changed = np.concatenate(index)
        self._block_tables.reshape(-1)[changed] = np.concatenate(blocks)
        return changed


def _padded(values: np.ndarray, count: int, filler: int) -> np.ndarray:
    if count == 0:
        return values
    return np.concatenate([values, np.full(count, filler, dtype=values.dtype)])


def _token_ids(batch: Batch, num_tokens: int) -> np.ndarray:
    ids = np.empty(num_tokens, dtype=np.int64)
    end = 0
    for entry in batch.scheduled:
        start, end = end, end + entry.num_scheduled_tokens
        known = entry.sequence.token_ids
        if entry.num_scheduled_tokens == 1:
            ids[start] = known[entry.start] if entry.start < len(known) else ON_DEVICE
        else:
            ids[start:end] = known[entry.start : entry.end]
    return ids


def _prompt_rows(batch: Batch, lengths: np.ndarray) -> np.ndarray:
    """Rows of the packed row that predict prompt tokens whose logprobs are asked for."""
    if not batch.prompted:
        return _NO_ROWS
    starts = np.cumsum(lengths) - lengths
    rows = [starts[i] + np.arange(batch.scheduled[i].num_prompt_rows) for i in batch.prompted]
    return np.concatenate(rows)


def _prompt_ids(batch: Batch) -> list[int]:
    """The prompt tokens that the rows of `_prompt_rows` predict."""
    entries = [batch.scheduled[i] for i in batch.prompted]
    return [
        token_id
        for entry in entries
        for token_id in entry.sequence.token_ids[entry.start + 1 :][: entry.num_prompt_rows]
    ]
