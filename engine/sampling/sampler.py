"""The interface of a sampler: from a step's logits to token ids and logprobs.

A sampler works in two parts. `plan` runs on the host, ahead of the step, and returns plain
data. `sample` runs in stream order, on the logits and on the plan's arrays, which are uploaded
with the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.core.request import SamplingParams
from engine.sampling.slots import SamplingSlots

RAW = "raw_logprobs"
"""The array of a plan, [rows] int32, that says which rows report the model's own logprobs."""
TIE_MARGIN = 16
"""How many tokens that tie with the n-th best are still found."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The tokens sampled in a step, one row per sequence; None where no row asked for it.

    ids            [rows] int64
    logprobs       [rows] float32
    top_ids        [rows, k] int64, best first, k at least the largest number asked for
    top_logprobs   [rows, k] float32
    """

    ids: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


class SamplingKind(NamedTuple):
    """The part of a step's sampling that the host decides; a captured graph serves one kind.

    plain         all rows are greedy, and every other parameter is neutral
    logprobs      whether logprobs of the sampled tokens are computed
    raw_logprobs  whether some of them are those of the model's own distribution
    num_top       how many top tokens are computed for each row
    """

    plain: bool
    logprobs: bool
    raw_logprobs: bool
    num_top: int

    @property
    def of_own_logits(self) -> "SamplingKind":
        """The kind that gives the same where the logits are the model's own: then the
        distribution that plain rows report is the model's own too.
        """
        return self._replace(raw_logprobs=False) if self.plain else self


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """One step's sampling, as plain data: `arrays` are uploaded with the step."""

    arrays: dict[str, np.ndarray]
    kind: SamplingKind


class Sampler(Protocol):
    """Samples a token for each row of a step's logits.

    `usual_kinds` and `rare_kinds` are all kinds of plans there are, up to `of_own_logits`, the
    most usual first: what can be compiled and captured ahead. They are empty where nothing is.
    """

    slots: SamplingSlots
    usual_kinds: tuple[SamplingKind, ...]
    rare_kinds: tuple[SamplingKind, ...]

    def set_parameters(self, slot: int, params: SamplingParams) -> None:
        """Store the parameters of a sequence that is new to this slot."""

    def plan(self, slots: np.ndarray, positions: np.ndarray) -> SamplingPlan:
        """Plan one step; `positions` [rows] belong to the tokens that will be sampled."""

    def sample(
        self,
        logits: Tensor,
        arrays: Mapping[str, Tensor],
        kind: SamplingKind,
        raw: Tensor | None = None,
        /,
    ) -> SampledTokens:
        """Sample from `logits` [rows, vocab_size], of any float type, which are overwritten.

        `arrays` has the plan's arrays on the device, perhaps among others; `kind` is the plan's.
        `raw` are the model's own logits, if the kind asks for their logprobs and `logits` are
        others.
        """

    def report(self, logits: Tensor, ids: Tensor, num_top: int, /) -> SampledTokens:
        """Return the logprobs of the tokens `ids` [rows] in the softmax of the logits.

        The `num_top` best tokens come with theirs, and with up to `TIE_MARGIN` more.
        """


def report_raw(is_raw: Tensor, raw: SampledTokens, sampled: SampledTokens) -> SampledTokens:
    """Report the logprobs and top tokens of `raw` in the rows where `is_raw` [rows] is not 0."""
    assert raw.logprobs is not None
    assert sampled.logprobs is not None
    logprobs = torch.where(is_raw != 0, raw.logprobs, sampled.logprobs)
    if raw.top_ids is None or sampled.top_ids is None:
        return SampledTokens(sampled.ids, logprobs)
    assert raw.top_logprobs is not None
    assert sampled.top_logprobs is not None
    in_row = is_raw[:, None] != 0
    top_ids = torch.where(in_row, raw.top_ids, sampled.top_ids)
    top_logprobs = torch.where(in_row, raw.top_logprobs, sampled.top_logprobs)
    return SampledTokens(sampled.ids, logprobs, top_ids, top_logprobs)
