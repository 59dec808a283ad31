"""Errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`.

The message is TGI's text. OpenAI's clients choose their exception by the status and show the rest.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response
from typing_extensions import TypedDict

from api.http import sse
from api.http.errors import (
    REQUEST_ERRORS,
    BodyRejected,
    ErrorFormat,
    Refused,
    RequestError,
    wire_error,
)
from engine.async_engine import Overloaded
from engine.core.errors import EngineDead, TemplateError

_UNROUTED = {
    401: ("The API key is missing or wrong", "invalid_api_key"),
    404: ("There is no such route", None),
    405: ("The route does not take this method", None),
}
"""The message and code of an HTTPException, which has none of its own."""
_FIELDS = {"max_new_tokens": "max_tokens", "grammar": "response_format"}
"""OpenAI's names of TGI's fields."""


class ErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The JSON of a response, and of a stream's event, that tells of an error."""

    error: ErrorObject


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 429, 500, 503)
}
"""The answers to errors, for the OpenAPI document."""


class _Fault(NamedTuple):
    """Who is at fault, by the status; the field at fault, and OpenAI's word for the fault."""

    status: int
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    field: str | None = None
    code: str | None = None


class OpenAIErrors:
    """The format of errors of one route. `fields` are its names of TGI's fields."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = _FIELDS | dict(fields)

    def response(self, problem: Exception) -> Response:
        """Return the response to `problem`, whatever exception it is."""
        content = orjson.dumps(self._body(problem))
        return Response(content, _fault(problem).status, media_type="application/json")

    def event(self, problem: Exception) -> bytes:
        """Return the event that tells of `problem` in a stream that has begun."""
        return sse.event(self._body(problem))

    def _body(self, problem: Exception) -> ErrorBody:
        fault = _fault(problem)
        return {
            "error": {
                "message": _message(problem),
                "type": fault.type,
                "param": None
                if fault.field is None
                else self._fields.get(fault.field, fault.field),
                "code": fault.code,
            }
        }


CHAT_ERRORS = OpenAIErrors({"inputs": "messages", "top_n_tokens": "top_logprobs"})
COMPLETION_ERRORS = OpenAIErrors({"inputs": "prompt", "top_n_tokens": "logprobs"})
ERROR_FORMATS: dict[str, ErrorFormat] = {
    "/v1/chat/": CHAT_ERRORS.response,
    "/v1/": COMPLETION_ERRORS.response,
}
"""The format of errors of the paths that begin with a prefix; the first that fits counts."""


def _fault(problem: Exception) -> _Fault:
    match problem:
        case BodyRejected(status=status):
            return _Fault(400 if status == 422 else status, "invalid_request_error", problem.field)
        case HTTPException(status_code=status):
            return _Fault(
                status, "invalid_request_error", code=_UNROUTED.get(status, ("", None))[1]
            )
        case Overloaded():
            return _Fault(429, "rate_limit_error", code="rate_limit_exceeded")
        case EngineDead():
            return _Fault(503, "server_error")
        case TemplateError():
            return _Fault(400, "invalid_request_error", "inputs")
        case RequestError() if wire_error(problem).status == 422:
            return _Fault(400, "invalid_request_error", problem.field, problem.code)
        case Refused(status=status):
            return _Fault(status, "invalid_request_error", problem.field, problem.code)
    return _Fault(500, "server_error")


def _message(problem: Exception) -> str:
    match problem:
        case BodyRejected():
            return str(problem)
        case HTTPException(status_code=status):
            return _UNROUTED.get(status, (problem.detail, None))[0]
    if isinstance(problem, REQUEST_ERRORS):
        return wire_error(problem).error
    return "Internal Server Error"  # an exception's own text may quote the request
