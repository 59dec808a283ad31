"""The sampler where Triton runs: all of sampling in a few launches, whatever the parameters."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.core.request import SamplingParams
from engine.sampling.sampler import (
    RAW,
    TIE_MARGIN,
    SampledTokens,
    SamplingKind,
    SamplingPlan,
    report_raw,
)
from engine.sampling.slots import STEP_PARAMETERS, SamplingSlots, check_heeded, storable
from kernels import fused_sampling
from kernels.sampling import ROW_PARAMETERS, noise_keys

_ARRAY = "sampling"
_NOT_PARAMETERS = {"noise_key", "slot", "context_length"}
"""Words of a row that belong to the step or the slot; all others are sampling parameters."""

HEEDED = tuple(name for name in ROW_PARAMETERS.names or () if name not in _NOT_PARAMETERS)
"""The parameters that the kernels read."""
check_heeded("the Triton sampler", HEEDED)


class TritonSampler:
    """Samples with the kernels of `kernels.fused_sampling`, which read each row's parameters."""

    def __init__(
        self, max_sequences: int, vocab_size: int, device: torch.device, max_top_tokens: int = 20
    ):
        """At most `max_top_tokens` alternatives to a token are asked for."""
        self.slots = SamplingSlots(max_sequences, vocab_size, device)
        self._counts = self.slots.all_counts()  # now: a captured graph keeps its address
        self._num_top = max_top_tokens + TIE_MARGIN
        greedy = SamplingKind(plain=True, logprobs=False, raw_logprobs=False, num_top=0)
        full = SamplingKind(plain=False, logprobs=True, raw_logprobs=False, num_top=0)
        self.usual_kinds: tuple[SamplingKind, ...] = (
            greedy,
            greedy._replace(logprobs=True),
            full,
        )
        self.rare_kinds: tuple[SamplingKind, ...] = (
            full._replace(num_top=self._num_top),
            full._replace(raw_logprobs=True),
            full._replace(raw_logprobs=True, num_top=self._num_top),
        )
        self._vocab_size = vocab_size
        # The kernels' row of each slot; its noise key and context length are set by each step.
        self._rows = np.zeros(max_sequences + 1, dtype=ROW_PARAMETERS)
        self._rows["slot"] = np.arange(max_sequences + 1)
        self.set_parameters(max_sequences, SamplingParams())
        # The row of a distribution that is reported: neutral, with top tokens.
        reported = self._rows[-1:].copy()
        reported["top_n_tokens"] = 1
        self._reported = torch.from_numpy(_words(reported)).to(device)

    def set_parameters(self, slot: int, params: SamplingParams) -> None:
        self.slots.set_parameters(slot, params)
        limited = replace(storable(params), top_k=min(params.top_k, self._vocab_size))
        row = self._rows[slot]
        for name in STEP_PARAMETERS:
            row[name] = getattr(limited, name)

    def plan(self, slots: np.ndarray, positions: np.ndarray) -> SamplingPlan:
        is_raw = self.slots.report_raw(slots)
        kind, rows = self._kind(slots, bool(is_raw.any())), self._rows[slots]
        if not kind.plain:
            rows["noise_key"] = noise_keys(self.slots.parameters(slots)["seed"], positions)
            rows["context_length"] = positions
        return SamplingPlan({_ARRAY: _words(rows), RAW: is_raw.astype(np.int32)}, kind)

    def _kind(self, slots: np.ndarray, raw_logprobs: bool) -> SamplingKind:
        if self.slots.are_plain(slots):
            return SamplingKind(True, self.slots.want_logprobs(slots), raw_logprobs, num_top=0)
        num_top = int(self.slots.parameters(slots)["top_n_tokens"].max())
        return SamplingKind(False, True, raw_logprobs, self._num_computed(num_top))

    def _num_computed(self, num_top: int) -> int:
        """How many top tokens are computed: always the same number, so that kinds are few."""
        return max(self._num_top, num_top + TIE_MARGIN) if num_top else 0

    def sample(
        self,
        logits: Tensor,
        arrays: Mapping[str, Tensor],
        kind: SamplingKind,
        raw: Tensor | None = None,
    ) -> SampledTokens:
        if kind.plain:
            sampled = SampledTokens(*fused_sampling.greedy(logits, kind.logprobs))
        else:
            results = fused_sampling.sample(logits, arrays[_ARRAY], self._counts, kind.num_top)
            sampled = SampledTokens(*results)
            raw = logits if raw is None else raw
        if not kind.raw_logprobs or raw is None:
            return sampled
        return report_raw(arrays[RAW], self._report(raw, sampled.ids, kind.num_top), sampled)

    def report(self, logits: Tensor, ids: Tensor, num_top: int) -> SampledTokens:
        return self._report(logits, ids, self._num_computed(num_top))

    def _report(self, logits: Tensor, ids: Tensor, num_top: int) -> SampledTokens:
        """Return what `report` does, with exactly `num_top` tokens.

        The kernels give the logprob of each row's best token; any other's is a difference from it.
        """
        if num_top:
            parameters = self._reported.expand(len(ids), -1).contiguous()
            results = fused_sampling.sample(logits, parameters, self._counts, num_top)
            best = SampledTokens(*results)
        else:
            best = SampledTokens(*fused_sampling.greedy(logits, want_logprobs=True))
        assert best.logprobs is not None
        scores = logits.gather(-1, torch.stack([ids, best.ids], dim=-1)).float()
        return replace(best, ids=ids, logprobs=scores[:, 0] - scores[:, 1] + best.logprobs)


def _words(rows: np.ndarray) -> np.ndarray:
    """View rows of `ROW_PARAMETERS` as the int32 words, [rows, words], that the kernels read."""
    return rows.view(np.int32).reshape(len(rows), -1)
