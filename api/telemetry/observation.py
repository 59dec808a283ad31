"""What is told of each request: one place sees it begin, pass its checks, and end.

It is counted, logged in one line when it ends, and traced where a collector is named.
What it asks for or answers is never told: no text of it comes here.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from api.http.disconnect import ClientGone
from api.http.errors import REQUEST_ERRORS, ValidationError, wire_error
from api.settings.config import Limits
from api.telemetry.logs import INFER, SERVER, duration
from api.telemetry.metrics import Failure, Metrics, Phase
from api.telemetry.tracing import SERVICE_NAME, Tracer, tracer_to
from engine.async_engine import AsyncEngine
from engine.core.metrics import StepFigures
from engine.core.request import Finished, Request

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_FAILURES: dict[str, Failure] = {
    "overloaded": "overloaded",
    "template_error": "template",
    "missing_template_variable": "template",
    "generation": "generation",
    "incomplete_generation": "incomplete",
    "incomplete_generation_stream": "incomplete",
}
"""TGI's label by the `error_type` on the wire. Every other one is a request refused."""
_FAULTS: frozenset[Failure] = frozenset({"generation", "incomplete"})
_GONE = (GeneratorExit, asyncio.CancelledError, ClientGone)

logger = logging.getLogger(__name__)
_server = logging.getLogger(SERVER)
_infer = logging.getLogger(INFER)


class Meter(Protocol):
    """Told what a request costs, by who stands in front of the application."""

    def accept(self, max_new_tokens: int) -> None:
        """One of its generations passed its checks, and may have as many."""

    def generate(self, num_tokens: int) -> None:
        """They came."""

    def fail(self) -> None:
        """One came to nothing, and not by fault of its request or its client."""

    def refuse(self) -> None:
        """There was no room for it."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The route that a request came by, the trace it belongs to, and who meters it."""

    route: str
    traceparent: str | None = None
    meter: Meter | None = None


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
    """One request, from before its checks until it has ended, well or not.

    It ends once: what happens behind `finished` is nobody's failure.
    """

    __slots__ = (
        "_ended",
        "_first_token_came",
        "_meter",
        "_metrics",
        "_request",
        "_route",
        "_span",
        "_started",
    )

    def __init__(self, caller: Caller, metrics: Metrics, tracer: Tracer | None) -> None:
        self._route = caller.route
        self._meter = caller.meter
        self._metrics = metrics.requests
        self._started = time.perf_counter()
        self._request: Request | None = None
        self._first_token_came = False
        self._ended = False
        self._span: Span | None = None
        if tracer is not None:
            self._span = tracer.start(caller.route, caller.traceparent)

    def __enter__(self) -> Self:
        self._metrics.count.inc()
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
        if problem is not None and not self._ended:
            self._ended = True
            self._failed(problem)
        if self._span is not None:
            self._span.end()

    def validated(self, request: Request, best_of: int = 1) -> None:
        """It passed its checks, and is about to be queued."""
        self._request = request
        self._metrics.validated(request)
        if self._meter is not None:
            self._meter.accept(request.stopping.max_new_tokens * best_of)

    def tokens_came(self, num_tokens: int) -> None:
        """Of any of its completions."""
        if self._meter is not None:
            self._meter.generate(num_tokens)
        if not self._first_token_came:
            self._first_token_came = True
            self._metrics.time_to_first_token.observe(time.perf_counter() - self._started)

    def finished(self, end: Finished, timings: Timings) -> None:
        """It ended well."""
        self._ended = True
        metrics = self._metrics
        metrics.success.inc()
        metrics.duration.observe(timings.total_s)
        metrics.validation.observe(timings.validation_s)
        metrics.queue.observe(timings.queue_s)
        metrics.inference.observe(timings.inference_s)
        metrics.mean_time_per_token.observe(timings.per_token_s)
        metrics.generated_tokens.observe(timings.num_generated_tokens)
        metrics.skipped_tokens.record(0, timings.num_generated_tokens)
        if self._span is not None or _server.isEnabledFor(logging.INFO):
            self._tell_success(end, timings)

    def _tell_success(self, end: Finished, timings: Timings) -> None:
        fields = self._asked() | _outcome(end, timings)
        _server.info("Success", extra={"span": fields | {"name": self._route}})
        if self._span is not None:
            self._span.set_attributes(fields)

    def _failed(self, problem: BaseException) -> None:
        err = _failure(problem)
        self._metrics.failure[err].inc()
        if err == "dropped":
            self._metrics.cancelled[self._phase].inc()
        elif self._meter is not None and err in _FAULTS:
            self._meter.fail()
        elif self._meter is not None and err == "overloaded":
            self._meter.refuse()
        self._tell_failure(err, problem)

    def _tell_failure(self, err: Failure, problem: BaseException) -> None:
        fields = self._asked()
        span = {"span": fields | {"name": self._route}}
        if err == "dropped":
            logger.info("The client went away while %s", self._phase, extra=span)
        else:
            _infer.error(_message(problem), extra=span)
        if self._span is not None:
            self._span.set_attributes(fields | {"error.type": err})

    @property
    def _phase(self) -> Phase:
        if self._request is None:
            return "validating"
        return "generating" if self._first_token_came else "waiting"

    def _asked(self) -> dict[str, str | int]:
        request = self._request
        if request is None:
            return {}
        return {
            "parameters": _parameters(request),
            "request_id": request.request_id,
            "prompt_tokens": len(request.prompt_ids),
        }


class Observer:
    """Makes an observation of each request, and is told of each step of the engine."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self.metrics = metrics
        self._tracer = tracer

    def request(self, caller: Caller) -> Observation:
        return Observation(caller, self.metrics, self._tracer)

    def arrived(self) -> None:
        """A request that is not a generation itself, as it may make several: TGI counts both."""
        self.metrics.requests.count.inc()

    def refused(self, caller: Caller, problem: BaseException) -> None:
        """One that arrived and failed before it made any: its chat template did, for one."""
        self.request(caller).__exit__(type(problem), problem, problem.__traceback__)

    def step(self, figures: StepFigures) -> None:
        self.metrics.steps.record(figures)

    def close(self) -> None:
        """Send the last spans. May take seconds."""
        if self._tracer is not None:
            self._tracer.close()


def observer_for(
    engine: AsyncEngine,
    limits: Limits,
    otlp_endpoint: str | None = None,
    otlp_service_name: str = SERVICE_NAME,
) -> Observer:
    """Without an endpoint nothing is traced, and nothing of tracing is imported."""
    tracer = None if otlp_endpoint is None else tracer_to(otlp_endpoint, otlp_service_name)
    return Observer(Metrics(limits, lambda: engine.status().figures, engine.cold_start), tracer)


def _failure(problem: BaseException) -> Failure:
    """A fault of ours counts as the generation's."""
    if isinstance(problem, _GONE):
        return "dropped"
    if not isinstance(problem, REQUEST_ERRORS):
        return "generation"
    return _FAILURES.get(wire_error(problem).error_type, "validation")


def _message(problem: BaseException) -> str:
    """In TGI's words, where it has any: a validation error goes without its prefix."""
    if isinstance(problem, ValidationError):
        return str(problem)
    if isinstance(problem, REQUEST_ERRORS):
        return wire_error(problem).error
    return type(problem).__name__  # what it says may quote the request


def _outcome(end: Finished, timings: Timings) -> dict[str, str | int]:
    """TGI's fields, then ours."""
    return {
        "total_time": duration(timings.total_s),
        "validation_time": duration(timings.validation_s),
        "queue_time": duration(timings.queue_s),
        "inference_time": duration(timings.inference_s),
        "time_per_token": duration(timings.per_token_s),
        "seed": "None" if end.seed is None else f"Some({end.seed})",
        "generated_tokens": timings.num_generated_tokens,
        "finish_reason": str(end.reason),
    }


def _parameters(request: Request) -> str:
    """As Rust would print them. Named one by one, since some of a request's are its own
    words; of stop sequences only the number is told.
    """
    sampling, stopping = request.sampling, request.stopping
    return (
        "GenerateParameters { "
        f"do_sample: {str(sampling.do_sample).lower()}, temperature: {sampling.temperature}, "
        f"top_k: {sampling.top_k}, top_p: {sampling.top_p}, typical_p: {sampling.typical_p}, "
        f"repetition_penalty: {sampling.repetition_penalty}, "
        f"frequency_penalty: {sampling.frequency_penalty}, "
        f"top_n_tokens: {sampling.top_n_tokens}, max_new_tokens: {stopping.max_new_tokens}, "
        f"stop: {len(stopping.stop)} }}"
    )
