"""An event loop with virtual time, which advances only when nothing else can run. Hours of waiting
take no time, and timestamps are exact.
"""

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from types import SimpleNamespace
from typing import Any, TypeVar, TypeVarTuple, Unpack

EPOCH = 1_800_000_000.0


T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Run `func` at once in this thread, since other threads run in real time."""
        del executor
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
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
"""Replaces the module `time` in the code under test."""
