"""Parsing HTTP bodies into request models; invalid ones are rejected in plain text, as by axum."""

import json
from typing import TypeVar

import pydantic
import pydantic_core
from starlette.requests import ClientDisconnect, Request

from api.http.disconnect import ClientGone
from api.http.errors import BodyRejected
from api.http.serde import field_at_fault, first_refusal

Model = TypeVar("Model", bound=pydantic.BaseModel)


async def read_body(request: Request, model: type[Model], limit: int) -> Model:
    """Return the body as `model`. Reading stops, with an error, after `limit` bytes."""
    if not _is_json(request.headers.get("content-type", "")):
        raise BodyRejected(415, "Expected request with `Content-Type: application/json`")
    return parse_body(await _read(request, limit), model)


def parse_body(raw: bytes, model: type[Model]) -> Model:
    try:
        return model.model_validate(_parse_json(raw))
    except pydantic.ValidationError as error:
        # For an untagged enum serde names no position.
        where = "" if issubclass(model, pydantic.RootModel) else f" {_end_of(raw)}"
        raise BodyRejected(
            422,
            "Failed to deserialize the JSON body into the target type: "
            f"{first_refusal(error)}{where}",
            field_at_fault(error),
        ) from None


def _is_json(content_type: str) -> bool:
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))


async def _read(request: Request, limit: int) -> bytes:
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > limit:
                raise BodyRejected(413, "Failed to buffer the request body: length limit exceeded")
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(raw)


def _parse_json(raw: bytes) -> object:
    """Parse JSON. pydantic's parser is used because its error messages are those of serde_json."""
    try:
        return pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        if str(error).startswith("trailing characters"):
            return _first_value(raw)
        text = f"Failed to parse the request body as JSON: {error}"
        raise BodyRejected(400, text) from None


def _first_value(raw: bytes) -> object:
    """Return the first JSON value and ignore what follows it, as axum 0.7 does."""
    value: object = json.JSONDecoder().raw_decode(raw.decode(errors="replace").lstrip())[0]
    return value


def _end_of(raw: bytes) -> str:
    """Return the position at the end of the body. serde names the position of the error, which is
    not reproduced.
    """
    column = len(raw) - (raw.rfind(b"\n") + 1)
    return f"at line {raw.count(10) + 1} column {column}"
