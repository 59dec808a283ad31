"""From a step's logits to token ids and logprobs, for all its sequences at once.

Greedy sequences take the argmax. Sampled ones take the argmax of scores plus noise that
is a function of (seed, position, token id), see `kernels.sampling`. Logprobs are those
of the processed scores, as Text Generation Inference reports them.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from engine.core.request import SamplingParams
from engine.device.packed_arrays import View
from engine.sampling.logits_processors import (
    LogitsProcessor,
    Penalties,
    Rows,
    Temperature,
    TopK,
    TopP,
    TypicalP,
    column,
    select_rows,
    to_device,
)
from kernels.sampling import GENERATED, gumbel_noise, noise_keys

TIE_MARGIN = 16
"""How many tokens that tie with the n-th best are still found."""

_PARAMETERS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float32),
        ("typical_p", np.float32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("do_sample", np.bool_),
        ("seed", np.uint64),
        ("logprobs", np.bool_),
        ("top_n_tokens", np.int64),
        ("watermark", np.bool_),
    ]
)


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One row per sampled sequence; None where no row asked for it.

    ids            [rows] int64
    logprobs       [rows] float32
    top_ids        [rows, k] int64, best first, k at least the largest number asked for
    top_logprobs   [rows, k] float32
    """

    ids: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None

    def to_host(self, rows: int) -> "SampledTokens":
        """The first `rows`, on the host once what was launched so far is done."""
        return SampledTokens(
            ids=to_host(self.ids, rows),
            logprobs=to_host(self.logprobs, rows),
            top_ids=to_host(self.top_ids, rows),
            top_logprobs=to_host(self.top_logprobs, rows),
        )


@dataclass(frozen=True, slots=True)
class SamplerPlan:
    """What one step's sampling needs.

    arrays  to upload with the step
    make    what `sample` takes, from the uploaded arrays
    kind    what of it is decided on the host: a captured graph serves one kind
    """

    arrays: dict[str, np.ndarray]
    make: Callable[[View], Any]
    kind: Hashable


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What one step's sampling will do, decided on the host before the forward runs."""

    penalties: Penalties | None
    processors: list[LogitsProcessor]
    noisy: Rows | None
    noise_keys: Tensor | None
    logprobs: bool
    num_top: int


class Sampler:
    """Per-slot parameters on the host, per-slot token counts on the device."""

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device):
        self._vocab_size = vocab_size
        self._device = device
        # One more than there are sequences: the rows that only fill a graph, all greedy.
        self._parameters = np.zeros(max_sequences + 1, dtype=_PARAMETERS)
        # Greedy and nothing else, as most of a batch often is: no parameter to look at.
        self._plain = np.ones(max_sequences + 1, dtype=np.bool_)
        self.set_parameters(max_sequences, SamplingParams())
        self._counts: Tensor | None = None

    # -- engine thread, ahead of the step ---------------------------------------------

    def set_parameters(self, slot: int, params: SamplingParams) -> None:
        """A new sequence in this slot."""
        self._parameters[slot] = tuple(getattr(params, name) for name in _PARAMETERS.fields or ())
        neutral = replace(params, seed=0, logprobs=False, watermark=False)
        self._plain[slot] = neutral == SamplingParams()
        if self.needs_counts(slot):
            self._all_counts()  # by this thread: steps in flight and the next plan both look

    def needs_counts(self, slot: int) -> bool:
        return bool(self.uses_penalties(np.array([slot]))[0])

    def uses_penalties(self, slots: np.ndarray) -> np.ndarray:
        p = self._parameters[slots]
        return (
            (p["repetition_penalty"] != 1)
            | (p["frequency_penalty"] != 0)
            | (p["presence_penalty"] != 0)
        )

    def watermarked(self, slots: np.ndarray) -> np.ndarray:
        """Which of these rows are, [n] int64."""
        return np.flatnonzero(self._parameters["watermark"][slots])

    def plan(self, slots: np.ndarray, positions: np.ndarray) -> SamplerPlan:
        """`positions` [rows] are those of the tokens about to be drawn."""
        plan = self._processors(slots, positions)
        return SamplerPlan({}, lambda _: plan, None)

    def _processors(self, slots: np.ndarray, positions: np.ndarray) -> SamplingPlan:
        logprobs = bool(self._parameters["logprobs"][slots].any())
        if self._plain[slots].all():
            return SamplingPlan(None, [], None, None, logprobs, 0)
        p, device = self._parameters[slots], self._device
        processors = (
            Temperature.build(p["temperature"], device),
            TopK.build(p["top_k"], device),
            TopP.build(p["top_p"], device),
            TypicalP.build(p["typical_p"], device),
        )
        noisy = select_rows(p["do_sample"], device)
        return SamplingPlan(
            penalties=self._plan_penalties(slots, p),
            processors=[processor for processor in processors if processor is not None],
            noisy=noisy,
            noise_keys=(
                None
                if noisy is None
                else to_device(noise_keys(p["seed"], positions)[p["do_sample"]], device)
            ),
            logprobs=logprobs or bool(p["top_n_tokens"].any()),
            num_top=int(p["top_n_tokens"].max()),
        )

    def _plan_penalties(self, slots: np.ndarray, p: np.ndarray) -> Penalties | None:
        used = self.uses_penalties(slots)
        rows = select_rows(used, self._device)
        if rows is None:
            return None
        return Penalties(
            rows=rows,
            slots=to_device(slots[used], self._device),
            repetition=column(p["repetition_penalty"], used, self._device),
            frequency=column(p["frequency_penalty"], used, self._device),
            presence=column(p["presence_penalty"], used, self._device),
            counts=self._all_counts(),
        )

    def _all_counts(self) -> Tensor:
        """Allocated when the first request with a penalty arrives."""
        if self._counts is None:
            shape = (len(self._parameters), self._vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        return self._counts

    # -- in stream order --------------------------------------------------------------

    def start_counts(self, slot: int, token_ids: Tensor, num_prompt_tokens: int) -> None:
        """Count the tokens that a sequence new to this slot knows, [n] int64."""
        counts = self._all_counts()[slot].zero_()
        counts.index_add_(0, token_ids, torch.ones_like(token_ids, dtype=torch.int32))
        counts[token_ids[num_prompt_tokens:]] |= GENERATED

    def sample(self, logits: Tensor, plan: Any, kind: Hashable = None) -> SampledTokens:
        """`logits` [rows, vocab_size] in the model's type, overwritten; `plan` from the
        `SamplerPlan`, as its `kind` is.
        """
        del kind
        assert isinstance(plan, SamplingPlan)
        scores = logits.float()
        if plan.penalties is not None:
            plan.penalties(scores)
        for processor in plan.processors:
            processor(scores)
        ids = _choose(scores, plan)
        if plan.penalties is not None:
            plan.penalties.count(ids)
        if not plan.logprobs:
            return SampledTokens(ids)
        logprobs = scores.log_softmax(dim=-1)
        chosen = logprobs.gather(-1, ids[:, None])[:, 0]
        if not plan.num_top:
            return SampledTokens(ids, chosen)
        top_ids = _best(logprobs, plan.num_top + TIE_MARGIN)
        return SampledTokens(ids, chosen, top_ids, logprobs.gather(-1, top_ids))


def _choose(scores: Tensor, plan: SamplingPlan) -> Tensor:
    if plan.noisy is None or plan.noise_keys is None:
        return scores.argmax(dim=-1)
    noise = gumbel_noise(plan.noise_keys, scores.shape[-1])
    drawn = (scores[plan.noisy] + noise).argmax(dim=-1)
    if isinstance(plan.noisy, slice):
        return drawn
    return scores.argmax(dim=-1).index_copy_(0, plan.noisy, drawn)


def _best(scores: Tensor, k: int) -> Tensor:
    """Ids of the k highest scores of each row, [rows, k], best first, of equals the lowest id.

    `topk` leaves the order of equals to k, which is the company's to choose. Here no two
    keys are equal: the score's bits, ordered as integers, above the id's.
    """
    bits = scores.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    keys = (ordered << 32) - torch.arange(scores.shape[-1], device=scores.device)
    return keys.topk(min(k, scores.shape[-1]), dim=-1).indices


@overload
def to_host(tensor: Tensor, rows: int) -> Tensor: ...
@overload
def to_host(tensor: Tensor | None, rows: int) -> Tensor | None: ...
def to_host(tensor: Tensor | None, rows: int) -> Tensor | None:
    """Start a copy of the first `rows`, to pinned memory: a graph puts its next result in the
    same place.
    """
    if tensor is None:
        return None
    host = torch.empty(rows, *tensor.shape[1:], dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor[:rows], non_blocking=True)
