"""All errors of requests, and what the client receives for each.

    RequestError                  JSON {"error", "error_type"}, or the same as an SSE event
    ├── ValidationError           422
    ├── ToolError                 422
    ├── Refused                   an error of a single route, with its own status and text
    ├── GenerationFailed          424
    ├── IncompleteGeneration      500
    └── IncompleteStream          (inside a stream that already answered 200)
    Overloaded, EngineDead        raised by the engine, 429 and 424
    TemplateError                 raised by the engine, 422
    BodyRejected                  plain text, for a body that could not be parsed
    ClientGone                    the client disconnected: nothing is sent

Texts and statuses are those of TGI's router.
"""

from dataclasses import dataclass

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Match
from typing_extensions import TypedDict

from api.http.disconnect import ClientGone
from engine.async_engine import Overloaded
from engine.core.errors import EngineDead, TemplateError


class ErrorResponse(TypedDict):
    error: str
    error_type: str


class RequestError(Exception):
    """A request that was parsed but cannot be served."""


class ValidationError(RequestError):
    """The request breaks a limit or a rule of TGI's API."""


class ToolError(RequestError):
    """The tools cannot be offered to the model, or its output is not a valid tool call."""


class Refused(RequestError):
    """An error that only one route answers."""

    def __init__(self, status: int, error: str, error_type: str) -> None:
        super().__init__(error)
        self.status = status
        self.error_type = error_type


class GenerationFailed(RequestError):
    """The engine failed during this generation."""


class IncompleteGeneration(RequestError):
    """The generation ended without its last event."""


class IncompleteStream(RequestError):
    """The generation of a stream ended without its last event."""


class BodyRejected(Exception):
    """The body is not JSON of the expected shape."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


REQUEST_ERRORS = (RequestError, Overloaded, EngineDead, TemplateError)


@dataclass(frozen=True, slots=True)
class WireError:
    """Status code and JSON fields of an error response."""

    status: int
    error: str
    error_type: str

    def json(self) -> ErrorResponse:
        return {"error": self.error, "error_type": self.error_type}


def wire_error(problem: Exception) -> WireError:
    """Return the response for one of `REQUEST_ERRORS`."""
    match problem:
        case ValidationError():
            return WireError(422, f"Input validation error: {problem}", "validation")
        case TemplateError():
            return WireError(422, f"Template error: {problem}", "template_error")
        case ToolError():
            return WireError(422, f"Tool error: {problem}", "tool_error")
        case Refused():
            return WireError(problem.status, str(problem), problem.error_type)
        case Overloaded():
            return WireError(429, "Model is overloaded", "overloaded")
        case GenerationFailed() | EngineDead():
            return WireError(424, f"Request failed during generation: {problem}", "generation")
        case IncompleteGeneration():
            return WireError(500, "Incomplete generation", "incomplete_generation")
        case IncompleteStream():
            return WireError(500, "Incomplete generation stream", "incomplete_generation_stream")
    raise TypeError(f"not a request's error: {problem!r}")


def install_handlers(app: FastAPI) -> None:
    for kind in REQUEST_ERRORS:
        app.add_exception_handler(kind, _answer_request_error)
    app.add_exception_handler(BodyRejected, _answer_rejection)
    app.add_exception_handler(ClientGone, _answer_nobody)
    app.add_exception_handler(HTTPException, _answer_unrouted)


async def _answer_request_error(_: Request, problem: Exception) -> Response:
    error = wire_error(problem)
    return Response(orjson.dumps(error.json()), error.status, media_type="application/json")


async def _answer_rejection(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, BodyRejected)
    return PlainTextResponse(str(problem), problem.status)


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


async def _answer_unrouted(request: Request, problem: Exception) -> Response:
    """Answer 404 or 405 without a body. The `allow` header is computed here because Starlette
    lists the methods of the first matching route only.
    """
    assert isinstance(problem, HTTPException)
    headers = {"allow": _allowed_methods(request)} if problem.status_code == 405 else None
    return Response(status_code=problem.status_code, headers=headers)


def _allowed_methods(request: Request) -> str:
    routed = (
        method
        for method in ("GET", "HEAD", "POST")
        for route in request.app.routes
        if route.matches({**request.scope, "method": method})[0] is Match.FULL
    )
    return ",".join(dict.fromkeys(routed))
