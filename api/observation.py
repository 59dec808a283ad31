"""What is told of each request: one place sees it begin, pass its checks, and end."""

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from engine.request import Finished, Request


@dataclass(frozen=True, slots=True)
class Caller:
    """The route that a request came by, and the trace it belongs to."""

    route: str
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of a request's life. `queue_s` and `inference_s` are those of its best completion."""

    total_s: float
    validation_s: float
    queue_s: float
    inference_s: float
    num_generated_tokens: int

    @property
    def per_token_s(self) -> float:
        return self.inference_s / self.num_generated_tokens


class Observation:
    """One request, from before its checks until it has ended, well or not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """`problem` tells how it failed: a request's error, or GeneratorExit or
        CancelledError where the client went away.
        """

    def validated(self, request: Request) -> None:
        """It passed its checks, and is about to be queued."""

    def finished(self, end: Finished, timings: Timings) -> None:
        """It ended well."""


class Observer:
    """Makes an observation of each request."""

    def request(self, caller: Caller) -> Observation:
        del caller
        return Observation()
