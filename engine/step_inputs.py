"""One step's tensors, from the scheduler's batch of ids. Built with numpy, per batch.

What stays the same from step to step (block tables, sampling parameters) lives in arrays
indexed by slot and is updated by difference; the rest is computed here in a few numpy
calls and crosses to the device in one copy.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import BLOCK_SIZE
from engine.sampler import Sampler, SamplingPlan
from engine.scheduler import Batch
from kernels.paged_attention import AttentionMetadata

_ON_DEVICE = -1
"""In place of a token id that only the device knows yet."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The packed row of a step, on the device.

    input_ids      [num_tokens] int64, -1 where the token is the last one sampled
    token_slots    [num_tokens] int64: the slot each token belongs to
    position_ids   [num_tokens] int64
    sampled_rows   [num_sampled] int64: rows of the packed row whose logits are needed
    sampled_slots  [num_sampled] int64
    counts         slots to count the known tokens of, before sampling
    """

    input_ids: Tensor
    token_slots: Tensor
    position_ids: Tensor
    sampled_rows: Tensor
    sampled_slots: Tensor
    attention: AttentionMetadata
    sampling: SamplingPlan | None
    counts: list[tuple[int, Tensor]]


class StepBuilder:
    """Turns batches into inputs; holds the block table of each slot."""

    def __init__(
        self, max_sequences: int, max_total_tokens: int, sampler: Sampler, device: torch.device
    ):
        max_blocks = -(-max_total_tokens // BLOCK_SIZE)
        self._block_tables = np.zeros((max_sequences, max_blocks), dtype=np.int64)
        self._sampler = sampler
        self._device = device

    def build(self, batch: Batch) -> StepInputs:
        counts = self._update_slots(batch)
        scheduled = batch.scheduled
        slots = np.array([entry.slot for entry in scheduled], dtype=np.int64)
        starts = np.array([entry.start for entry in scheduled], dtype=np.int64)
        lengths = np.array([entry.num_tokens for entry in scheduled], dtype=np.int64)
        samples = np.array([entry.samples for entry in scheduled], dtype=np.bool_)

        ends = starts + lengths
        packed_ends = np.cumsum(lengths)
        positions = np.arange(packed_ends[-1]) + np.repeat(ends - packed_ends, lengths)
        token_slots = np.repeat(slots, lengths)
        blocks = self._block_tables[token_slots, positions // BLOCK_SIZE]
        slot_mapping = blocks * BLOCK_SIZE + positions % BLOCK_SIZE

        ids, owners, positions_t, mapping, rows, sampled = self._upload(
            _token_ids(batch, int(packed_ends[-1])),
            token_slots,
            positions,
            slot_mapping,
            packed_ends[samples] - 1,
            slots[samples],
        )
        width = -(-int(ends.max()) // BLOCK_SIZE)
        return StepInputs(
            input_ids=ids,
            token_slots=owners,
            position_ids=positions_t,
            sampled_rows=rows,
            sampled_slots=sampled,
            attention=AttentionMetadata(
                query_lens=lengths,
                seq_lens=ends,
                block_tables=self._block_tables[slots, :width],
                slot_mapping=mapping,
                block_size=BLOCK_SIZE,
            ),
            sampling=(self._sampler.plan(slots[samples], ends[samples]) if samples.any() else None),
            counts=counts,
        )

    def _update_slots(self, batch: Batch) -> list[tuple[int, Tensor]]:
        counts = []
        for seq in batch.reset:
            self._block_tables[seq.slot, : len(seq.block_table)] = seq.block_table
            self._sampler.set_parameters(seq.slot, seq.request.sampling)
            if self._sampler.needs_counts(seq.slot):
                counts.append((seq.slot, torch.tensor(seq.token_ids, device=self._device)))
        for slot, index, block in batch.grown:
            self._block_tables[slot, index] = block
        return counts

    def _upload(self, *arrays: np.ndarray) -> tuple[Tensor, ...]:
        """One copy to the device for all of them."""
        packed = torch.from_numpy(np.concatenate(arrays))
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        return packed.split([len(array) for array in arrays])


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
