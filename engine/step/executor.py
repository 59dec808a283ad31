"""The pipeline's executor: batches become steps of the model, results become Python numbers."""

import logging
from collections.abc import Iterable
from traceback import format_exception
from typing import cast

import numpy as np

from engine.core.errors import EngineDead
from engine.core.pipeline import SampledToken, StepOutput, new_sampled_token
from engine.core.request import ConstraintState
from engine.core.scheduler import Batch
from engine.device.device import Device
from engine.device.packed_arrays import PackedArrays
from engine.device.stream import Pending
from engine.loading.reasons import is_out_of_memory, reason
from engine.step.builder import StepBuilder
from engine.step.result import HostTokens, StepResult
from engine.step.runner import Forward, ModelRunner
from engine.text.grammar import GrammarState, TokenMasks

logger = logging.getLogger(__name__)


class ModelExecutor:
    """Builds, launches and reads back steps of one model. Satisfies `Executor`."""

    def __init__(
        self, builder: StepBuilder, runner: ModelRunner, masks: TokenMasks, device: Device
    ):
        self._builder = builder
        self._runner = runner
        self._masks = masks
        self._device = device

    def launch(self, batch: Batch) -> "ModelStep":
        step = self._builder.build(batch)
        if any(entry.sequence.constraint is not None for entry in batch.scheduled):
            return ModelStep(self._runner, self._masks, self._runner.launch_forward(step))
        return ModelStep(self._runner, self._masks, None, self._runner.launch(step))

    def recover(self, error: Exception) -> None:
        """Log the error, and make room for the next step if memory ran out.

        Raises EngineDead if the device is lost, because whatever runs next would fail the same
        way. Only the device can tell: errors of every class come from devices that go on, and
        from devices that do not.
        """
        # As text: the traceback refers to the step, and whoever keeps the record would keep both.
        logger.warning("a step failed: %s", "".join(format_exception(error)))
        error.__traceback__ = None
        try:
            self._device.synchronize()
        except RuntimeError as lost:
            raise EngineDead(f"the device is lost: {reason(lost)}") from lost
        if is_out_of_memory(error):
            self._device.free_unused()


class ModelStep:
    """A step in flight. One with guided sequences has a `forward` whose sampling comes later."""

    def __init__(
        self,
        runner: ModelRunner,
        masks: TokenMasks,
        forward: Forward | None,
        pending: Pending[StepResult] | None = None,
    ):
        self._runner = runner
        self._masks = masks
        self._forward = forward
        self._pending = pending

    @property
    def needs_sampling(self) -> bool:
        return self._pending is None

    def sample(self, guided: list[tuple[int, ConstraintState]]) -> None:
        assert self._forward is not None
        masks = None
        if guided:
            rows, states = zip(*guided, strict=True)
            filled = self._masks.fill(cast(tuple[GrammarState, ...], states))
            masks = PackedArrays({"rows": np.array(rows), "masks": filled})
        self._pending = self._runner.launch_sampling(self._forward, masks)

    def result(self) -> StepOutput:
        assert self._pending is not None, "the sampling was not launched"
        result = self._pending.result()
        output = _output(result)
        result.release()
        return output

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.exception()
        elif self._forward is not None and self._forward.pending is not None:
            self._forward.pending.exception()


def _output(result: StepResult) -> StepOutput:
    return StepOutput(
        tokens=None if result.sampled is None else _tokens(result.sampled),
        prompt_tokens=[] if result.prompt is None else list(_tokens(result.prompt)),
        is_slowed=result.has_captured,
    )


def _tokens(sampled: HostTokens) -> Iterable[SampledToken]:
    """Return the tokens as Python's numbers, which outlive the step's buffers."""
    ids = sampled.ids.tolist()
    logprobs = [None] * len(ids) if sampled.logprobs is None else sampled.logprobs.tolist()
    if sampled.top_ids is None or sampled.top_logprobs is None:
        top: list[list[tuple[int, float]]] = [[]] * len(ids)
    else:
        pairs = zip(sampled.top_ids.tolist(), sampled.top_logprobs.tolist(), strict=True)
        top = [list(zip(i, p, strict=True)) for i, p in pairs]
    return map(new_sampled_token, zip(ids, logprobs, top, strict=True))
