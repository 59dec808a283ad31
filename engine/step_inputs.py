"""One step's tensors, from the scheduler's batch of ids. Built with numpy, per batch.

What stays the same from step to step (block tables, sampling parameters) lives in arrays
indexed by slot and is updated by difference; the rest is computed here in a few numpy
calls and crosses to the device in one copy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention_plan import AttentionPlanner, StepSequences
from engine.config import BLOCK_SIZE
from engine.packed_arrays import PackedArrays, View
from engine.sampler import Sampler, SamplerPlan
from engine.scheduler import Batch
from kernels.paged_attention_triton import MAX_SPLITS

_ON_DEVICE = -1
"""In place of a token id that only the device knows yet."""
_NO_SLOT = -1
"""In the slot mapping: write nothing."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The packed row of a step, on the device.

    input_ids      [num_tokens] int64, -1 where the token is the last one sampled
    token_slots    [num_tokens] int64: the slot each token belongs to
    position_ids   [num_tokens] int64
    sampled_rows   [num_sampled] int64: rows of the packed row whose logits are needed
    sampled_slots  [num_sampled] int64
    attention      what the attention kernels of this device take
    sampling       what the sampler of this device takes; None when nothing is sampled
    """

    input_ids: Tensor
    token_slots: Tensor
    position_ids: Tensor
    sampled_rows: Tensor
    sampled_slots: Tensor
    attention: Any
    sampling: Any


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step on its way to the device.

    sampling     None when nothing is sampled
    graph_size   rows of the captured graph that runs it, the last ones empty; None: no graph
    num_sampled  rows that are sampled, without those that only fill the graph
    update       block tables that changed, if the device has to know
    counts       slots to count the known tokens of, before sampling
    """

    arrays: PackedArrays
    make_attention: Callable[[View], Any]
    sampling: SamplerPlan | None
    graph_size: int | None
    num_sampled: int
    update: PackedArrays | None
    counts: list[tuple[int, Tensor]]

    def inputs(self, buffer: Tensor) -> StepInputs:
        """The step's tensors, as views of `buffer`, a copy of the packed arrays."""
        view = partial(self.arrays.view, buffer)
        return StepInputs(
            input_ids=view("input_ids"),
            token_slots=view("token_slots"),
            position_ids=view("position_ids"),
            sampled_rows=view("sampled_rows"),
            sampled_slots=view("sampled_slots"),
            attention=self.make_attention(view),
            sampling=None if self.sampling is None else self.sampling.make(view),
        )


class StepBuilder:
    """Turns batches into inputs; holds the block table of each slot.

    The slot after the last is nobody's: rows that only fill a graph say it is theirs.
    """

    def __init__(
        self,
        tables_shape: tuple[int, int],
        sampler: Sampler,
        planner: AttentionPlanner,
        graph_sizes: tuple[int, ...],
        device: torch.device,
    ):
        self._block_tables = np.zeros(tables_shape, dtype=np.int64)
        self._sampler = sampler
        self._planner = planner
        self.graph_sizes = graph_sizes
        self._device = device

    def build(self, batch: Batch) -> HostStep:
        update, counts = self._update_slots(batch)
        scheduled = batch.scheduled
        slots = np.array([entry.slot for entry in scheduled], dtype=np.int64)
        starts = np.array([entry.start for entry in scheduled], dtype=np.int64)
        lengths = np.array([entry.num_tokens for entry in scheduled], dtype=np.int64)
        samples = np.array([entry.samples for entry in scheduled], dtype=np.bool_)
        input_ids = _token_ids(batch, int(lengths.sum()))
        num_sampled = int(samples.sum())

        graph_size = self._graph_size(len(input_ids), num_sampled)
        if graph_size is not None:
            empty = graph_size - len(scheduled)
            slots = _padded(slots, empty, len(self._block_tables) - 1)
            starts = _padded(starts, empty, -1)
            lengths = _padded(lengths, empty, 1)
            samples = _padded(samples, empty, True)
            input_ids = _padded(input_ids, empty, 0)
        return self._pack(
            StepSequences(slots, starts, lengths),
            input_ids,
            samples,
            graph_size=graph_size,
            num_sampled=num_sampled,
            update=update,
            counts=counts,
        )

    def empty(self, size: int) -> HostStep:
        """A step for the graph of this size that computes nothing for anyone."""
        nobody = np.full(size, len(self._block_tables) - 1)
        step = StepSequences(nobody, np.full(size, -1), np.ones(size, dtype=np.int64))
        sampled = np.ones(size, dtype=np.bool_)
        return self._pack(
            step,
            np.zeros(size, dtype=np.int64),
            sampled,
            graph_size=size,
            num_sampled=0,
            update=None,
            counts=[],
        )

    def _pack(
        self, step: StepSequences, input_ids: np.ndarray, samples: np.ndarray, **rest: Any
    ) -> HostStep:
        positions = step.positions
        token_slots = np.repeat(step.slots, step.lengths)
        blocks = self._block_tables[token_slots, positions // BLOCK_SIZE]
        slot_mapping = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        graph_size = rest["graph_size"]
        if graph_size is not None:
            slot_mapping = np.where(positions < 0, _NO_SLOT, slot_mapping)
            positions = np.maximum(positions, 0)
        for_attention, make_attention = self._planner.plan(step, self._block_tables)
        sampling = (
            self._sampler.plan(step.slots[samples], step.ends[samples]) if samples.any() else None
        )
        arrays = {
            "input_ids": input_ids,
            "token_slots": token_slots,
            "position_ids": positions,
            "slot_mapping": slot_mapping,
            "sampled_rows": np.cumsum(step.lengths)[samples] - 1,
            "sampled_slots": step.slots[samples],
            **({} if sampling is None else sampling.arrays),
            **for_attention,
        }
        return HostStep(
            arrays=PackedArrays(arrays, graph_size and graph_size * MAX_SPLITS),
            make_attention=make_attention,
            sampling=sampling,
            **rest,
        )

    def _graph_size(self, num_tokens: int, num_sampled: int) -> int | None:
        """The smallest graph for a step that samples after every token; others vary too much."""
        if num_tokens != num_sampled:
            return None
        return next((size for size in self.graph_sizes if size >= num_tokens), None)

    def _update_slots(self, batch: Batch) -> tuple[PackedArrays | None, list[tuple[int, Tensor]]]:
        width = self._block_tables.shape[1]
        counts, index, blocks = [], [], []
        for seq in batch.reset:
            index.append(seq.slot * width + np.arange(len(seq.block_table)))
            blocks.append(np.array(seq.block_table, dtype=np.int64))
            self._sampler.set_parameters(seq.slot, seq.request.sampling)
            if self._sampler.needs_counts(seq.slot):
                counts.append((seq.slot, torch.tensor(seq.token_ids, device=self._device)))
        if batch.grown:
            slots, columns, grown = np.array(batch.grown, dtype=np.int64).T
            index.append(slots * width + columns)
            blocks.append(grown)
        if not index:
            return None, counts
        changed = np.concatenate(index)
        tables = self._block_tables.reshape(-1)
        tables[changed] = np.concatenate(blocks)
        return self._planner.update(changed, tables), counts


def _padded(values: np.ndarray, count: int, filler: int) -> np.ndarray:
    return np.concatenate([values, np.full(count, filler, dtype=values.dtype)])


def _token_ids(batch: Batch, num_tokens: int) -> np.ndarray:
    ids = np.empty(num_tokens, dtype=np.int64)
    end = 0
    for entry in batch.scheduled:
        start, end = end, end + entry.num_tokens
        known = entry.sequence.token_ids
        if entry.num_tokens == 1:
            ids[start] = known[entry.start] if entry.start < len(known) else _ON_DEVICE
        else:
            ids[start:end] = known[entry.start : entry.end]
    return ids
