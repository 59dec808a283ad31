"""The sampler in plain torch, for devices without Triton.

Greedy sequences take the argmax. Sampled ones take the argmax of scores plus noise that
is a function of (seed, position, token id), see `kernels.sampling`. Logprobs are those
of the processed scores, as Text Generation Inference reports them, or of the logits.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from engine.core.request import SamplingParams
from engine.sampling.logits_processors import (
    PROCESSORS,
    Penalties,
    rows_of,
    select,
)
from engine.sampling.sampler import (
    RAW,
    TIE_MARGIN,
    SampledTokens,
    SamplingKind,
    SamplingPlan,
    report_raw,
)
from engine.sampling.slots import SamplingSlots, check_heeded
from kernels.sampling import gumbel_noise, noise_keys

_NOISE = "noise_keys"
_REPORTED_ROWS = 32
"""Rows whose logprobs are computed at a time: they take 28 bytes per token of the vocabulary."""

HEEDED = (
    *Penalties.PARAMETERS,
    *(processor.parameter for processor in PROCESSORS),
    "do_sample",
    "top_n_tokens",
)
"""The parameters that this sampler reads."""
check_heeded("the torch sampler", HEEDED)


class TorchSampler:
    """Samples with one logits processor per parameter, each for the rows that use it."""

    usual_kinds: tuple[SamplingKind, ...] = ()
    rare_kinds: tuple[SamplingKind, ...] = ()

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device):
        self.slots = SamplingSlots(max_sequences, vocab_size, device)

    def set_parameters(self, slot: int, params: SamplingParams) -> None:
        self.slots.set_parameters(slot, params)

    def plan(self, slots: np.ndarray, positions: np.ndarray) -> SamplingPlan:
        logprobs = self.slots.want_logprobs(slots)
        is_raw = self.slots.report_raw(slots)
        arrays = {RAW: is_raw.astype(np.int32)} if is_raw.any() else {}
        if self.slots.are_plain(slots):
            kind = SamplingKind(True, logprobs, bool(arrays), num_top=0)
            return SamplingPlan(arrays, kind)
        p = self.slots.parameters(slots)
        penalised = self.slots.have_penalties(slots)
        arrays |= Penalties.plan(penalised, slots, p)
        for processor in PROCESSORS:
            arrays |= processor.plan(p[processor.parameter])
        if p["do_sample"].any():
            arrays |= select(p["do_sample"], {_NOISE: noise_keys(p["seed"], positions)})
        num_top = int(p["top_n_tokens"].max())
        kind = SamplingKind(
            plain=False,
            logprobs=logprobs or num_top > 0,
            raw_logprobs=RAW in arrays,
            num_top=num_top,
        )
        return SamplingPlan(arrays, kind)

    def sample(
        self,
        logits: Tensor,
        arrays: Mapping[str, Tensor],
        kind: SamplingKind,
        raw: Tensor | None = None,
    ) -> SampledTokens:
        scores = logits.float()
        if kind.raw_logprobs and not kind.plain and raw is None:
            raw, scores = scores, scores.clone()
        if kind.plain:
            sampled = _reported(scores, scores.argmax(dim=-1), kind)
        else:
            sampled = self._sample(scores, arrays, kind)
        if not kind.raw_logprobs or raw is None:
            return sampled
        return report_raw(arrays[RAW], self.report(raw, sampled.ids, kind.num_top), sampled)

    def report(self, logits: Tensor, ids: Tensor, num_top: int) -> SampledTokens:
        groups = zip(logits.split(_REPORTED_ROWS), ids.split(_REPORTED_ROWS), strict=True)
        parts = [_with_logprobs(rows.float(), row_ids, num_top) for rows, row_ids in groups]
        return SampledTokens(
            ids,
            _joined([part.logprobs for part in parts]),
            _joined([part.top_ids for part in parts]),
            _joined([part.top_logprobs for part in parts]),
        )

    def _sample(
        self, scores: Tensor, arrays: Mapping[str, Tensor], kind: SamplingKind
    ) -> SampledTokens:
        penalties = None
        if Penalties.are_planned(arrays):
            penalties = Penalties.from_arrays(arrays, self.slots.all_counts())
            penalties(scores)
        for processor in PROCESSORS:
            if processor.parameter in arrays:
                processor.from_arrays(arrays)(scores)
        ids = _choose(scores, arrays)
        if penalties is not None:
            penalties.count(ids)
        return _reported(scores, ids, kind)


def _choose(scores: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
    """Sample the rows that have noise keys; take the best token of the others."""
    if _NOISE not in arrays:
        return scores.argmax(dim=-1)
    rows = rows_of(_NOISE, arrays)
    noise = gumbel_noise(arrays[_NOISE], scores.shape[-1])
    sampled = (scores[rows] + noise).argmax(dim=-1)
    if isinstance(rows, slice):
        return sampled
    return scores.argmax(dim=-1).index_copy_(0, rows, sampled)


def _reported(scores: Tensor, ids: Tensor, kind: SamplingKind) -> SampledTokens:
    return _with_logprobs(scores, ids, kind.num_top) if kind.logprobs else SampledTokens(ids)


def _with_logprobs(scores: Tensor, ids: Tensor, num_top: int) -> SampledTokens:
    logprobs = scores.log_softmax(dim=-1)
    chosen = logprobs.gather(-1, ids[:, None])[:, 0]
    if not num_top:
        return SampledTokens(ids, chosen)
    top_ids = _best(logprobs, num_top + TIE_MARGIN)
    return SampledTokens(ids, chosen, top_ids, logprobs.gather(-1, top_ids))


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Put the rows of all parts in one tensor, if there are parts."""
    rows = [part for part in parts if part is not None]
    return torch.cat(rows) if rows else None


def _best(scores: Tensor, k: int) -> Tensor:
    """Ids of the k highest scores of each row, [rows, k], best first, the lowest id among equals.

    `topk` leaves the order of equal scores to k, which depends on the other rows of the batch.
    Here no two keys are equal: the score's bits, ordered as integers, stand above the id's.
    """
    bits = scores.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    keys = (ordered << 32) - torch.arange(scores.shape[-1], device=scores.device)
    return keys.topk(min(k, scores.shape[-1]), dim=-1).indices
