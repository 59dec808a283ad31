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
    HTTPException                 no body, for a missing key, an unknown route or method
    ClientGone                    the client disconnected: nothing is sent

These texts and statuses are those of TGI's router. A family of routes whose clients expect another
shape has an `ErrorFormat` of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Match
from starlette.types import Scope
from typing_extensions import TypedDict

from api.http.disconnect import ClientGone
from engine.async_engine import Overloaded
from engine.core.errors import EngineDead, TemplateError

ErrorFormat = Callable[[Exception], Response]
"""Makes the response to any exception in the shape that the clients of some routes expect."""


class ErrorResponse(TypedDict):
    error: str
    error_type: str


class RequestError(Exception):
    """A request that was parsed but cannot be served.

    field  the field of the body that is at fault, by TGI's name or the route's own
    code   OpenAI's word for the kind of fault, where it has one
    """

    def __init__(self, text: str = "", *, field: str | None = None, code: str | None = None):
        super().__init__(text)
        self.field = field
        self.code = code


class ValidationError(RequestError):
    """The request breaks a limit or a rule of the API."""


class ToolError(RequestError):
    """The tools cannot be offered to the model, or its output is not a valid tool call."""


class Refused(RequestError):
    """An error that only one route answers."""

    def __init__(
        self,
        status: int,
        error: str,
        error_type: str,
        *,
        field: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(error, field=field, code=code)
        self.status = status
        self.error_type = error_type


class GenerationFailed(RequestError):
    """The engine failed during this generation."""


class IncompleteGeneration(RequestError):
    """The generation ended without its last event."""


class IncompleteStream(RequestError):
    """The generation of a stream ended without its last event."""


class BodyRejected(Exception):
    """The body is not JSON of the expected shape. `field` is the path of what is at fault."""

    def __init__(self, status: int, text: str, field: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.field = field


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


def install_handlers(app: FastAPI, formats: Mapping[str, ErrorFormat]) -> None:
    """Have exceptions answered. `formats` has the format of all paths that begin with a prefix; the
    first prefix that fits counts, and all other paths have TGI's format.
    """
    app.state.error_formats = formats
    for kind in (*REQUEST_ERRORS, BodyRejected, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientGone, _answer_nobody)


def use_format(request: Request, format: ErrorFormat) -> None:
    """Have the errors of `request` told in `format`, whatever its path is."""
    request.scope["error_format"] = format


def response_to(problem: Exception, scope: Scope) -> Response:
    """Return the response to `problem` in the format of the request's route."""
    formats: Mapping[str, ErrorFormat] = scope["app"].state.error_formats
    by_path = (form for prefix, form in formats.items() if scope["path"].startswith(prefix))
    format: ErrorFormat = scope.get("error_format") or next(by_path, tgi_response)
    return format(problem)


def tgi_response(problem: Exception) -> Response:
    """Tell `problem` as TGI does."""
    if isinstance(problem, BodyRejected):
        return PlainTextResponse(str(problem), problem.status)
    if isinstance(problem, HTTPException):
        return Response(status_code=problem.status_code)
    if isinstance(problem, REQUEST_ERRORS):
        error = wire_error(problem)
        return Response(orjson.dumps(error.json()), error.status, media_type="application/json")
    return PlainTextResponse("Internal Server Error", 500)


async def _answer(request: Request, problem: Exception) -> Response:
    """Answer `problem`. The `allow` header of a 405 is computed here because Starlette lists the
    methods of the first matching route only.
    """
    response = response_to(problem, request.scope)
    if response.status_code == 405:
        response.headers["allow"] = _allowed_methods(request)
    return response


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


def _allowed_methods(request: Request) -> str:
    routed = (
        method
        for method in ("GET", "HEAD", "POST")
        for route in request.app.routes
        if route.matches({**request.scope, "method": method})[0] is Match.FULL
    )
    return ",".join(dict.fromkeys(routed))
