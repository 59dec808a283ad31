"""TGI's `x-` headers, which tell what a request cost, and the headers that a request brings."""

from typing import Protocol

from starlette.requests import Request as HttpRequest

from api.generation.inference import Answer
from api.generation.request import GenerateRequest
from api.generation.state import AppState
from api.telemetry.observation import Caller, Timings
from engine.core.request import Request

_SUMMED = (
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
    "x-prompt-tokens",
    "x-generated-tokens",
)


class Answered(Protocol):
    """What is told of an answer: the engine's request, and how long it took."""

    @property
    def request(self) -> Request: ...

    @property
    def timings(self) -> Timings: ...


def caller_of(http: HttpRequest, route: str) -> Caller:
    return Caller(route, http.headers.get("traceparent"), http.scope.get("meter"))


def stream_headers(state: AppState, *bodies: GenerateRequest) -> dict[str, str]:
    return _compute_headers(state, bodies) | {"x-accel-buffering": "no"}


def answer_headers(state: AppState, body: GenerateRequest, answer: Answered) -> dict[str, str]:
    timings = answer.timings
    return _compute_headers(state, (body,)) | {
        "x-compute-time": f"{timings.total_s:.9f}",
        "x-total-time": _ms(timings.total_s),
        "x-validation-time": _ms(timings.validation_s),
        "x-queue-time": _ms(timings.queue_s),
        "x-inference-time": _ms(timings.inference_s),
        "x-time-per-token": _ms(timings.per_token_s),
        "x-prompt-tokens": str(len(answer.request.prompt_ids)),
        "x-generated-tokens": str(timings.num_generated_tokens),
        **_grammar_warnings(answer),
    }


def summed_headers(
    state: AppState, bodies: list[GenerateRequest], answers: list[Answer]
) -> dict[str, str]:
    """Return the headers of a request with several generations: TGI's sums, without the
    `x-compute-time`.
    """
    each = [answer_headers(state, body, a) for body, a in zip(bodies, answers, strict=True)]
    sums = {name: str(sum(int(headers[name]) for headers in each)) for name in _SUMMED}
    return _compute_headers(state, tuple(bodies)) | sums


def _grammar_warnings(answer: Answered) -> dict[str, str]:
    """Return the header, which TGI does not have, of what in the grammar could not be enforced."""
    grammar = answer.request.grammar
    if grammar is None or not grammar.warnings:
        return {}
    text = "; ".join(grammar.warnings)
    return {"x-grammar-warnings": text.encode("ascii", "backslashreplace").decode()[:1000]}


def _compute_headers(state: AppState, bodies: tuple[GenerateRequest, ...]) -> dict[str, str]:
    return {
        "x-compute-type": state.compute_type,
        "x-compute-characters": str(sum(len(body.inputs) for body in bodies)),
    }


def _ms(seconds: float) -> str:
    return str(int(seconds * 1000))
