"""Carries what the engine's steps produce to the event loop.

The engine thread and the event loop share one interpreter lock, and to wake hundreds of streams
keeps the loop busy for milliseconds. So the loop rests between two deliveries: when it cannot
follow the steps, it takes several of them at once, which costs little more than one.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

_REST = 0.5
"""Least rest after a delivery, as a share of the time that the delivery took."""


class Outbox(Generic[T]):
    """A queue from the engine thread to `receive`, which is called on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, receive: Callable[[T], None]):
        self._loop = loop
        self._receive = receive
        self._items: deque[T] = deque()
        self._is_scheduled = False
        self._rest_until = 0.0

    # -- engine thread ----------------------------------------------------------------

    def send(self, item: T) -> None:
        """Have the item delivered, together with those that are sent before it is."""
        self._items.append(item)
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon_threadsafe(self._deliver)

    # -- event loop -------------------------------------------------------------------

    def _deliver(self) -> None:
        started = self._loop.time()
        if started < self._rest_until:
            # uvloop's clock has milliseconds: with less it would call again and again.
            self._loop.call_later(max(self._rest_until - started, 1e-3), self._deliver)
            return
        self._is_scheduled = False  # before the queue is emptied, so that no item is left in it
        self.empty()
        # Runs after the tasks that this delivery wakes.
        self._loop.call_soon(self._rest, started)

    def empty(self) -> None:
        """Deliver everything that was sent."""
        while self._items:
            item = self._items.popleft()
            try:
                self._receive(item)
            except Exception:
                logger.exception("a step's events could not be delivered")

    def _rest(self, started: float) -> None:
        now = self._loop.time()
        self._rest_until = now + (now - started) * _REST
