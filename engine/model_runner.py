"""Runs one step of the model: packed row in, sampled tokens out. Never waits."""

from functools import partial
from typing import overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.attention import StepContext
from engine.sampler import SampledTokens, Sampler
from engine.step_inputs import StepInputs
from engine.stream import Pending, Stream


class ModelRunner:
    """Owns the model and what the device remembers between steps: each slot's last token."""

    def __init__(
        self,
        model: PreTrainedModel,
        context: StepContext,
        sampler: Sampler,
        stream: Stream,
        max_sequences: int,
    ):
        self._model = model
        self._context = context
        self._sampler = sampler
        self._stream = stream
        self._last_ids = torch.zeros(max_sequences, dtype=torch.int64, device=model.device)

    def launch(self, inputs: StepInputs) -> Pending[SampledTokens | None]:
        """Queue the step; the result, None when nothing was sampled, is on the host."""
        return self._stream.launch(partial(self._run, inputs))

    @torch.inference_mode()
    def _run(self, inputs: StepInputs) -> SampledTokens | None:
        for slot, token_ids in inputs.counts:
            self._sampler.start_counts(slot, token_ids)
        logits = self.forward(inputs)
        if inputs.sampling is None:
            return None
        sampled = self._sampler.sample(logits, inputs.sampling)
        self._last_ids[inputs.sampled_slots] = sampled.ids
        return SampledTokens(
            ids=_to_host(sampled.ids),
            logprobs=_to_host(sampled.logprobs),
            top_ids=_to_host(sampled.top_ids),
            top_logprobs=_to_host(sampled.top_logprobs),
        )

    def forward(self, inputs: StepInputs) -> Tensor:
        """Logits of the rows to sample, [num_sampled, vocab_size]."""
        last_ids = self._last_ids[inputs.token_slots]
        input_ids = torch.where(inputs.input_ids < 0, last_ids, inputs.input_ids)
        self._context.metadata = inputs.attention
        return self._model(
            input_ids=input_ids[None],
            position_ids=inputs.position_ids[None],
            use_cache=False,
            logits_to_keep=inputs.sampled_rows,
        ).logits[0]


@overload
def _to_host(tensor: Tensor) -> Tensor: ...
@overload
def _to_host(tensor: Tensor | None) -> Tensor | None: ...
def _to_host(tensor: Tensor | None) -> Tensor | None:
    """Start the copy into pinned memory; complete when the step's event is."""
    if tensor is None or tensor.device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
