"""What changes the scores before a token is chosen, in Text Generation Inference's order.

Each class is one step, for those rows of a batch that use it; `build` answers None when
no row does. Scores are float32, [rows, vocab_size], and changed in place. A row's result
depends on that row's scores and parameters alone.
"""

from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from kernels.sampling import GENERATED

Rows = Tensor | slice
"""Which rows of the batch: an int64 index, or a slice when it is all of them."""


class LogitsProcessor(Protocol):
    def __call__(self, scores: Tensor) -> None: ...


def select_rows(used: np.ndarray, device: torch.device) -> Rows | None:
    """The rows where `used` [rows] bool is set; None when there are none."""
    if not used.any():
        return None
    if used.all():
        return slice(None)
    return to_device(np.flatnonzero(used), device)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def column(values: np.ndarray, used: np.ndarray, device: torch.device) -> Tensor:
    return to_device(values[used], device)[:, None]


class _PerRow:
    """One parameter per row; `neutral` is the value that switches the step off."""

    neutral: float

    def __init__(self, rows: Rows, values: Tensor):
        self.rows = rows
        self.values = values  # [rows used, 1]

    @classmethod
    def build(cls, values: np.ndarray, device: torch.device) -> Self | None:
        used = values != cls.neutral
        rows = select_rows(used, device)
        return None if rows is None else cls(rows, column(values, used, device))

    def __call__(self, scores: Tensor) -> None:
        scores[self.rows] = self.apply(scores[self.rows])

    def apply(self, scores: Tensor) -> Tensor:
        raise NotImplementedError


class Penalties:
    """Repetition penalty r: x * r where x < 0, else x / r, once per token in the context.
    Frequency penalty f: x - f * (occurrences in the context / its length).
    Presence penalty p, OpenAI's: x - p for each token that was generated.

    The context is prompt and output so far, counted per slot on the device, because the
    newest tokens may not have reached the host yet.

    counts  [slots, vocab_size] int32, of all slots, with `GENERATED` added to those that were
    slots   [rows used] int64
    others  [rows used, 1] float32
    """

    def __init__(
        self,
        rows: Rows,
        slots: Tensor,
        repetition: Tensor,
        frequency: Tensor,
        presence: Tensor,
        counts: Tensor,
    ):
        self.rows = rows
        self.slots = slots
        self.repetition = repetition
        self.frequency = frequency
        self.presence = presence
        self.counts = counts

    def __call__(self, scores: Tensor) -> None:
        x, marked = scores[self.rows], self.counts[self.slots]
        counts = marked & (GENERATED - 1)
        repeated = torch.where(x < 0, x * self.repetition, x / self.repetition)
        x = torch.where(counts > 0, repeated, x)
        share = counts / counts.sum(dim=-1, keepdim=True)
        x = x - self.frequency * share
        scores[self.rows] = torch.where(marked >= GENERATED, x - self.presence, x)

    def count(self, ids: Tensor) -> None:
        """Add the tokens just chosen, [rows] int64, to their contexts."""
        chosen = ids[self.rows]
        counts = self.counts[self.slots, chosen]
        self.counts[self.slots, chosen] = (counts + 1) | GENERATED


class Temperature(_PerRow):
    neutral = 1.0

    def apply(self, scores: Tensor) -> Tensor:
        return scores / self.values


class TopK(_PerRow):
    """Keep scores at least as high as the k-th highest: ties at the boundary all stay."""

    neutral = 0

    def apply(self, scores: Tensor) -> Tensor:
        k = self.values.clamp(max=scores.shape[-1])
        highest = scores.topk(int(k.max()), dim=-1).values
        return scores.masked_fill(scores < highest.gather(-1, k - 1), -torch.inf)


class TopP(_PerRow):
    """Drop the least likely tokens whose probabilities sum to at most 1 - p.

    Ties stay or go together: with one of them kept, all are; those of the best token stay.
    """

    neutral = 1.0

    def apply(self, scores: Tensor) -> Tensor:
        ascending = scores.sort(dim=-1).values
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.values
        num_dropped = drop.sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        return scores.masked_fill(scores < ascending.gather(-1, num_dropped), -torch.inf)


class TypicalP(_PerRow):
    """Keep the tokens whose surprise is nearest the entropy, up to a mass of p.

    Locally typical sampling, Meister et al. 2022.
    """

    neutral = 1.0

    def apply(self, scores: Tensor) -> Tensor:
        logprobs = scores.log_softmax(dim=-1)
        entropy = -(logprobs.exp() * logprobs).nansum(dim=-1, keepdim=True)
        distance, order = (-logprobs - entropy).abs().sort(dim=-1)
        mass = scores.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
        last = (mass < self.values).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        drop = distance > distance.gather(-1, last)
        return scores.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
