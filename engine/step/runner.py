"""Runs one step of the model: packed row in, sampled tokens out. Never waits for the device."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.attention.interface import StepContext
from engine.attention.kv_cache import bind_kv_cache, copy_blocks
from engine.attention.plan import AttentionPlanner, GraphShape, make_planner
from engine.core.config import BLOCK_SIZE
from engine.device.host_buffers import HostBuffers, Staging
from engine.device.packed_arrays import PackedArrays
from engine.device.stream import Pending, Stream
from engine.fusion.rotary_tables import RotaryTables
from engine.linear.merged import forget_results
from engine.loading.loader import LoadedModel
from engine.loading.sizing import Limits
from engine.sampling.factory import make_sampler
from engine.sampling.sampler import Sampler, SamplingKind
from engine.step.builder import ON_DEVICE, HostStep, NewContexts, StepBuilder, StepInputs
from engine.step.captures import Captures
from engine.step.graphs import Capture, ShapeGraphs, StepGraphs, shapes_for
from engine.step.rehearsal import Rehearsal
from engine.step.result import PackedTokens, StepResult


def build_runner(
    loaded: LoadedModel,
    limits: Limits,
    stream: Stream,
    capture: Capture | None,
    max_top_tokens: int,
    watermark: tuple[float, float],
    captures: Captures,
) -> tuple[StepBuilder, "ModelRunner"]:
    """Return what turns batches into steps, and what runs them; both share the slots' state.

    `capture` records those steps as graphs that `captures` allows; None: every step is launched
    kernel by kernel.
    """
    model, device = loaded.model, loaded.model.device
    tables_shape = limits.max_sequences + 1, -(-limits.max_total_tokens // BLOCK_SIZE)
    vocab_size = model.config.get_text_config().vocab_size
    sampler = make_sampler(loaded.ops, limits.max_sequences, vocab_size, device, max_top_tokens)
    shapes = shapes_for(limits.max_sequences, limits.max_batch_tokens) if capture else ()
    max_tokens = max((limits.max_sequences, *(shape.tokens for shape in shapes)))
    planner = make_planner(
        loaded.ops, loaded.calls, tables_shape, max_tokens, device, loaded.batch_invariant
    )
    builder = StepBuilder(tables_shape, sampler, planner, shapes)
    context = bind_kv_cache(loaded.calls, limits.num_blocks, limits.cache_dtype, device, loaded.ops)
    graphs = None
    if capture:
        graphs = StepGraphs(capture, planner, device, max(shape.rows for shape in shapes))
    runner = ModelRunner(
        model,
        RotaryTables(model, tables_shape[1] * BLOCK_SIZE),  # all that a block table has room for
        context,
        sampler,
        planner,
        graphs,
        captures,
        stream,
        limits.max_sequences,
        watermark,
    )
    return builder, runner


@dataclass(slots=True)
class Forward:
    """A step's forward, and what it leaves for the sampling, in stream order.

    staging       the host's side of the step's copies
    graphs        of the step's shape, if the step runs in a graph
    has_captured  whether its graphs were captured, which took longer than the step
    """

    step: HostStep
    staging: Staging
    graphs: ShapeGraphs | None = None
    inputs: StepInputs | None = None
    logits: Tensor | None = None
    pending: Pending[None] | None = None
    has_captured: bool = False


@dataclass(frozen=True, slots=True)
class _Sampling:
    """Result of a step whose sampling was launched separately. Raises the forward's error first."""

    forward: Pending[None]
    sampling: Pending[StepResult]

    def result(self) -> StepResult:
        self.forward.result()
        return self.sampling.result()

    def exception(self) -> BaseException | None:
        errors = self.forward.exception(), self.sampling.exception()
        return errors[0] or errors[1]


class ModelRunner:
    """Owns the model and what the device remembers between steps: each slot's last token."""

    def __init__(
        self,
        model: PreTrainedModel,
        rotary_tables: RotaryTables,
        context: StepContext,
        sampler: Sampler,
        planner: AttentionPlanner,
        graphs: StepGraphs | None,
        captures: Captures,
        stream: Stream,
        max_sequences: int,
        watermark: tuple[float, float],
    ):
        """`watermark` is the share of the vocabulary it favours, and by how much."""
        self._model = model
        self._rotary_tables = rotary_tables
        self._context = context
        self.sampler = sampler
        self._planner = planner
        self._graphs = graphs
        self._captures = captures
        self._watermark = watermark
        self._stream = stream
        self._device = model.device
        self._buffers = HostBuffers(model.device)
        # The extra last slot pads captured graphs.
        self._last_ids = torch.zeros(max_sequences + 1, dtype=torch.int64, device=model.device)

    def launch(self, step: HostStep) -> Pending[StepResult]:
        """Queue the whole step; its result will be on the host."""
        forward = Forward(step, Staging(self._buffers))
        return self._stream.launch(partial(self._run, forward))

    def launch_forward(self, step: HostStep) -> Forward:
        """Queue all of a step but its sampling, which `launch_sampling` queues."""
        forward = Forward(step, Staging(self._buffers))
        forward.pending = self._stream.launch(partial(self._run_forward, forward))
        return forward

    def launch_sampling(self, forward: Forward, masks: PackedArrays | None) -> Pending[StepResult]:
        """Queue the sampling of a launched forward.

        `masks` says what grammars allow: `rows` [n] int64 of the sampled rows, and their `masks`
        [n, words] int32.
        """
        sampling = self._stream.launch(partial(self._run_sampling, forward, masks))
        assert forward.pending is not None
        return _Sampling(forward.pending, sampling)

    def prepare_sampling(self, rehearsals: Iterable[Rehearsal]) -> None:
        """Sample all of these once, from the logits of one forward, and wait for it.

        Compiling a kernel takes seconds, for which no step of a request then has to wait.
        """
        forward = None
        for step, masks in rehearsals:
            forward = replace(forward, step=step) if forward else self.launch_forward(step)
            self.launch_sampling(forward, masks).result()

    def _run(self, forward: Forward) -> StepResult:
        self._run_forward(forward)
        return self._run_sampling(forward, None)

    @torch.inference_mode()
    def _run_forward(self, forward: Forward) -> None:
        step = forward.step
        if step.contexts is not None:
            self._start_counts(step.contexts, forward.staging)
        if step.update is not None:
            self._planner.apply_update(step.update.upload(self._device, forward.staging))
        if self._graphs is None or step.graph is None:
            arrays = step.arrays.upload(self._device, forward.staging)
            forward.inputs = step.inputs(arrays, self._planner)
            forward.logits = self.forward(forward.inputs)
            return
        forward.graphs = graphs = self._graphs.load(step, step.graph, forward.staging)
        forward.inputs = graphs.inputs
        if graphs.forward is not None:
            forward.logits = graphs.forward.replay()
            return
        run = partial(self._shared_forward, graphs.inputs)
        forward.logits = self._captures.try_out(step.graph, run)

    def _start_counts(self, new: NewContexts, staging: Staging) -> None:
        """Count the known tokens of sequences that are new to their slots."""
        token_ids = new.token_ids.upload(self._device, staging)["token_ids"]
        lengths = [context.num_tokens for context in new.contexts]
        for context, known in zip(new.contexts, token_ids.split(lengths), strict=True):
            self.sampler.slots.start_counts(
                context.slot, known, context.num_prompt_tokens, context.counts_prompt
            )

    @torch.inference_mode()
    def _run_sampling(self, forward: Forward, masks: PackedArrays | None) -> StepResult:
        step, inputs, logits = forward.step, forward.inputs, forward.logits
        assert inputs is not None
        assert logits is not None, "the forward failed"
        staging = forward.staging
        extras = {} if step.extras is None else step.extras.upload(self._device, staging)
        if "copied" in extras:
            copy_blocks(self._context.pools, *extras["copied"])
        prompt = None
        if "prompt_ids" in extras:
            prompt_logits = logits[step.num_sampled :]
            logits = logits[: step.num_sampled]
            reported = self.sampler.report(prompt_logits, extras["prompt_ids"], step.num_prompt_top)
            prompt = PackedTokens.of(reported).to_host(len(prompt_logits), staging)
        sampled = None
        if step.sampling is not None:
            allowed = None if masks is None else masks.upload(self._device, staging)
            scores = self._change(logits, inputs, extras, allowed, step.sampling)
            packed = self._run_sampler(forward, logits, scores, step.sampling)
            sampled = packed.to_host(step.num_sampled, staging)
        return StepResult(sampled, prompt, staging, forward.has_captured)

    def _change(
        self,
        logits: Tensor,
        inputs: StepInputs,
        extras: dict[str, Tensor],
        masks: dict[str, Tensor] | None,
        kind: SamplingKind,
    ) -> Tensor:
        """Return the logits with watermark, biases and the masks of grammars, where asked.

        They are changed in place, unless logprobs of the model's own are to be reported, or there
        are biases: float32 holds those, which may leave nothing of a half precision's digits.
        """
        is_changed = "watermarked" in extras or "biases" in extras or masks is not None
        if is_changed and kind.raw_logprobs:
            logits = logits.clone()
        if "watermarked" in extras:
            rows = inputs.kept_rows[: len(inputs.sampled_slots)]
            previous = self._known(inputs.input_ids[rows], inputs.sampled_slots)
            self._context.ops.watermark(logits, extras["watermarked"], previous, *self._watermark)
        if "biases" in extras:
            logits = logits.float()
            logits[extras["biased_rows"], extras["biased_ids"]] += extras["biases"]
        if masks is not None:
            self._context.ops.mask_tokens(logits, masks["rows"], masks["masks"])
        return logits

    def _run_sampler(
        self, forward: Forward, logits: Tensor, scores: Tensor, kind: SamplingKind
    ) -> PackedTokens:
        """Sample from the scores, which the logits may have been copied to.

        A graph samples from the logits themselves; a copy is sampled kernel by kernel. What was
        not captured yet is captured after it has run.
        """
        graphs, shape, inputs = forward.graphs, forward.step.graph, forward.inputs
        assert inputs is not None
        is_copy = scores is not logits
        own = kind.of_own_logits
        is_captured = graphs is not None and graphs.forward is not None and own in graphs.sampling
        if graphs is not None and is_captured and not is_copy:
            return graphs.sampling[own].replay()
        run = partial(self._sample, scores, inputs, kind, logits if is_copy else None)
        if graphs is None or shape is None or is_captured:
            return run()
        sampled = self._captures.try_out(shape, run)
        self._capture(graphs, shape, own)
        forward.has_captured = True
        return sampled

    def _capture(self, graphs: ShapeGraphs, shape: GraphShape, kind: SamplingKind) -> None:
        """Capture a step's graphs for the next step of its shape and kind, where that is allowed.

        Both parts of the step were tried out.
        """
        if self._captures.allow(shape):
            self._captures.attempt(shape, partial(self._capture_parts, graphs, kind))

    def _capture_parts(self, graphs: ShapeGraphs, kind: SamplingKind) -> None:
        assert self._graphs is not None
        if graphs.forward is None:
            graphs.forward = self._graphs.capture(partial(self._shared_forward, graphs.inputs))
        logits = graphs.forward.result
        graphs.sampling[kind] = self._graphs.capture(
            partial(self._sample, logits, graphs.inputs, kind)
        )

    def needs_capture(self, step: HostStep) -> bool:
        """Whether the step lacks a graph that can be captured."""
        if self._graphs is None or step.graph is None or not self._captures.allow(step.graph):
            return False
        graphs = self._graphs.get(step.graph)
        if graphs is None or graphs.forward is None:
            return True
        kind = step.sampling
        return kind is not None and kind.of_own_logits not in graphs.sampling

    def _shared_forward(self, inputs: StepInputs) -> Tensor:
        """Return the logits of a graph's step, [rows, vocab_size], in the memory of all graphs."""
        assert self._graphs is not None
        return self._graphs.share(self.forward(inputs))

    def forward(self, inputs: StepInputs) -> Tensor:
        """Return the logits of the kept rows, [num_sampled + prompt rows, vocab_size]."""
        self._planner.apply_update(inputs.arrays)
        input_ids = self._known(inputs.input_ids, inputs.token_slots)
        self._context.begin(inputs.attention)
        try:
            with self._rotary_tables:
                return self._model(
                    input_ids=input_ids[None],
                    position_ids=inputs.position_ids[None],
                    use_cache=False,
                    logits_to_keep=inputs.kept_rows,
                ).logits[0]
        except Exception:
            forget_results(self._model)
            raise

    def _known(self, token_ids: Tensor, slots: Tensor) -> Tensor:
        """Replace `ON_DEVICE` among the token ids by the last token sampled in the slot."""
        return torch.where(token_ids == ON_DEVICE, self._last_ids[slots], token_ids)

    def _sample(
        self, logits: Tensor, inputs: StepInputs, kind: SamplingKind, raw: Tensor | None = None
    ) -> PackedTokens:
        sampled = self.sampler.sample(logits, inputs.arrays, kind, raw)
        self._last_ids[inputs.sampled_slots] = sampled.ids
        return PackedTokens.of(sampled)
