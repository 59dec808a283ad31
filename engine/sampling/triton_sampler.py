"""The sampler where Triton runs: all of sampling in two launches, whatever the parameters."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.core.request import SamplingParams
from engine.sampling.sampler import TIE_MARGIN, SampledTokens, SamplingKind, SamplingPlan
from engine.sampling.slots import STEP_PARAMETERS, SamplingSlots, check_heeded
from kernels import fused_sampling
from kernels.sampling import ROW_PARAMETERS, noise_keys

_ARRAY = "sampling"
_NUM_TOP_STEP = 8
_NOT_PARAMETERS = {"noise_key", "slot", "context_length"}
"""Words of a row that belong to the step or the slot; all others are sampling parameters."""

HEEDED = tuple(name for name in ROW_PARAMETERS.names or () if name not in _NOT_PARAMETERS)
"""The parameters that the kernels read."""
check_heeded("the Triton sampler", HEEDED)


class TritonSampler:
    """Samples with the kernels of `kernels.fused_sampling`, which read each row's parameters."""

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device):
        self.slots = SamplingSlots(max_sequences, vocab_size, device)
        self._vocab_size = vocab_size
        # The kernels' row of each slot; its noise key and context length are set by each step.
        self._rows = np.zeros(max_sequences + 1, dtype=ROW_PARAMETERS)
        self._rows["slot"] = np.arange(max_sequences + 1)
        self.set_parameters(max_sequences, SamplingParams())

    def set_parameters(self, slot: int, params: SamplingParams) -> None:
        self.slots.set_parameters(slot, params)
        limited = replace(params, top_k=min(params.top_k, self._vocab_size))
        row = self._rows[slot]
        for name in STEP_PARAMETERS:
            row[name] = getattr(limited, name)

    def plan(self, slots: np.ndarray, positions: np.ndarray) -> SamplingPlan:
        kind, rows = self._kind(slots), self._rows[slots]
        if not kind.plain:
            rows["noise_key"] = noise_keys(self.slots.parameters(slots)["seed"], positions)
            rows["context_length"] = positions
        return SamplingPlan({_ARRAY: rows.view(np.int32).reshape(len(rows), -1)}, kind)

    def _kind(self, slots: np.ndarray) -> SamplingKind:
        logprobs = self.slots.want_logprobs(slots)
        if self.slots.are_plain(slots):
            return SamplingKind(plain=True, logprobs=logprobs, penalties=False, num_top=0)
        num_top = int(self.slots.parameters(slots)["top_n_tokens"].max())
        if num_top:  # rounded up, so that few kinds have to be captured
            num_top = -(-(num_top + TIE_MARGIN) // _NUM_TOP_STEP) * _NUM_TOP_STEP
        penalties = bool(self.slots.have_penalties(slots).any())
        return SamplingKind(plain=False, logprobs=logprobs, penalties=penalties, num_top=num_top)

    def sample(
        self, logits: Tensor, arrays: Mapping[str, Tensor], kind: SamplingKind
    ) -> SampledTokens:
        if kind.plain:
            return SampledTokens(*fused_sampling.greedy(logits, kind.logprobs))
        counts = self.slots.all_counts() if kind.penalties else None
        return SampledTokens(*fused_sampling.sample(logits, arrays[_ARRAY], counts, kind.num_top))
