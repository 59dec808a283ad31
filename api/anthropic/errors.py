"""Errors in Anthropic's shape: `{"type": "error", "error": {"type", "message"}, "request_id"}`.

Anthropic's clients choose their exception by the status. The message begins with the field that is
at fault, if there is one.
"""

import uuid
from typing import Any, Literal, NamedTuple, NotRequired

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response
from typing_extensions import TypedDict

from api.http import sse
from api.http.errors import REQUEST_ERRORS, BodyRejected, ErrorFormat, RequestError, wire_error
from engine.async_engine import Overloaded
from engine.core.errors import TemplateError

_FIELDS = {
    "inputs": "messages",
    "max_new_tokens": "max_tokens",
    "stop": "stop_sequences",
    "grammar": "output_config.format",
}
"""Anthropic's names of TGI's fields."""

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "request_too_large",
    "api_error",
    "overloaded_error",
]


_CODES = frozenset({"thread_unsupported_request"})
"""The codes of faults that Anthropic has too. The others are OpenAI's."""


class MessagesErrorDetails(TypedDict):
    error_code: str


class MessagesErrorObject(TypedDict):
    type: ErrorType
    message: str
    details: NotRequired[MessagesErrorDetails]


class MessagesError(TypedDict):
    type: Literal["error"]
    error: MessagesErrorObject
    request_id: str


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": MessagesError} for status in (400, 401, 500, 529)
}
"""The answers to errors, for the OpenAPI document."""


class _Fault(NamedTuple):
    status: int
    type: ErrorType
    message: str
    code: str | None = None


def error_response(problem: Exception) -> Response:
    """Return the response to `problem`, whatever exception it is."""
    fault = _fault(problem)
    body = _body(fault)
    headers = {"request-id": body["request_id"]}
    return Response(orjson.dumps(body), fault.status, headers, "application/json")


def error_event(problem: Exception) -> bytes:
    """Return the event that tells of `problem` in a stream that has begun."""
    return sse.typed_event(_body(_fault(problem)))


ERROR_FORMATS: dict[str, ErrorFormat] = {"/v1/messages": error_response}


def _body(fault: _Fault) -> MessagesError:
    error: MessagesErrorObject = {"type": fault.type, "message": fault.message}
    if fault.code in _CODES:
        error["details"] = {"error_code": fault.code}
    return {"type": "error", "error": error, "request_id": f"req_{uuid.uuid4().hex}"}


def _fault(problem: Exception) -> _Fault:
    match problem:
        case BodyRejected(status=413):
            return _Fault(413, "request_too_large", str(problem))
        case BodyRejected(status=status):
            return _Fault(400 if status == 422 else status, "invalid_request_error", str(problem))
        case HTTPException(status_code=status):
            return _unrouted(status)
        case Overloaded():
            return _Fault(529, "overloaded_error", wire_error(problem).error)
        case TemplateError():
            return _Fault(400, "invalid_request_error", f"messages: {wire_error(problem).error}")
        case RequestError() if wire_error(problem).status == 422:
            return _Fault(400, "invalid_request_error", _with_field(problem), problem.code)
    known = isinstance(problem, REQUEST_ERRORS)
    # The text of an unexpected exception may quote the request.
    return _Fault(500, "api_error", wire_error(problem).error if known else "Internal server error")


def _unrouted(status: int) -> _Fault:
    match status:
        case 401:
            return _Fault(401, "authentication_error", "The API key is missing or wrong")
        case 404:
            return _Fault(404, "not_found_error", "There is no such route")
        case 405:
            return _Fault(405, "invalid_request_error", "The route does not take this method")
    return _Fault(status, "api_error" if status >= 500 else "invalid_request_error", "HTTP error")


def _with_field(problem: RequestError) -> str:
    text = wire_error(problem).error
    if problem.field is None:
        return text
    return f"{_FIELDS.get(problem.field, problem.field)}: {text}"
