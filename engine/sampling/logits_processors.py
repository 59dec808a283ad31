"""Logits processors: what changes the scores before a token is chosen.

They run in Text Generation Inference's order. Each class is one step, for the rows of a batch
that use it. Its `plan` runs on the host and returns the arrays to upload, none if no row uses
the step; its `from_arrays` builds the processor from the uploaded arrays. Scores are float32,
[rows, vocab_size], and changed in place. A row's result depends only on that row's scores and
parameters.
"""

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor

from kernels.sampling import GENERATED, IN_PROMPT, SMALL_TEMPERATURE

Rows = Tensor | slice
"""Some rows of the batch: an int64 index, or a slice when it is all of them."""


def select(used: np.ndarray, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the columns of the rows where `used` [rows] bool is set, and the rows' index.

    The index belongs to the first column, and is left out when all rows are used.
    """
    selected = {name: values[used] for name, values in columns.items()}
    if not used.all():
        selected[_index_name(next(iter(columns)))] = np.flatnonzero(used)
    return selected


def rows_of(column: str, arrays: Mapping[str, Tensor]) -> Rows:
    """The rows that `select` chose for its first column."""
    return arrays.get(_index_name(column), slice(None))


def _index_name(column: str) -> str:
    return f"{column}.rows"


class _PerRow:
    """A step with one parameter per row; the value `neutral` switches it off."""

    parameter: str
    neutral: float

    def __init__(self, rows: Rows, values: Tensor):
        self.rows = rows
        self.values = values  # [rows used, 1]

    @classmethod
    def plan(cls, values: np.ndarray) -> dict[str, np.ndarray]:
        used = values != cls.neutral
        return select(used, {cls.parameter: values}) if used.any() else {}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> Self:
        return cls(rows_of(cls.parameter, arrays), arrays[cls.parameter][:, None])

    def __call__(self, scores: Tensor) -> None:
        scores[self.rows] = self.apply(scores[self.rows])

    def apply(self, scores: Tensor) -> Tensor:
        raise NotImplementedError


class Penalties:
    """The four penalties, each of which lowers the scores of tokens in the context.

    Repetition penalty r: x * r where x < 0, else x / r, once per token in the context.
    Frequency penalty f: x - f * (occurrences in the context / its length).
    Presence penalty p, OpenAI's: x - p for each token that was generated.
    Output frequency penalty o, OpenAI's: x - o * (how often the token was generated).

    The context is prompt and output so far, counted per slot on the device, because the
    newest tokens may not have reached the host yet.

    slots       [rows used] int64
    repetition, frequency, presence, output_frequency  [rows used, 1] float32
    counts      [slots, vocab_size] int32, of all slots; the bit `GENERATED` marks the tokens
                that were generated, `IN_PROMPT` those of a prompt that is not counted
    """

    PARAMETERS = (
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "output_frequency_penalty",
    )
    _SLOTS = "penalised_slots"

    def __init__(
        self,
        rows: Rows,
        slots: Tensor,
        repetition: Tensor,
        frequency: Tensor,
        presence: Tensor,
        output_frequency: Tensor,
        counts: Tensor,
    ):
        self.rows = rows
        self.slots = slots
        self.repetition = repetition
        self.frequency = frequency
        self.presence = presence
        self.output_frequency = output_frequency
        self.counts = counts

    @classmethod
    def plan(
        cls, used: np.ndarray, slots: np.ndarray, parameters: np.ndarray
    ) -> dict[str, np.ndarray]:
        """`used` [rows] bool says which rows have a penalty; `parameters` are their records."""
        if not used.any():
            return {}
        values = {name: parameters[name] for name in cls.PARAMETERS}
        return select(used, {cls._SLOTS: slots} | values)

    @classmethod
    def are_planned(cls, arrays: Mapping[str, Tensor]) -> bool:
        return cls._SLOTS in arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor], counts: Tensor) -> Self:
        rows, slots = rows_of(cls._SLOTS, arrays), arrays[cls._SLOTS]
        repetition, frequency, presence, output_frequency = (
            arrays[name][:, None] for name in cls.PARAMETERS
        )
        return cls(rows, slots, repetition, frequency, presence, output_frequency, counts)

    def __call__(self, scores: Tensor) -> None:
        x, marked = scores[self.rows], self.counts[self.slots]
        counts = marked & (IN_PROMPT - 1)
        repeated = torch.where(x < 0, x * self.repetition, x / self.repetition)
        x = torch.where(marked > 0, repeated, x)
        share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
        x = x - self.frequency * share
        x = x - self.output_frequency * counts
        scores[self.rows] = torch.where(marked >= GENERATED, x - self.presence, x)

    def count(self, ids: Tensor) -> None:
        """Add the tokens just chosen, [rows] int64, to their contexts."""
        chosen = ids[self.rows]
        counts = self.counts[self.slots, chosen]
        self.counts[self.slots, chosen] = (counts + 1) | GENERATED


class Temperature(_PerRow):
    """Divide the scores by the temperature.

    A small one divides their distances from the row's highest score instead, which no softmax
    tells apart: the highest is 0 then, however small the temperature is.
    """

    parameter = "temperature"
    neutral = 1.0

    def apply(self, scores: Tensor) -> Tensor:
        is_small = self.values < SMALL_TEMPERATURE
        highest = scores.amax(dim=-1, keepdim=True)
        reference = torch.where(is_small & highest.isfinite(), highest, 0.0)
        return (scores - reference) / self.values


class TopK(_PerRow):
    """Keep scores at least as high as the k-th highest: all ties at the boundary are kept."""

    parameter = "top_k"
    neutral = 0

    def apply(self, scores: Tensor) -> Tensor:
        k = self.values.clamp(max=scores.shape[-1])
        highest = scores.topk(int(k.max()), dim=-1).values
        return scores.masked_fill(scores < highest.gather(-1, k - 1), -torch.inf)


class TopP(_PerRow):
    """Drop the least likely tokens whose probabilities sum to at most 1 - p.

    If one of several tied tokens is kept, all are. The best token and its ties are always kept.
    """

    parameter = "top_p"
    neutral = 1.0

    def apply(self, scores: Tensor) -> Tensor:
        ascending = scores.sort(dim=-1).values
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.values
        num_dropped = drop.sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        return scores.masked_fill(scores < ascending.gather(-1, num_dropped), -torch.inf)


class TypicalP(_PerRow):
    """Keep the tokens whose surprise is nearest the entropy, up to a mass of p.

    This is locally typical sampling, Meister et al. 2022.
    """

    parameter = "typical_p"
    neutral = 1.0

    def apply(self, scores: Tensor) -> Tensor:
        logprobs = scores.log_softmax(dim=-1)
        entropy = -(logprobs.exp() * logprobs).nansum(dim=-1, keepdim=True)
        distance, order = (-logprobs - entropy).abs().sort(dim=-1)
        mass = scores.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
        last = (mass < self.values).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        drop = distance > distance.gather(-1, last)
        return scores.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


PROCESSORS = (Temperature, TopK, TopP, TypicalP)
"""The steps that follow the penalties, in their order."""
