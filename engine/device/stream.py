"""Launches a step without waiting for it, on a GPU or a CPU.

CUDA kernels are asynchronous: a launch returns at once, and an event marks the end of the
work. On a CPU one worker thread gives the same behaviour, so the engine is written once:
launch step N+1, then collect the results of step N.
"""

import threading
import traceback
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

    def exception(self) -> BaseException | None:
        """Wait for the computation and return its error, if it has one."""


class Stream(Protocol):
    """Runs the work that is launched on it in order."""

    def launch(self, work: Callable[[], T]) -> Pending[T]: ...

    def close(self) -> None: ...


class CpuStream:
    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="skiff-cpu-stream")

    def launch(self, work: Callable[[], T]) -> Future[T]:
        return self._worker.submit(_run, work)

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

    def exception(self) -> Exception | None:
        try:
            self._done.synchronize()
        except RuntimeError as error:
            return error
        return self._error


class CudaStream:
    def launch(self, work: Callable[[], T]) -> Pending[T]:
        value, error = None, None
        try:
            value = _run(work)
        except Exception as e:  # raised when the result is asked for, as on the CPU
            error = e
        # A thread that waits for it sleeps: in a busy loop it would take the event loop's core.
        done = torch.cuda.Event(blocking=True)
        done.record()
        return _CudaPending(value, error, done)

    def close(self) -> None:
        pass


def _run(work: Callable[[], T]) -> T:
    """Run `work`. If it fails, its error has the traceback as a note.

    The traceback itself would keep the tensors of half a step as long as the error is known, and
    the next step needs their memory.
    """
    try:
        return work()
    except Exception as error:
        error.__notes__ = [traceback.format_exc()]  # other notes are a part of it
        _drop_tracebacks(error)
        raise


def _drop_tracebacks(error: BaseException) -> None:
    """Free the variables of all functions that an error passed, or one that it was raised from."""
    errors: list[BaseException] = [error]
    for each in errors:
        traceback.clear_frames(each.__traceback__)
        each.__traceback__ = None
        causes = (each.__cause__, each.__context__)
        errors += [cause for cause in causes if cause is not None and cause not in errors]


def run_in_temporary_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread of its own, and return its result once that thread is done.

    Each thread that computes on a CPU keeps a team of OpenMP threads until it ends. With a
    second team alive there are more threads than cores, and libgomp then puts them to sleep
    between any two operations: a forward takes half as long again.
    """
    done: Future[T] = Future()
    # A daemon thread, so that an interrupt from the keyboard ends the process.
    threading.Thread(target=_fulfil, args=(done, work), name="skiff-load", daemon=True).start()
    try:
        return done.result()
    finally:
        del done


def _fulfil(done: "Future[T]", work: Callable[[], T]) -> None:
    """Give the future the result of `work`, or its error.

    An error's traceback keeps the variables of this function and of the one that waits for it.
    If one of them still named the future, which has the error, neither the error nor what the
    failed work had allocated would be freed.
    """
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
    finally:
        del done


def make_stream(device: torch.device) -> Stream:
    return CudaStream() if device.type == "cuda" else CpuStream()
