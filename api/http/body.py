"""Parsing HTTP bodies into request models; invalid ones are rejected in plain text, as by axum."""

import json
import math
import re
from collections.abc import Callable
from typing import TypeVar

import pydantic
import pydantic_core
from starlette.requests import ClientDisconnect, Request

from api.http.disconnect import ClientGone
from api.http.errors import BodyRejected
from api.http.off_loop import READING
from api.http.serde import RepeatingObject, field_at_fault, first_refusal, is_out_of_range

T = TypeVar("T")
Model = TypeVar("Model", bound=pydantic.BaseModel)

_SHORT_BYTES = 1 << 14
"""Bodies up to this length are parsed on the event loop, which takes them less than 10 ms."""
_MOST_NODES = 1 << 15
_MOST_ITEMS = 1 << 18
"""Most arrays, objects and strings of a body, and most commas between them. No other thread runs
while the body is parsed. A megabyte of text takes a millisecond, one of empty arrays a hundred.
"""
_ESCAPED = (b"\\\\", b'\\"')
_STRING_OR_NUMBER = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|(-?\d[\d.eE+-]*)', re.DOTALL)


async def read_body(request: Request, model: type[Model], limit: int) -> Model:
    """Return the body as `model`. Reading stops, with an error, after `limit` bytes."""
    if not _is_json(request.headers.get("content-type", "")):
        raise BodyRejected(415, "Expected request with `Content-Type: application/json`")
    raw = await _read(request, limit)
    return await parsed(lambda: parse_body(raw, model), raw)


async def parsed(parse: Callable[[], T], raw: bytes) -> T:
    """Return the result of `parse`, which parses `raw`: in a thread, if it is long."""
    return parse() if len(raw) <= _SHORT_BYTES else await READING.run(parse)


def parse_body(raw: bytes, model: type[Model]) -> Model:
    """Return the body as `model`. Raises BodyRejected."""
    try:
        return model.model_validate(_parse_json(raw))
    except pydantic.ValidationError as error:
        refusal = first_refusal(error)
        if is_out_of_range(refusal.value):
            raise _not_json(f"{refusal.path}number out of range {_number_position(raw)}") from None
        # For an untagged enum serde names no position.
        where = "" if issubclass(model, pydantic.RootModel) else f" {_position(raw, len(raw))}"
        raise BodyRejected(
            422,
            "Failed to deserialize the JSON body into the target type: "
            f"{refusal.path}{refusal.message}{where}",
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


def _not_json(problem: str) -> BodyRejected:
    return BodyRejected(400, f"Failed to parse the request body as JSON: {problem}")


def _parse_json(raw: bytes) -> object:
    """Parse JSON. pydantic's parser is used because its error messages are those of serde_json.

    Objects that repeat a name are `RepeatingObject`s. What follows the first value is ignored, as
    by axum 0.7.
    """
    if is_too_much(raw):
        raise _not_json("it has too many values")
    try:
        value = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        if not str(error).startswith("trailing characters"):
            raise _not_json(str(error)) from None
        value = _PLAIN.raw_decode(_text(raw))[0]
    # With a single colon there is no second name.
    return _with_repeats(raw, value) if raw.count(b":") > 1 else value


def _with_repeats(raw: bytes, value: object) -> object:
    """Return `value`, parsed again if it has objects that repeat a name, so that they show it."""
    repeating: list[RepeatingObject] = []

    def parsed(pairs: list[tuple[str, object]]) -> dict[str, object]:
        built = dict(pairs)
        if len(built) < len(pairs):
            built = RepeatingObject(pairs)
            repeating.append(built)
        return built

    again: object = json.JSONDecoder(object_pairs_hook=parsed).raw_decode(_text(raw))[0]
    return again if repeating else value


_PLAIN = json.JSONDecoder()


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace").lstrip()


def is_too_much(raw: bytes) -> bool:
    """Tell whether a body has more values than a parser can take in a few milliseconds.

    A text may have as many brackets and commas as it likes: only those outside strings count.
    """
    if len(raw) <= _SHORT_BYTES:
        return False
    if raw.count(b'"') // 2 + _num_openings(raw) <= _MOST_NODES and raw.count(b",") <= _MOST_ITEMS:
        return False
    for escaped in _ESCAPED:
        raw = raw.replace(escaped, b"")
    num_strings = raw.count(b'"') // 2
    if num_strings > _MOST_NODES:
        return True
    outside = raw.split(b'"')[::2]
    num_nodes = num_strings + sum(map(_num_openings, outside))
    return num_nodes > _MOST_NODES or sum(part.count(b",") for part in outside) > _MOST_ITEMS


def _num_openings(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")


def _number_position(raw: bytes) -> str:
    """Return the position behind the first number that no 64-bit float can hold."""
    for found in _STRING_OR_NUMBER.finditer(raw):
        if found[1] and math.isinf(float(found[1])):
            return _position(raw, found.end())
    return _position(raw, len(raw))


def _position(raw: bytes, end: int) -> str:
    """Return serde's name of the position `end`. Except for numbers, the end of the body is named
    where serde names the position of the error, which is not reproduced.
    """
    column = end - (raw.rfind(b"\n", 0, end) + 1)
    return f"at line {raw.count(10, 0, end) + 1} column {column}"
