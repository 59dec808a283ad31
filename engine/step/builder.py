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

from engine.attention.plan import AttentionPlanner, GraphShape, StepSequences
from engine.core.config import BLOCK_SIZE
from engine.core.request import SamplingParams
from engine.core.scheduler import Batch
from engine.device.packed_arrays import PackedArrays, View
from engine.sampling.sampler import Sampler, SamplerPlan

_ON_DEVICE = -1
"""In place of a token id that only the device knows yet."""
_NO_SLOT = -1
"""In the slot mapping: write nothing."""
_NO_ROWS = np.zeros(0, dtype=np.int64)


Counts = list[tuple[int, Tensor, int]]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The packed row of a step, on the device.

    input_ids      [num_tokens] int64, -1 where the token is the last one sampled
    token_slots    [num_tokens] int64: the slot each token belongs to
    position_ids   [num_tokens] int64
    kept_rows      [num_sampled + prompt rows] int64: those of the packed row whose logits are
                   needed, first the sampled ones
    sampled_slots  [num_sampled] int64
    attention      what the attention kernels of this device take
    sampling       what the sampler of this device takes; None when nothing is sampled
    """

    input_ids: Tensor
    token_slots: Tensor
    position_ids: Tensor
    kept_rows: Tensor
    sampled_slots: Tensor
    attention: Any
    sampling: Any


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step on its way to the device.

    sampling     None when nothing is sampled
    graph        shape of the captured graph that runs it; None: no graph
    num_sampled  rows that are sampled, without those that only fill the graph
    update       block tables that changed, if the device has to know
    counts       what to count before sampling: slot, known tokens, how many of them a prompt
    rare         what few steps have, for which a captured one has no place:
                 `watermarked` [n] int64 of the sampled rows, `prompt_ids` [prompt rows] int64
                 whose logprobs are asked for, `copied` [2, n] int64 blocks from and to
    """

    arrays: PackedArrays
    make_attention: Callable[[View], Any]
    sampling: SamplerPlan | None
    graph: GraphShape | None
    num_sampled: int
    update: PackedArrays | None
    counts: Counts
    rare: PackedArrays | None = None

    def inputs(self, buffer: Tensor) -> StepInputs:
        """The step's tensors, as views of `buffer`, a copy of the packed arrays."""
        view = partial(self.arrays.view, buffer)
        return StepInputs(
            input_ids=view("input_ids"),
            token_slots=view("token_slots"),
            position_ids=view("position_ids"),
            kept_rows=view("kept_rows"),
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
        graph_shapes: tuple[GraphShape, ...],
        device: torch.device,
    ):
        self._block_tables = np.zeros(tables_shape, dtype=np.int64)
        self._sampler = sampler
        self._planner = planner
        self.graph_shapes = graph_shapes
        self._nobody = tables_shape[0] - 1
        self._device = device

    def build(self, batch: Batch) -> HostStep:
        update, counts = self._update_slots(batch)
        _, *columns, _ = zip(*batch.scheduled, strict=True)
        slots, starts, lengths = np.array(columns[:3], dtype=np.int64)
        samples = np.array(columns[3], dtype=np.bool_)
        input_ids = _token_ids(batch, int(lengths.sum()))
        num_sampled = int(np.count_nonzero(samples))

        graph = None if batch.prompted else self._graph_for(lengths, samples)
        sampled_slots = slots[samples]
        if graph is not None:
            empty = graph.rows - len(input_ids)
            slots = _padded(slots, empty, self._nobody)
            starts = _padded(starts, empty, -1)
            lengths = _padded(lengths, empty, 1)
            samples = _padded(samples, empty, False)
            input_ids = _padded(input_ids, empty, 0)
        return self._pack(
            StepSequences(slots, starts, lengths),
            input_ids,
            samples,
            _prompt_rows(batch, lengths),
            graph=graph,
            num_sampled=num_sampled,
            update=update,
            counts=counts,
            rare=self._rare_arrays(batch, sampled_slots),
        )

    def _rare_arrays(self, batch: Batch, sampled_slots: np.ndarray) -> PackedArrays | None:
        watermarked = self._sampler.watermarked(sampled_slots)
        if not (watermarked.size or batch.prompted or batch.copies):
            return None
        arrays = {
            "watermarked": watermarked,
            "prompt_ids": np.array(_prompt_ids(batch), dtype=np.int64),
            "copied": np.array(batch.copies, dtype=np.int64).reshape(-1, 2).T,
        }
        return PackedArrays({name: array for name, array in arrays.items() if array.size})

    def empty(self, graph: GraphShape, sampling: SamplingParams) -> HostStep:
        """A step for the graph of this shape that computes nothing for anyone, and samples it."""
        nobody = np.full(graph.rows, self._nobody)
        step = StepSequences(nobody, np.full_like(nobody, -1), np.ones_like(nobody))
        self._sampler.set_parameters(self._nobody, sampling)
        packed = self._pack(
            step,
            np.zeros_like(nobody),
            np.zeros(graph.rows, dtype=np.bool_),
            _NO_ROWS,
            graph=graph,
            num_sampled=0,
            update=None,
            counts=[],
        )
        self._sampler.set_parameters(self._nobody, SamplingParams())
        return packed

    def _pack(
        self,
        step: StepSequences,
        input_ids: np.ndarray,
        samples: np.ndarray,
        prompt_rows: np.ndarray,
        **rest: Any,
    ) -> HostStep:
        positions = step.positions
        token_slots = np.repeat(step.slots, step.lengths)
        blocks = self._block_tables[token_slots, positions // BLOCK_SIZE]
        slot_mapping = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        sampled_slots, sampled_ends = step.slots[samples], step.ends[samples]
        kept_rows = np.cumsum(step.lengths)[samples] - 1
        graph = rest["graph"]
        if graph is not None:
            slot_mapping = np.where(positions < 0, _NO_SLOT, slot_mapping)
            positions = np.maximum(positions, 0)
            empty = graph.rows - len(sampled_slots)
            sampled_slots = _padded(sampled_slots, empty, self._nobody)
            sampled_ends = _padded(sampled_ends, empty, 0)
            kept_rows = _padded(kept_rows, empty, 0)
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
            **attention.arrays,
        }
        return HostStep(
            arrays=PackedArrays(arrays, attention.capacity),
            make_attention=attention.make_metadata,
            sampling=sampling,
            **rest,
        )

    def _graph_for(self, lengths: np.ndarray, samples: np.ndarray) -> GraphShape | None:
        """The smallest graph that serves the step."""
        num_rows = max(int(lengths.sum()), len(samples))
        prefills = not (samples.all() and (lengths == 1).all())
        return next(
            (g for g in self.graph_shapes if g.prefills == prefills and g.rows >= num_rows), None
        )

    def _update_slots(self, batch: Batch) -> tuple[PackedArrays | None, Counts]:
        width = self._block_tables.shape[1]
        counts, index, blocks = [], [], []
        for seq in batch.reset:
            index.append(seq.slot * width + np.arange(len(seq.block_table)))
            blocks.append(np.array(seq.block_table, dtype=np.int64))
            self._sampler.set_parameters(seq.slot, seq.request.sampling)
            if self._sampler.needs_counts(seq.slot):
                ids = torch.tensor(seq.token_ids, device=self._device)
                counts.append((seq.slot, ids, seq.num_prompt_tokens))
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
    if count == 0:
        return values
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


def _prompt_rows(batch: Batch, lengths: np.ndarray) -> np.ndarray:
    """Of the packed row, those that predict tokens of prompts whose logprobs are asked for."""
    if not batch.prompted:
        return _NO_ROWS
    starts = np.cumsum(lengths) - lengths
    rows = [starts[i] + np.arange(batch.scheduled[i].num_prompt_rows) for i in batch.prompted]
    return np.concatenate(rows)


def _prompt_ids(batch: Batch) -> list[int]:
    """The tokens that those rows predict."""
    entries = [batch.scheduled[i] for i in batch.prompted]
    return [
        token_id
        for entry in entries
        for token_id in entry.sequence.token_ids[entry.start + 1 :][: entry.num_prompt_rows]
    ]
