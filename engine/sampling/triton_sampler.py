"""The sampler where Triton runs: the whole of it in two launches, parameters and all."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.core.request import SamplingParams
from engine.sampling.sampler import (
    TIE_MARGIN,
    SampledTokens,
    Sampler,
    SamplerPlan,
)
from kernels import fused_sampling
from kernels.ops import Ops
from kernels.sampling import ROW_PARAMETERS, noise_keys

_NUM_TOP_STEP = 8
_TAKEN_OVER = (
    "temperature",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "do_sample",
    "top_n_tokens",
)


class Kind(NamedTuple):
    """What of a step's sampling decides which kernels run; the rest is in device memory."""

    plain: bool
    logprobs: bool
    counts: bool
    num_top: int


class FusedSampler(Sampler):
    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device):
        # What the kernels take, of each slot; two of its words are the step's.
        self._rows = np.zeros(max_sequences + 1, dtype=ROW_PARAMETERS)
        self._rows["slot"] = np.arange(max_sequences + 1)
        super().__init__(max_sequences, vocab_size, device)

    def set_parameters(self, slot: int, params: SamplingParams) -> None:
        super().set_parameters(slot, params)
        row = self._rows[slot]
        for name in _TAKEN_OVER:
            row[name] = getattr(params, name)
        row["top_k"] = min(params.top_k, self._vocab_size)

    def plan(self, slots: np.ndarray, positions: np.ndarray) -> SamplerPlan:
        kind, rows = self._kind(slots), self._rows[slots]
        if not kind.plain:
            rows["noise_key"] = noise_keys(self._parameters["seed"][slots], positions)
            rows["context_length"] = positions
        words = rows.view(np.int32).reshape(len(rows), -1)
        return SamplerPlan({"sampling": words}, lambda view: view("sampling"), kind)

    def _kind(self, slots: np.ndarray) -> Kind:
        logprobs = bool(self._parameters["logprobs"][slots].any())
        if self._plain[slots].all():
            return Kind(plain=True, logprobs=logprobs, counts=False, num_top=0)
        num_top = int(self._parameters["top_n_tokens"][slots].max())
        if num_top:  # few kinds, since each is captured for itself
            num_top = -(-(num_top + TIE_MARGIN) // _NUM_TOP_STEP) * _NUM_TOP_STEP
        counts = bool(self.uses_penalties(slots).any())
        return Kind(plain=False, logprobs=logprobs, counts=counts, num_top=num_top)

    def sample(self, logits: Tensor, plan: Any, kind: Hashable = None) -> SampledTokens:
        """`logits` [rows, vocab_size], `plan` [rows, words] int32."""
        assert isinstance(kind, Kind)
        if kind.plain:
            return SampledTokens(*fused_sampling.greedy(logits, kind.logprobs))
        counts = self._all_counts() if kind.counts else None
        return SampledTokens(*fused_sampling.sample(logits, plan, counts, kind.num_top))


def make_sampler(ops: Ops, max_sequences: int, vocab_size: int, device: torch.device) -> Sampler:
    make = FusedSampler if ops.is_triton else Sampler
    return make(max_sequences, vocab_size, device)
