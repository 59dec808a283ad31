"""Runs one step of the model: packed row in, sampled tokens out. Never waits."""

import logging
from collections.abc import Hashable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.attention import StepContext
from engine.attention_plan import AttentionPlanner, make_planner
from engine.config import BLOCK_SIZE
from engine.fused_sampler import make_sampler
from engine.graphs import Capture, StepGraphs, sizes_for
from engine.kv_cache import bind_kv_cache
from engine.loader import LoadedModel
from engine.sampler import SampledTokens, Sampler
from engine.sizing import Limits
from engine.step_inputs import HostStep, StepBuilder, StepInputs
from engine.stream import Pending, Stream

_FORWARD = "forward"

logger = logging.getLogger(__name__)


def build_runner(
    loaded: LoadedModel, limits: Limits, stream: Stream, capture: Capture | None
) -> tuple[StepBuilder, "ModelRunner"]:
    """What turns batches into steps, and what runs them, sharing the slots' state.

    `capture` records steps as graphs; None: every step is launched kernel by kernel.
    """
    model, device = loaded.model, loaded.model.device
    tables_shape = limits.max_sequences + 1, -(-limits.max_total_tokens // BLOCK_SIZE)
    sampler = make_sampler(
        loaded.ops, limits.max_sequences, model.config.get_text_config().vocab_size, device
    )
    planner = make_planner(loaded.ops, loaded.calls, tables_shape, device)
    graph_sizes = sizes_for(limits.max_sequences) if capture else ()
    builder = StepBuilder(tables_shape, sampler, planner, graph_sizes, device)
    context = bind_kv_cache(loaded.calls, limits.num_blocks, limits.cache_dtype, device, loaded.ops)
    graphs = StepGraphs(capture, device) if capture else None
    runner = ModelRunner(model, context, sampler, planner, graphs, stream, limits.max_sequences)
    return builder, runner


class ModelRunner:
    """Owns the model and what the device remembers between steps: each slot's last token."""

    def __init__(
        self,
        model: PreTrainedModel,
        context: StepContext,
        sampler: Sampler,
        planner: AttentionPlanner,
        graphs: StepGraphs | None,
        stream: Stream,
        max_sequences: int,
    ):
        self._model = model
        self._context = context
        self._sampler = sampler
        self._planner = planner
        self._graphs = graphs
        self._can_capture = True
        self._stream = stream
        # One more, for the rows of a graph that are nobody's.
        self._last_ids = torch.zeros(max_sequences + 1, dtype=torch.int64, device=model.device)

    def launch(self, step: HostStep) -> Pending[SampledTokens | None]:
        """Queue the step; the result, None when nothing was sampled, is on the host."""
        return self._stream.launch(partial(self._run, step))

    @torch.inference_mode()
    def _run(self, step: HostStep) -> SampledTokens | None:
        for slot, token_ids in step.counts:
            self._sampler.start_counts(slot, token_ids)
        if step.update is not None:
            uploaded = step.update.on(self._last_ids.device)
            self._planner.apply_update(partial(step.update.view, uploaded))
        if self._graphs is not None and step.graph_size is not None:
            return self._run_graph(self._graphs, step, step.graph_size).to_host(step.num_sampled)
        inputs = step.inputs(step.arrays.on(self._last_ids.device))
        logits = self.forward(inputs)
        if step.sampling is None:
            return None
        return self._sample(logits, inputs, step.sampling.kind).to_host(step.num_sampled)

    def _run_graph(self, graphs: StepGraphs, step: HostStep, size: int) -> SampledTokens:
        """In two parts, there being many kinds of sampling and one forward.

        What was not captured yet runs without a graph this time, and is captured after.
        """
        assert step.sampling is not None
        inputs, kind = graphs.load(step, size), step.sampling.kind
        if graphs.has(size, _FORWARD) and graphs.has(size, kind):
            graphs.replay(size, _FORWARD)
            return graphs.replay(size, kind)
        sampled = self._sample(self.forward(inputs), inputs, kind)
        if self._can_capture:
            self._capture(graphs, size, inputs, kind)
        return sampled

    def _capture(self, graphs: StepGraphs, size: int, inputs: StepInputs, kind: Hashable) -> None:
        """For the next step like this one. What cannot be captured once is not tried again."""
        try:
            if not graphs.has(size, _FORWARD):
                graphs.capture(size, _FORWARD, partial(self.forward, inputs))
            logits = graphs.result(size, _FORWARD)
            graphs.capture(size, kind, partial(self._sample, logits, inputs, kind))
        except RuntimeError as error:
            logger.warning("steps are launched kernel by kernel: no graph of them (%s)", error)
            self._can_capture = False

    def has_graph(self, size: int) -> bool:
        """Whether a step of this size needs no capturing any more."""
        return not self._can_capture or self._graphs is None or self._graphs.has(size, _FORWARD)

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

    def _sample(self, logits: Tensor, inputs: StepInputs, kind: Hashable) -> SampledTokens:
        sampled = self._sampler.sample(logits, inputs.sampling, kind)
        self._last_ids[inputs.sampled_slots] = sampled.ids
        return sampled
