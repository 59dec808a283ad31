"""Time that passes only when nothing else happens: hours of waiting in no time, and exactly."""

import asyncio
import selectors
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

EPOCH = 1_800_000_000.0


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(
        self, _: object, work: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """In place: a thread's time is real."""
        done = self.create_future()
        try:
            done.set_result(work(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class _Selector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            return super().select(5)
        self._loop.now += timeout
        return ready


def now() -> float:
    return asyncio.get_running_loop().time()


TIME = SimpleNamespace(monotonic=now, time=lambda: EPOCH + now(), perf_counter=now)
"""In place of the module of that name."""
