"""What both samplers keep for the sequence in each slot.

Sampling parameters are on the host, in one record array derived from `SamplingParams`.
Token counts, which only penalties need, are on the device.
"""

from collections.abc import Iterable
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from engine.core.request import SamplingParams
from kernels.sampling import GENERATED, IN_PROMPT

HOST_ONLY = ("seed", "logprobs", "raw_logprobs", "logit_bias", "watermark")
"""Parameters that are not values of a sampling step.

The seed becomes noise keys, `logprobs` and `raw_logprobs` decide on the host which results are
computed, and biases and the watermark change the logits before sampling starts.
"""
STEP_PARAMETERS = tuple(f.name for f in fields(SamplingParams) if f.name not in HOST_ONLY)
"""Parameters that every sampler has to heed."""

_NEUTRAL = SamplingParams()
_TYPES = {bool: np.bool_, int: np.int64, float: np.float32}
_PARAMETERS = np.dtype(
    [
        (f.name, np.uint64 if f.name == "seed" else _TYPES[type(f.default)])
        for f in fields(SamplingParams)
        if f.name != "logit_bias"  # of any length: kept beside the records
    ]
)
_TEMPERATURES = 2.0**-100, 2.0**100
"""Range of the temperatures that scores are divided by.

At its ends a text is greedy or uniform as beyond them, and no quotient leaves float32's range.
"""


def check_heeded(sampler: str, names: Iterable[str]) -> None:
    """Assert that a sampler heeds every step parameter, and no other."""
    differing = sorted(set(names) ^ set(STEP_PARAMETERS))
    assert not differing, f"{sampler} and SamplingParams differ in {', '.join(differing)}"


def storable(params: SamplingParams) -> SamplingParams:
    """Limit the temperature, and drop the wish for raw logprobs where none are asked for."""
    lowest, highest = _TEMPERATURES
    temperature = min(max(params.temperature, lowest), highest)
    return replace(params, temperature=temperature, raw_logprobs=params.reports_raw)


class SamplingSlots:
    """Parameters and token counts by slot. The extra last slot pads captured graphs."""

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device):
        self._vocab_size = vocab_size
        self._device = device
        self._parameters = np.zeros(max_sequences + 1, dtype=_PARAMETERS)
        # Most slots of a batch are often plain: greedy, and every other parameter neutral.
        self._is_plain = np.ones(max_sequences + 1, dtype=np.bool_)
        self._is_biased = np.zeros(max_sequences + 1, dtype=np.bool_)
        self._biases: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._counts: Tensor | None = None
        self.set_parameters(max_sequences, _NEUTRAL)

    # -- engine thread, ahead of the step ---------------------------------------------

    def set_parameters(self, slot: int, params: SamplingParams) -> None:
        """Store the parameters of a sequence that is new to this slot."""
        stored = storable(params)
        self._parameters[slot] = tuple(getattr(stored, name) for name in _PARAMETERS.names or ())
        self._set_bias(slot, params.logit_bias)
        steps_only = replace(params, **{name: getattr(_NEUTRAL, name) for name in HOST_ONLY})
        self._is_plain[slot] = steps_only == _NEUTRAL
        if self.needs_counts(slot):
            self.all_counts()  # allocated by this thread, before the step's own thread reads it

    def _set_bias(self, slot: int, logit_bias: tuple[tuple[int, float], ...]) -> None:
        self._is_biased[slot] = bool(logit_bias)
        self._biases.pop(slot, None)
        if logit_bias:
            ids, biases = zip(*logit_bias, strict=True)
            self._biases[slot] = np.array(ids, np.int64), np.array(biases, np.float32)

    def parameters(self, slots: np.ndarray) -> np.ndarray:
        """The records of these slots, with one field for each sampling parameter."""
        return self._parameters[slots]

    def are_plain(self, slots: np.ndarray) -> bool:
        """Whether all of these slots are greedy, with every other step parameter neutral."""
        return bool(self._is_plain[slots].all())

    def want_logprobs(self, slots: np.ndarray) -> bool:
        return bool(self._parameters["logprobs"][slots].any())

    def report_raw(self, slots: np.ndarray) -> np.ndarray:
        """Which of these slots report logprobs of the model's own distribution, [slots] bool."""
        raw: np.ndarray = self._parameters["raw_logprobs"][slots]
        return raw

    def have_penalties(self, slots: np.ndarray) -> np.ndarray:
        """Which of these slots have a penalty, [slots] bool."""
        p = self._parameters[slots]
        return (
            (p["repetition_penalty"] != 1)
            | (p["frequency_penalty"] != 0)
            | (p["presence_penalty"] != 0)
            | (p["output_frequency_penalty"] != 0)
        )

    def needs_counts(self, slot: int) -> bool:
        return bool(self.have_penalties(np.array([slot]))[0])

    def watermarked(self, slots: np.ndarray) -> np.ndarray:
        """Return the indices of these slots that are watermarked, [n] int64."""
        return np.flatnonzero(self._parameters["watermark"][slots])

    def biases(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """Return the logit biases of these slots as arrays to upload; none if no slot has any.

        biased_rows  [n] int64 indices of these slots
        biased_ids   [n] int64 token ids
        biases       [n] float32
        """
        rows = np.flatnonzero(self._is_biased[slots])
        if not len(rows):
            return {}
        ids, biases = zip(*(self._biases[slot] for slot in slots[rows].tolist()), strict=True)
        return {
            "biased_rows": np.repeat(rows, [len(b) for b in biases]),
            "biased_ids": np.concatenate(ids),
            "biases": np.concatenate(biases),
        }

    def counts_prompt(self, slot: int) -> bool:
        """Whether the token counts of this slot include the prompt's."""
        return bool(self._parameters["output_frequency_penalty"][slot] == 0)

    # -- in stream order --------------------------------------------------------------

    def all_counts(self) -> Tensor:
        """Token counts of all slots, [slots, vocab_size] int32.

        The tensor is allocated when it is first asked for.
        """
        if self._counts is None:
            shape = (len(self._parameters), self._vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        return self._counts

    def start_counts(
        self, slot: int, token_ids: Tensor, num_prompt_tokens: int, counts_prompt: bool = True
    ) -> None:
        """Count the known tokens, [n] int64, of a sequence that is new to this slot.

        If `counts_prompt` is False, the prompt's are only marked as such.
        """
        counts = self.all_counts()[slot].zero_()
        counted = token_ids if counts_prompt else token_ids[num_prompt_tokens:]
        counts.index_add_(0, counted, torch.ones_like(counted, dtype=torch.int32))
        if not counts_prompt:
            counts[token_ids[:num_prompt_tokens]] |= IN_PROMPT
        counts[token_ids[num_prompt_tokens:]] |= GENERATED
