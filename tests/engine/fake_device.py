"""A device for engines on a CPU that fails as a GPU does, when a test says so."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.engine import Engine
from engine.sampling.sampler import SamplingKind
from engine.step.graphs import Graph

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class FakeDevice:
    """Satisfies `Device`, and captures work as graphs, which run nothing.

    lost      what `synchronize` raises, if the device is lost
    spoilt    whether a capture broke off, after which a GPU's allocator may be useless
    captured  how many captures succeeded
    """

    def __init__(self) -> None:
        self.lost: str | None = None
        self.spoilt = False
        self.captured = 0
        self.num_freed = 0
        self._refuses = False
        self._captures = False

    def synchronize(self) -> None:
        if self.lost is not None:
            raise RuntimeError(self.lost)

    def free_unused(self) -> None:
        gc.collect()
        self.num_freed += 1

    @contextmanager
    def refusing_waits(self) -> Iterator[None]:
        self._refuses = True
        try:
            yield
        finally:
            self._refuses = False

    def wait(self) -> None:
        """Do what `.item()` does."""
        if self._refuses:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self._captures:
            raise torch.AcceleratorError("CUDA error: operation not permitted when capturing")

    def capture(self, work: Callable[[], Any]) -> tuple[Graph, Any]:
        self._captures = True
        try:
            result = work()
        except Exception as error:
            self.spoilt = not isinstance(error, torch.OutOfMemoryError)
            raise
        finally:
            self._captures = False
        self.captured += 1
        return _Nothing(), result


class _Nothing:
    def replay(self) -> None:
        pass


class FakeEvent:
    """Stands for `torch.cuda.Event`, on a device that has done all that was launched."""

    def __init__(self, **_: Any):
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextmanager
def without_collection() -> Iterator[None]:
    """Leave cycles of references alone: what dies meanwhile was in none."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def captures_greedy_steps(engine: Engine) -> Engine:
    """Have an engine with the torch sampler, which asks for no capture, capture greedy steps."""
    greedy = SamplingKind(plain=True, logprobs=False, raw_logprobs=False, num_top=0)
    engine._graphs_to_capture = [(shape, greedy) for shape in engine._builder.graph_shapes]
    return engine
