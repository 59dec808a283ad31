"""The sampler where Triton runs: the whole of it in two launches, parameters and all."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.sampler import TIE_MARGIN, SampledTokens, Sampler, SamplerPlan
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
    def plan(self, slots: np.ndarray, positions: np.ndarray) -> SamplerPlan:
        p = self._parameters[slots]
        rows = np.empty(len(slots), dtype=ROW_PARAMETERS)
        for name in _TAKEN_OVER:
            rows[name] = p[name]
        rows["top_k"] = np.minimum(p["top_k"], self._vocab_size)
        rows["noise_key"] = noise_keys(p["seed"], positions)
        rows["slot"] = slots
        rows["context_length"] = positions
        words = rows.view(np.int32).reshape(len(rows), -1)
        return SamplerPlan({"sampling": words}, lambda view: view("sampling"), self._kind(slots, p))

    def _kind(self, slots: np.ndarray, p: np.ndarray) -> Kind:
        num_top = int(p["top_n_tokens"].max())
        if num_top:  # few kinds, since each is captured for itself
            num_top = -(-(num_top + TIE_MARGIN) // _NUM_TOP_STEP) * _NUM_TOP_STEP
        return Kind(
            plain=bool(self._plain[slots].all()),
            logprobs=bool(p["logprobs"].any()),
            counts=bool(self.uses_penalties(slots).any()),
            num_top=num_top,
        )

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
