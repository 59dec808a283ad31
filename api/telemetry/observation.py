"""Observation of requests: metrics, one log line per request, and traces.

An `Observation` follows one request from its arrival through validation to its end. If a collector
is configured, the request is traced too. No prompt or generated text is passed to this module, so
none can be logged.
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
"""TGI's metric label for each `error_type` on the wire. All others count as "validation"."""
_FAULTS: frozenset[Failure] = frozenset({"generation", "incomplete"})
_DISCONNECTS = (GeneratorExit, asyncio.CancelledError, ClientGone)

logger = logging.getLogger(__name__)
_server = logging.getLogger(SERVER)
_infer = logging.getLogger(INFER)


class Meter(Protocol):
    """Receives what a request costs. Middleware in front of the application passes one along with
    a request to account for its load.
    """

    def count_accepted(self, max_new_tokens: int) -> None:
        """Add a generation that passed validation and may have this many tokens."""

    def count_generated(self, num_tokens: int) -> None:
        """Count tokens that were just generated."""

    def mark_failed(self) -> None:
        """Record that a generation failed, by no fault of the request or its client."""

    def mark_refused(self) -> None:
        """Record that the request was refused because every permit was taken."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Where a request comes from: its route, the trace it belongs to, and its meter."""

    route: str
    traceparent: str | None = None
    meter: Meter | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """How long the phases of a request took, in seconds. `queue_s` and `inference_s` are those of
    its best completion.
    """

    total_s: float
    validation_s: float
    queue_s: float
    inference_s: float
    num_generated_tokens: int

    @property
    def per_token_s(self) -> float:
        return self.inference_s / self.num_generated_tokens


class Observation:
    """One request, from its arrival until it succeeds or fails.

    A request ends once: an exception after `finished` does not count as a failure.
    """

    __slots__ = (
        "_ended",
        "_has_first_token",
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
        self._has_first_token = False
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
        """End the observation. `problem` is the request's error, or GeneratorExit or
        CancelledError if the client went away.
        """
        if problem is not None and not self._ended:
            self._ended = True
            self._failed(problem)
        if self._span is not None:
            self._span.end()

    def validated(self, request: Request, best_of: int = 1) -> None:
        """Record that the request passed validation and is about to be queued."""
        self._request = request
        self._metrics.validated(request)
        if self._meter is not None:
            self._meter.count_accepted(request.stopping.max_new_tokens * best_of)

    def tokens_generated(self, num_tokens: int) -> None:
        """Record tokens that one of the request's completions just received."""
        if self._meter is not None:
            self._meter.count_generated(num_tokens)
        if not self._has_first_token:
            self._has_first_token = True
            self._metrics.time_to_first_token.observe(time.perf_counter() - self._started)

    def finished(self, end: Finished, timings: Timings) -> None:
        """Record that the request succeeded."""
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
            self._log_success(end, timings)

    def _log_success(self, end: Finished, timings: Timings) -> None:
        fields = self._request_fields() | _success_fields(end, timings)
        _server.info("Success", extra={"span": fields | {"name": self._route}})
        if self._span is not None:
            self._span.set_attributes(fields)

    def _failed(self, problem: BaseException) -> None:
        err = _failure(problem)
        self._metrics.failure[err].inc()
        if err == "dropped":
            self._metrics.cancelled[self._phase].inc()
        elif self._meter is not None and err in _FAULTS:
            self._meter.mark_failed()
        elif self._meter is not None and err == "overloaded":
            self._meter.mark_refused()
        self._log_failure(err, problem)

    def _log_failure(self, err: Failure, problem: BaseException) -> None:
        fields = self._request_fields()
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
        return "generating" if self._has_first_token else "waiting"

    def _request_fields(self) -> dict[str, str | int]:
        request = self._request
        if request is None:
            return {}
        return {
            "parameters": _parameters(request),
            "request_id": request.request_id,
            "prompt_tokens": len(request.prompt_ids),
        }


class Observer:
    """Makes an `Observation` for each request, and records the engine's steps."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self.metrics = metrics
        self._tracer = tracer

    def request(self, caller: Caller) -> Observation:
        return Observation(caller, self.metrics, self._tracer)

    def arrived(self) -> None:
        """Count a request that is not itself a generation, but may start several. TGI counts both
        it and them.
        """
        self.metrics.requests.count.inc()

    def refused(self, caller: Caller, problem: BaseException) -> None:
        """Record a request that failed before it started a generation, for example in its chat
        template.
        """
        self.request(caller).__exit__(type(problem), problem, problem.__traceback__)

    def step(self, figures: StepFigures) -> None:
        self.metrics.steps.record(figures)

    def close(self) -> None:
        """Send the remaining spans. May take seconds."""
        if self._tracer is not None:
            self._tracer.close()


def observer_for(
    engine: AsyncEngine,
    limits: Limits,
    otlp_endpoint: str | None = None,
    otlp_service_name: str = SERVICE_NAME,
) -> Observer:
    """Return an observer for `engine`. Without an endpoint nothing is traced, and OpenTelemetry is
    not imported.
    """
    tracer = None if otlp_endpoint is None else tracer_to(otlp_endpoint, otlp_service_name)
    return Observer(Metrics(limits, lambda: engine.status().figures, engine.cold_start), tracer)


def _failure(problem: BaseException) -> Failure:
    """Return TGI's label for a failure. An unexpected exception counts as "generation"."""
    if isinstance(problem, _DISCONNECTS):
        return "dropped"
    if not isinstance(problem, REQUEST_ERRORS):
        return "generation"
    return _FAILURES.get(wire_error(problem).error_type, "validation")


def _message(problem: BaseException) -> str:
    """Return the log message of a failure, in TGI's words where TGI has any. TGI logs validation
    errors without the prefix that is on the wire.
    """
    if isinstance(problem, ValidationError):
        return str(problem)
    if isinstance(problem, REQUEST_ERRORS):
        return wire_error(problem).error
    return type(problem).__name__  # the message may quote the request


def _success_fields(end: Finished, timings: Timings) -> dict[str, str | int]:
    """Return the log fields of a success: TGI's, then Skiff's own."""
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
    """Return the parameters as Rust would print them. They are listed one by one because some
    parameters contain the client's text; of the stop sequences only the number is logged.
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
