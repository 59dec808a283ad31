"""Launches a step without waiting for it, on a GPU or a CPU.

CUDA kernels are asynchronous: a launch returns at once, and an event marks the end of the
work. On a CPU one worker thread gives the same behaviour, so the engine is written once:
launch step N+1, then collect the results of step N.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """The result of a launched computation."""

    def result(self) -> T_co:
        """Wait for the computation and return its result, or raise its error."""


class Stream(Protocol):
    """Runs the work that is launched on it in order."""

    def launch(self, work: Callable[[], T]) -> Pending[T]: ...

    def close(self) -> None: ...


class CpuStream:
    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="skiff-cpu-stream")

    def launch(self, work: Callable[[], T]) -> Future[T]:
        return self._worker.submit(work)

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)


class _CudaPending(Generic[T]):
    def __init__(self, value: T | None, error: Exception | None, done: torch.cuda.Event):
        self._value = value
        self._error = error
        self._done = done

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        self._done.synchronize()
        return self._value  # type: ignore[return-value]


class CudaStream:
    def launch(self, work: Callable[[], T]) -> Pending[T]:
        value, error = None, None
        try:
            value = work()
        except Exception as e:  # raised when the result is asked for, as on the CPU
            error = e
        done = torch.cuda.Event()
        done.record()
        return _CudaPending(value, error, done)

    def close(self) -> None:
        pass


def run_in_temporary_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread of its own, and return its result once that thread is done.

    Each thread that computes on a CPU keeps a team of OpenMP threads until it ends. With a
    second team alive there are more threads than cores, and libgomp then puts them to sleep
    between any two operations: a forward takes half as long again.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    # A daemon thread, so that an interrupt from the keyboard ends the process.
    threading.Thread(target=run, name="skiff-load", daemon=True).start()
    return done.result()


def make_stream(device: torch.device) -> Stream:
    return CudaStream() if device.type == "cuda" else CpuStream()
