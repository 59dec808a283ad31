"""Planning a step's attention, in the form that the device's kernels take.

The torch kernels shape their work by numbers on the host. The Triton kernels find theirs in
device memory: the block table of every slot, kept there and updated by difference, and a
list of work items made for each step. So a captured graph serves any step of its shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.attention.interface import StepMetadata
from engine.attention.kv_cache import AttentionCall
from engine.core.config import BLOCK_SIZE
from engine.device.packed_arrays import PackedArrays
from kernels.ops import Ops
from kernels.paged_attention.plan import (
    PagedBatch,
    Work,
    block_q_for,
    decode_capacity,
    num_counters,
    plan_decode,
    plan_padding,
    plan_prefill,
    prefill_capacity,
)
from kernels.paged_attention.reference import AttentionMetadata

_TABLE_INDEX, _TABLE_BLOCKS = "table_index", "table_blocks"
"""Arrays of an update: indices into the flattened block tables, and their new blocks."""
PADDING = -1
"""Position of a row that only pads a captured graph: it belongs to no sequence. Such rows come
last in a step."""


@dataclass(frozen=True, slots=True)
class StepSequences:
    """The sequences of a step, [num_sequences] int64 each.

    slots    slot of each sequence
    starts   position of the first token to compute; `PADDING` for a row that pads a graph
    lengths  number of tokens to compute
    """

    slots: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def ends(self) -> np.ndarray:
        return self.starts + self.lengths

    @property
    def positions(self) -> np.ndarray:
        """Position of each token in the packed row, [num_tokens]."""
        if (self.lengths == 1).all():
            return self.starts
        packed_ends = np.cumsum(self.lengths)
        return np.arange(packed_ends[-1]) + np.repeat(self.ends - packed_ends, self.lengths)

    def with_tokens(self) -> "StepSequences":
        """Return the sequences that compute at least one token."""
        if self.lengths.all():
            return self
        keep = self.lengths > 0
        return StepSequences(self.slots[keep], self.starts[keep], self.lengths[keep])


class GraphShape(NamedTuple):
    """What all steps have in common that one captured graph serves; a step with less is padded.

    tokens    length of the packed row
    rows      number of logits that are sampled: all tokens' in decodes, fewer beside long chunks
    prefills  whether there may be chunks of prompts; else every sequence has one token
    """

    tokens: int
    rows: int
    prefills: bool = False

    @property
    def steps(self) -> Literal["prefills", "decodes"]:
        return "prefills" if self.prefills else "decodes"


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What attention needs of one step, as plain data.

    arrays       to upload with the step
    host_arrays  to keep on the host
    capacity     rows of the last uploaded array that other steps of the same graph may have
    """

    arrays: dict[str, np.ndarray]
    host_arrays: dict[str, np.ndarray]
    capacity: int | None = None


class AttentionPlanner(Protocol):
    """Plans attention on the host, and makes the metadata that the device's kernels take."""

    def plan(
        self, step: StepSequences, tables: np.ndarray, graph: GraphShape | None = None, /
    ) -> AttentionPlan:
        """Plan one step, with the block tables of all slots.

        With `graph`, every array but the last is as large as in any step of the graph's shape.

        tables  [max_sequences + 1, max_blocks] int64
        """

    def metadata(
        self, arrays: Mapping[str, Tensor], host_arrays: Mapping[str, np.ndarray], /
    ) -> StepMetadata:
        """Make the kernels' metadata from a plan's arrays and the step's `slot_mapping`.

        `arrays` are on the device, perhaps among others of the step.
        """

    def update(
        self, changed: np.ndarray, tables: np.ndarray, capacity: int | None = None, /
    ) -> dict[str, np.ndarray]:
        """What to upload because these entries of the flattened block tables changed.

        With `capacity`, the arrays have that many entries, at least as many as changed.
        """

    def apply_update(self, arrays: Mapping[str, Tensor], /) -> None:
        """Store an uploaded update, if there is one among the arrays, in stream order."""


class FixedTables:
    """Block tables that never change, for callers without a scheduler: probe, sizing, benchmarks.

    tables  [num_sequences, max_blocks] int64
    """

    def __init__(
        self,
        ops: Ops,
        calls: Sequence[AttentionCall],
        tables: np.ndarray,
        device: torch.device,
    ):
        self._tables = tables
        self._device = device
        shape = tables.shape[0], tables.shape[1]
        self._planner = make_planner(ops, calls, shape, shape[0], device)
        update = self._planner.update(np.arange(tables.size), tables.reshape(-1))
        if update:
            self._planner.apply_update(PackedArrays(update).upload(device))

    def metadata(self, step: StepSequences) -> StepMetadata:
        """Plan the step and make its metadata, all at once."""
        positions = step.positions
        blocks = self._tables[np.repeat(step.slots, step.lengths), positions // BLOCK_SIZE]
        slot_mapping = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        plan = self._planner.plan(step, self._tables)
        arrays = PackedArrays({"slot_mapping": slot_mapping} | plan.arrays)
        return self._planner.metadata(arrays.upload(self._device), plan.host_arrays)


def make_planner(
    ops: Ops,
    calls: Sequence[AttentionCall],
    tables_shape: tuple[int, int],
    max_rows: int,
    device: torch.device,
    batch_invariant: bool = False,
) -> AttentionPlanner:
    """Return the planner for these kernels.

    `max_rows` is the number of tokens of the largest graph, or of the most decodes in a step.
    `batch_invariant` is whether a prompt's attention must not depend on how it is cut into chunks.
    """
    if ops.is_triton:
        return TritonPlanner(calls, tables_shape, max_rows, device, batch_invariant)
    return TorchPlanner()


class TorchPlanner:
    """Plans for the torch kernels, which read lengths and block tables on the host."""

    def plan(
        self, step: StepSequences, tables: np.ndarray, _graph: GraphShape | None = None
    ) -> AttentionPlan:
        width = -(-int(step.ends.max()) // BLOCK_SIZE)
        host_arrays = {
            "query_lens": step.lengths,
            "seq_lens": step.ends,
            "block_tables": tables[step.slots, :width],  # a copy: the next step changes the tables
        }
        return AttentionPlan({}, host_arrays)

    def metadata(
        self, arrays: Mapping[str, Tensor], host_arrays: Mapping[str, np.ndarray]
    ) -> AttentionMetadata:
        return AttentionMetadata(
            query_lens=host_arrays["query_lens"],
            seq_lens=host_arrays["seq_lens"],
            block_tables=host_arrays["block_tables"],
            slot_mapping=arrays["slot_mapping"],
            block_size=BLOCK_SIZE,
        )

    def update(
        self, _changed: np.ndarray, _tables: np.ndarray, _capacity: int | None = None
    ) -> dict[str, np.ndarray]:
        """The device keeps no block tables, so there is nothing to upload."""
        return {}

    def apply_update(self, _arrays: Mapping[str, Tensor]) -> None:
        """There never is an update."""


class TritonPlanner:
    """Plans for the Triton kernels; owns their counters and the block tables on the device."""

    def __init__(
        self,
        calls: Sequence[AttentionCall],
        tables_shape: tuple[int, int],
        max_rows: int,
        device: torch.device,
        batch_invariant: bool,
    ):
        self._may_split = not batch_invariant
        self._block_tables = torch.zeros(tables_shape, dtype=torch.int32, device=device)
        self._num_slots = tables_shape[0]
        self._block_qs = sorted(
            {block_q_for(call.num_heads // call.num_kv_heads) for call in calls}
        )
        items = decode_capacity(max_rows, self._num_slots)
        self._counters = torch.zeros(
            max(num_counters(items, call.num_heads, call.num_kv_heads) for call in calls),
            dtype=torch.int32,
            device=device,
        )

    def plan(
        self, step: StepSequences, _tables: np.ndarray, graph: GraphShape | None = None
    ) -> AttentionPlan:
        rows = np.cumsum(step.lengths) - step.lengths
        prefills = step.lengths > 1
        # As a decode, each row of padding would cost a program's time.
        padding = step.starts == PADDING if graph and graph.prefills else np.zeros_like(prefills)
        decodes = ~(prefills | padding)
        arrays: dict[str, np.ndarray] = {}
        if prefills.any() or (graph and graph.prefills):
            for block_q in self._block_qs:
                items = self._prefill_items(step, rows, prefills, padding, block_q)
                num_items = prefill_capacity(graph.tokens, block_q) if graph else len(items)
                arrays |= _work_arrays(_prefill_name(block_q), items, num_items)
        if graph or decodes.any():  # last: its size varies between steps of one graph
            items = plan_decode(step.slots[decodes], step.starts[decodes], rows[decodes])
            arrays |= _work_arrays("decode", items, len(items))
        capacity = decode_capacity(graph.tokens, self._num_slots) if graph else None
        return AttentionPlan(arrays, {}, capacity)

    def _prefill_items(
        self,
        step: StepSequences,
        rows: np.ndarray,
        prefills: np.ndarray,
        padding: np.ndarray,
        block_q: int,
    ) -> np.ndarray:
        """The items of the chunks and of the padding, [num_sequences] bool each."""
        slots, lengths, ends = step.slots[prefills], step.lengths[prefills], step.ends[prefills]
        items = plan_prefill(slots, lengths, ends, rows[prefills], block_q, self._may_split)
        if not padding.any():
            return items
        slot, row = step.slots[padding][0], rows[padding][0]
        return np.concatenate([items, plan_padding(slot, row, int(padding.sum()), block_q)])

    def metadata(
        self, arrays: Mapping[str, Tensor], _host_arrays: Mapping[str, np.ndarray]
    ) -> PagedBatch:
        return PagedBatch(
            slot_mapping=arrays["slot_mapping"],
            block_tables=self._block_tables,
            decode=_work("decode", 1, arrays) if "decode" in arrays else None,
            prefill={
                block_q: _work(_prefill_name(block_q), block_q, arrays)
                for block_q in self._block_qs
                if _prefill_name(block_q) in arrays
            },
            counters=self._counters,
        )

    def update(
        self, changed: np.ndarray, tables: np.ndarray, capacity: int | None = None
    ) -> dict[str, np.ndarray]:
        index = np.unique(changed)  # a scatter on the device has no order among equal indices
        if capacity is not None:
            # The padding writes what the last entry, of the slot that pads graphs, has anyway.
            index = np.concatenate([index, np.full(capacity - len(index), tables.size - 1)])
        return {_TABLE_INDEX: index, _TABLE_BLOCKS: tables[index].astype(np.int32)}

    def apply_update(self, arrays: Mapping[str, Tensor]) -> None:
        if _TABLE_INDEX in arrays:
            tables = self._block_tables.view(-1)
            tables.index_copy_(0, arrays[_TABLE_INDEX], arrays[_TABLE_BLOCKS])


def _prefill_name(block_q: int) -> str:
    return f"prefill_{block_q}"


def _work_arrays(name: str, items: np.ndarray, capacity: int) -> dict[str, np.ndarray]:
    """The items, padded to `capacity`, and their number: a kernel reads no more than that."""
    room = np.zeros((capacity - len(items), items.shape[1]), dtype=items.dtype)
    padded = np.concatenate([items, room]) if len(room) else items
    return {f"num_{name}": np.array([len(items)], dtype=np.int32), name: padded}


def _work(name: str, block_q: int, arrays: Mapping[str, Tensor]) -> Work:
    return Work(arrays[name], arrays[f"num_{name}"], block_q)
