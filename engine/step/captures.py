"""Decides which steps are captured as graphs, and what a capture that fails means.

A capture that breaks off may keep its memory until the process ends, and CUDA's allocator then
frees nothing any more (torch 2.11). So a step is tried before its capture begins: it runs once as
it is, while whatever waits for the device is refused, as a capture would refuse it.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from engine.attention.plan import GraphShape
from engine.device.device import Device
from engine.loading.reasons import is_out_of_memory, reason

T = TypeVar("T")

_RETRY_S = 60.0
"""Seconds after which a shape is captured again whose capture ran out of memory."""

logger = logging.getLogger(__name__)


class Captures:
    """The shapes of steps that may be captured."""

    def __init__(self, device: Device):
        self._device = device
        self._refused: set[str] = set()
        self._retry_at: dict[GraphShape, float] = {}

    def allow(self, shape: GraphShape) -> bool:
        is_postponed = time.monotonic() < self._retry_at.get(shape, 0.0)
        return shape.steps not in self._refused and not is_postponed

    def try_out(self, shape: GraphShape, work: Callable[[], T]) -> T:
        """Run a part of a step that may be captured next, and refuse to capture steps like it if
        it waits for the device.

        `work` may run twice. Raises what is wrong with it beside that.
        """
        if not self.allow(shape):
            return work()
        try:
            with self._device.refusing_waits():
                return work()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            why = reason(error)
        result = work()  # raises again what is wrong with the step itself
        self._refuse(shape, why)
        return result

    def attempt(self, shape: GraphShape, capture: Callable[[], None]) -> None:
        """Run `capture`, which may fail.

        If memory runs out, this shape alone is not captured for a while. If anything else fails,
        steps like it are never captured again. Raises RuntimeError if the device is lost.
        """
        try:
            capture()
        except RuntimeError as error:
            self._device.synchronize()
            if is_out_of_memory(error):
                self._postpone(shape, reason(error))
            else:
                self._refuse(shape, reason(error))

    def _postpone(self, shape: GraphShape, why: str) -> None:
        self._retry_at[shape] = time.monotonic() + _RETRY_S
        tokens, steps = shape.tokens, shape.steps
        logger.warning("no graph of %s of %d tokens for %.0f s: %s", steps, tokens, _RETRY_S, why)

    def _refuse(self, shape: GraphShape, why: str) -> None:
        # Whatever cannot be captured in decodes is in prefills too.
        refused = {"prefills"} if shape.prefills else {"prefills", "decodes"}
        steps = " and ".join(sorted(refused - self._refused))
        self._refused |= refused
        logger.warning("%s are launched kernel by kernel: no graph of them (%s)", steps, why)
