"""What attention has to know of a step, in the form that the device's kernels take.

The torch kernels shape their work by numbers on the host. The Triton ones find theirs in
device memory: the block table of every slot, kept there and updated by difference, and a
list of work items made for each step. So a captured graph serves any step of its shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from engine.attention.kv_cache import AttentionCall
from engine.core.config import BLOCK_SIZE
from engine.device.packed_arrays import PackedArrays, View
from kernels.ops import Ops
from kernels.paged_attention.plan import (
    PagedBatch,
    Work,
    block_q_for,
    decode_capacity,
    num_counters,
    plan_decode,
    plan_prefill,
    prefill_capacity,
)
from kernels.paged_attention.reference import AttentionMetadata


@dataclass(frozen=True, slots=True)
class StepSequences:
    """The sequences of a step, [num_sequences] int64 each.

    slots    whose state they are
    starts   position of the first token to compute; -1 for a row that only fills a graph
    lengths  tokens to compute
    """

    slots: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def ends(self) -> np.ndarray:
        return self.starts + self.lengths

    @property
    def positions(self) -> np.ndarray:
        """Of the packed row's tokens, [num_tokens]."""
        if (self.lengths == 1).all():
            return self.starts
        packed_ends = np.cumsum(self.lengths)
        return np.arange(packed_ends[-1]) + np.repeat(self.ends - packed_ends, self.lengths)

    def with_tokens(self) -> "StepSequences":
        """Without those that compute none."""
        if self.lengths.all():
            return self
        keep = self.lengths > 0
        return StepSequences(self.slots[keep], self.starts[keep], self.lengths[keep])


class GraphShape(NamedTuple):
    """What steps that one captured graph serves have in common.

    rows      of tokens, and of logits that are sampled; nobody's where the step has fewer
    prefills  whether there may be chunks of prompts; else each token is another sequence's
    """

    rows: int
    prefills: bool = False

    @property
    def steps(self) -> Literal["prefills", "decodes"]:
        return "prefills" if self.prefills else "decodes"


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What attention needs of a step.

    arrays         to upload with it
    make_metadata  what the kernels take, from the uploaded arrays
    capacity       rows of the last array that other steps of the same graph may have
    """

    arrays: dict[str, np.ndarray]
    make_metadata: Callable[[View], Any]
    capacity: int | None = None


class AttentionPlanner(Protocol):
    def plan(
        self, step: StepSequences, tables: np.ndarray, graph: GraphShape | None = None
    ) -> AttentionPlan:
        """`tables` [max_sequences + 1, max_blocks] int64 are the block tables of all slots.

        With `graph`, arrays are as large as those of any step of its shape, but for the last.
        """

    def update(self, changed: np.ndarray, tables: np.ndarray) -> PackedArrays | None:
        """What to upload because these entries of the flattened block tables changed."""

    def apply_update(self, view: View) -> None:
        """In stream order, before the step."""


class FixedTables:
    """Block tables that stay as they are, for who drives a model without a scheduler.

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
        if update is not None:
            self._planner.apply_update(self._uploaded(update))

    def metadata(self, step: StepSequences) -> Any:
        positions = step.positions
        blocks = self._tables[np.repeat(step.slots, step.lengths), positions // BLOCK_SIZE]
        slot_mapping = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        plan = self._planner.plan(step, self._tables)
        arrays = {"slot_mapping": slot_mapping} | plan.arrays
        return plan.make_metadata(self._uploaded(PackedArrays(arrays)))

    def _uploaded(self, packed: PackedArrays) -> View:
        return partial(packed.view, packed.on(self._device))


def make_planner(
    ops: Ops,
    calls: Sequence[AttentionCall],
    tables_shape: tuple[int, int],
    max_rows: int,
    device: torch.device,
) -> AttentionPlanner:
    """`max_rows` are those of the largest graph, or of the most decodes in a step."""
    if ops.is_triton:
        return TritonPlanner(calls, tables_shape, max_rows, device)
    return TorchPlanner()


class TorchPlanner:
    def plan(
        self, step: StepSequences, tables: np.ndarray, graph: GraphShape | None = None
    ) -> AttentionPlan:
        del graph
        width = -(-int(step.ends.max()) // BLOCK_SIZE)
        context = tables[step.slots, :width]  # copied now: the tables change with the next step
        return AttentionPlan(
            {},
            lambda view: AttentionMetadata(
                query_lens=step.lengths,
                seq_lens=step.ends,
                block_tables=context,
                slot_mapping=view("slot_mapping"),
                block_size=BLOCK_SIZE,
            ),
        )

    def update(self, changed: np.ndarray, tables: np.ndarray) -> None:
        pass

    def apply_update(self, view: View) -> None:
        raise NotImplementedError


class TritonPlanner:
    """Owns the block tables on the device, and the kernels' counters."""

    def __init__(
        self,
        calls: Sequence[AttentionCall],
        tables_shape: tuple[int, int],
        max_rows: int,
        device: torch.device,
    ):
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
        self, step: StepSequences, tables: np.ndarray, graph: GraphShape | None = None
    ) -> AttentionPlan:
        del tables
        rows = np.cumsum(step.lengths) - step.lengths
        decodes = step.lengths == 1
        prefills = ~decodes
        block_qs = self._block_qs if prefills.any() or (graph and graph.prefills) else []
        arrays: dict[str, np.ndarray] = {}
        for block_q in block_qs:
            items = plan_prefill(
                step.slots[prefills],
                step.lengths[prefills],
                step.ends[prefills],
                rows[prefills],
                block_q,
            )
            capacity = prefill_capacity(graph.rows, block_q) if graph else len(items)
            arrays |= _work_arrays(f"prefill_{block_q}", items, capacity)
        if graph or decodes.any():  # last: its size varies between steps of one graph
            items = plan_decode(step.slots[decodes], step.starts[decodes], rows[decodes])
            arrays |= _work_arrays("decode", items, len(items))
        return AttentionPlan(
            arrays,
            lambda view: PagedBatch(
                slot_mapping=view("slot_mapping"),
                block_tables=self._block_tables,
                decode=_work("decode", 1, view) if "decode" in arrays else None,
                prefill={q: _work(f"prefill_{q}", q, view) for q in block_qs},
                counters=self._counters,
            ),
            graph and decode_capacity(graph.rows, self._num_slots),
        )

    def update(self, changed: np.ndarray, tables: np.ndarray) -> PackedArrays:
        index = np.unique(changed)  # a scatter on the device has no order among equals
        return PackedArrays({"index": index, "blocks": tables[index].astype(np.int32)})

    def apply_update(self, view: View) -> None:
        self._block_tables.view(-1).index_copy_(0, view("index"), view("blocks"))


def _work_arrays(name: str, items: np.ndarray, capacity: int) -> dict[str, np.ndarray]:
    """With room for `capacity` items: the kernel looks at the first ones only."""
    room = np.zeros((capacity - len(items), items.shape[1]), dtype=items.dtype)
    padded = np.concatenate([items, room]) if len(room) else items
    return {f"num_{name}": np.array([len(items)], dtype=np.int32), name: padded}


def _work(name: str, block_q: int, view: View) -> Work:
    return Work(view(name), view(f"num_{name}"), block_q)
