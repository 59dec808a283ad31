"""Runs one step of the model: packed row in, sampled tokens out. Never waits."""

import logging
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.attention.interface import StepContext
from engine.attention.kv_cache import bind_kv_cache, copy_blocks
from engine.attention.plan import AttentionPlanner, GraphShape, make_planner
from engine.core.config import BLOCK_SIZE
from engine.device.packed_arrays import PackedArrays
from engine.device.stream import Pending, Stream
from engine.loading.loader import LoadedModel
from engine.loading.sizing import Limits
from engine.sampling.sampler import SampledTokens, Sampler, to_host
from engine.sampling.triton_sampler import make_sampler
from engine.step.builder import HostStep, StepBuilder, StepInputs
from engine.step.graphs import Capture, StepGraphs, shapes_for

_FORWARD = "forward"

logger = logging.getLogger(__name__)


def build_runner(
    loaded: LoadedModel,
    limits: Limits,
    stream: Stream,
    capture: Capture | None,
    watermark: tuple[float, float],
) -> tuple[StepBuilder, "ModelRunner"]:
    """What turns batches into steps, and what runs them, sharing the slots' state.

    `capture` records steps as graphs; None: every step is launched kernel by kernel.
    """
    model, device = loaded.model, loaded.model.device
    tables_shape = limits.max_sequences + 1, -(-limits.max_total_tokens // BLOCK_SIZE)
    sampler = make_sampler(
        loaded.ops, limits.max_sequences, model.config.get_text_config().vocab_size, device
    )
    shapes = shapes_for(limits.max_sequences, limits.max_batch_tokens) if capture else ()
    max_rows = max((limits.max_sequences, *(shape.rows for shape in shapes)))
    planner = make_planner(loaded.ops, loaded.calls, tables_shape, max_rows, device)
    builder = StepBuilder(tables_shape, sampler, planner, shapes, device)
    context = bind_kv_cache(loaded.calls, limits.num_blocks, limits.cache_dtype, device, loaded.ops)
    graphs = StepGraphs(capture, device) if capture else None
    runner = ModelRunner(
        model, context, sampler, planner, graphs, stream, limits.max_sequences, watermark
    )
    return builder, runner


@dataclass(frozen=True, slots=True)
class StepResult:
    """`sampled` is None when nothing was; `prompt_logprobs` [prompt rows] float32 likewise."""

    sampled: SampledTokens | None
    prompt_logprobs: Tensor | None


@dataclass(slots=True)
class Forward:
    """A step's forward, and what it leaves for the sampling, in stream order."""

    step: HostStep
    inputs: StepInputs | None = None
    logits: Tensor | None = None
    pending: Pending[None] | None = None


@dataclass(frozen=True, slots=True)
class _Sampling:
    """A step in two parts: where the first failed, that is what there is to say."""

    forward: Pending[None]
    sampling: Pending[StepResult]

    def result(self) -> StepResult:
        self.forward.result()
        return self.sampling.result()


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
        watermark: tuple[float, float],
    ):
        """`watermark` is the share of the vocabulary it favours, and by how much."""
        self._model = model
        self._context = context
        self._sampler = sampler
        self._planner = planner
        self._graphs = graphs
        self._captures = {"prefills", "decodes"} if graphs else set()
        self._watermark = watermark
        self._stream = stream
        # One more, for the rows of a graph that are nobody's.
        self._last_ids = torch.zeros(max_sequences + 1, dtype=torch.int64, device=model.device)

    def launch(self, step: HostStep) -> Pending[StepResult]:
        """Queue the step; the result is on the host."""
        forward = Forward(step)
        return self._stream.launch(partial(self._run, forward))

    def launch_forward(self, step: HostStep) -> "Forward":
        """Queue all of a step but its sampling, which `launch_sampling` does."""
        forward = Forward(step)
        forward.pending = self._stream.launch(partial(self._run_forward, forward))
        return forward

    def launch_sampling(
        self, forward: "Forward", masks: PackedArrays | None
    ) -> Pending[StepResult]:
        """`masks` has what grammars allow: `rows` [n] int64 of those sampled, and their `masks`
        [n, words] int32.
        """
        sampling = self._stream.launch(partial(self._run_sampling, forward, masks))
        assert forward.pending is not None
        return _Sampling(forward.pending, sampling)

    def _run(self, forward: "Forward") -> StepResult:
        self._run_forward(forward)
        return self._run_sampling(forward, None)

    @torch.inference_mode()
    def _run_forward(self, forward: "Forward") -> None:
        step = forward.step
        for slot, token_ids, num_prompt_tokens in step.counts:
            self._sampler.start_counts(slot, token_ids, num_prompt_tokens)
        if step.update is not None:
            self._planner.apply_update(partial(step.update.view, self._on_device(step.update)))
        if self._graphs is not None and step.graph is not None:
            forward.inputs = self._graphs.load(step, step.graph)
            if self._graphs.has(step.graph, _FORWARD):
                forward.logits = self._graphs.replay(step.graph, _FORWARD)
                return
        else:
            forward.inputs = step.inputs(self._on_device(step.arrays))
        forward.logits = self.forward(forward.inputs)

    @torch.inference_mode()
    def _run_sampling(self, forward: "Forward", masks: PackedArrays | None) -> StepResult:
        step, inputs, logits = forward.step, forward.inputs, forward.logits
        assert inputs is not None
        assert logits is not None, "the forward failed"
        prompt_logprobs = None
        if step.rare is not None:
            prompt_logprobs = self._do_rare(step, step.rare, inputs, logits)
        if masks is not None:
            view = partial(masks.view, self._on_device(masks))
            self._context.ops.mask_tokens(logits, view("rows"), view("masks"))
        sampled = None
        if step.sampling is not None:
            kind = step.sampling.kind
            if self._graphs is not None and step.graph is not None:
                sampled = self._sample_graph(self._graphs, step.graph, logits, inputs, kind)
            else:
                sampled = self._sample(logits[: step.num_sampled], inputs, kind)
            sampled = sampled.to_host(step.num_sampled)
        return StepResult(sampled, prompt_logprobs)

    def _on_device(self, arrays: PackedArrays) -> Tensor:
        return arrays.on(self._last_ids.device)

    def _do_rare(
        self, step: HostStep, rare: PackedArrays, inputs: StepInputs, logits: Tensor
    ) -> Tensor | None:
        """Blocks to be copied, scores to be watermarked; the logprobs of prompts' tokens."""
        view = partial(rare.view, self._on_device(rare))
        if "copied" in rare:
            copy_blocks(self._context.pools, *view("copied"))
        if "watermarked" in rare:
            rows = inputs.kept_rows[: len(inputs.sampled_slots)]
            previous = self._known(inputs.input_ids[rows], inputs.sampled_slots)
            self._context.ops.watermark(logits, view("watermarked"), previous, *self._watermark)
        if "prompt_ids" not in rare:
            return None
        logprobs = logits[step.num_sampled :].float().log_softmax(-1)
        chosen = logprobs.gather(-1, view("prompt_ids")[:, None])[:, 0]
        return to_host(chosen, len(chosen))

    def _sample_graph(
        self,
        graphs: StepGraphs,
        shape: GraphShape,
        logits: Tensor,
        inputs: StepInputs,
        kind: Hashable,
    ) -> SampledTokens:
        """Captured apart from the forward, there being many kinds of sampling.

        What was not captured yet runs without a graph this time, and is captured after.
        """
        if graphs.has(shape, _FORWARD) and graphs.has(shape, kind):
            return graphs.replay(shape, kind)
        sampled = self._sample(logits, inputs, kind)
        if shape.steps in self._captures:
            self._capture(graphs, shape, inputs, kind)
        return sampled

    def _capture(
        self, graphs: StepGraphs, shape: GraphShape, inputs: StepInputs, kind: Hashable
    ) -> None:
        """For the next step like this one. What cannot be captured once is not tried again."""
        try:
            if not graphs.has(shape, _FORWARD):
                graphs.capture(shape, _FORWARD, partial(self.forward, inputs))
            logits = graphs.result(shape, _FORWARD)
            graphs.capture(shape, kind, partial(self._sample, logits, inputs, kind))
        except RuntimeError as error:
            # Whatever decodes do that cannot be captured, prefills do too.
            refused = self._captures & ({"prefills"} if shape.prefills else {"prefills", "decodes"})
            self._captures -= refused
            steps = " and ".join(sorted(refused))
            logger.warning("%s are launched kernel by kernel: no graph of them (%s)", steps, error)

    def needs_capture(self, step: HostStep) -> bool:
        """Whether a graph of it is missing that can be captured."""
        if self._graphs is None or step.graph is None or step.graph.steps not in self._captures:
            return False
        has_forward = self._graphs.has(step.graph, _FORWARD)
        has_sampling = step.sampling is None or self._graphs.has(step.graph, step.sampling.kind)
        return not (has_forward and has_sampling)

    def forward(self, inputs: StepInputs) -> Tensor:
        """Logits of the rows to keep, [num_sampled + prompt rows, vocab_size]."""
        input_ids = self._known(inputs.input_ids, inputs.token_slots)
        self._context.metadata = inputs.attention
        return self._model(
            input_ids=input_ids[None],
            position_ids=inputs.position_ids[None],
            use_cache=False,
            logits_to_keep=inputs.kept_rows,
        ).logits[0]

    def _known(self, token_ids: Tensor, slots: Tensor) -> Tensor:
        """The token ids; where they are on the device alone, the last ones of their slots."""
        return torch.where(token_ids < 0, self._last_ids[slots], token_ids)

    def _sample(self, logits: Tensor, inputs: StepInputs, kind: Hashable) -> SampledTokens:
        sampled = self._sampler.sample(logits, inputs.sampling, kind)
        self._last_ids[inputs.sampled_slots] = sampled.ids
        return sampled
