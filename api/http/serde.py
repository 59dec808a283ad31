"""Serde's types and sentences on pydantic's models.

TGI parses bodies with Rust's serde, and its clients see serde's sentences: "invalid
type: string \"a\", expected f32". Strict pydantic accepts what serde accepts; this
room names the number types as Rust does and words the refusals as serde would.
"""

import ctypes
import json
from collections.abc import Callable
from typing import Annotated, Any

import orjson
from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

F32_MAX = 3.4028234663852886e38
U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1

_TOLD_OF_PARENT = ("missing", "literal_error")
"""pydantic's errors of a field that serde reports at the struct around it."""


def _refusal(what: str, value: object, expected: str) -> PydanticCustomError:
    text = f"invalid {what}: {unexpected(value)}, expected {expected}"
    return PydanticCustomError("serde", "{text}", {"text": text})


def _integer(name: str, low: int, high: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if type(value) is not int:
            raise _refusal("type", value, name)
        if not low <= value <= high:
            raise _refusal("value", value, name)
        return value

    return check


def _f32(value: object) -> float:
    """To the nearest f32, so that limits are compared as TGI does.

    What would become infinite stays the largest: an infinity makes NaN of a masked score.
    """
    if type(value) is not int and type(value) is not float:
        raise _refusal("type", value, "f32")
    return ctypes.c_float(max(-F32_MAX, min(F32_MAX, value))).value


F32 = Annotated[float, BeforeValidator(_f32)]
I32 = Annotated[
    int, Field(ge=-(2**31), le=2**31 - 1), BeforeValidator(_integer("i32", -(2**31), 2**31 - 1))
]
U32 = Annotated[int, Field(ge=0, le=U32_MAX), BeforeValidator(_integer("u32", 0, U32_MAX))]
U64 = Annotated[int, Field(ge=0, le=U64_MAX), BeforeValidator(_integer("u64", 0, U64_MAX))]
USIZE = Annotated[int, Field(ge=0, le=U64_MAX), BeforeValidator(_integer("usize", 0, U64_MAX))]


def no_variant(name: str) -> PydanticCustomError:
    """What serde says of a value that is none of an untagged enum's; not why."""
    text = "data did not match any variant of untagged enum {name}"
    return PydanticCustomError("serde", text, {"name": name})


def untagged(name: str) -> WrapValidator:
    """Any fault within a union is told as `no_variant`."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise no_variant(name) from None

    return WrapValidator(validate)


def json_text(value: object, allow_nan: bool = True) -> str:
    """As serde_json prints it, compact; orjson has no integers beyond 64 bits.

    Without `allow_nan`, raises ValueError for a float that JSON cannot say.
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=allow_nan)


def unexpected(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return f"boolean `{str(value).lower()}`"
        case int():
            return f"integer `{value}`"
        case float():
            return f"floating point `{value}`"
        case str():
            return f"string {orjson.dumps(value).decode()}"
        case list():
            return "sequence"
    return "map"


def first_refusal(error: ValidationError) -> str:
    """`{path: }{sentence}` of the error serde would meet first.

    Serde stops at its first error, and misses a field only at its struct's end.
    """
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda detail: detail["type"] == "missing")
    path = _path(first["loc"][:-1] if first["type"] in _TOLD_OF_PARENT else first["loc"])
    return f"{path}: {_sentence(first)}" if path else _sentence(first)


def _path(loc: tuple[int | str, ...]) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return "".join(steps).removeprefix(".")


def _sentence(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return f"missing field `{detail['loc'][-1]}`"
        case "literal_error":
            variants = context["expected"].replace(" or ", ", ").replace("'", "`")
            return f"unknown variant `{detail['input']}`, expected one of {variants}"
        case "string_type":
            expected = "a string"
        case "bool_type":
            expected = "a boolean"
        case "list_type":
            expected = "a sequence"
        case "dict_type":
            expected = "a map"
        case "model_type":
            expected = f"struct {context['class_name']}"
        case _:
            return detail["msg"]
    return f"invalid type: {unexpected(detail['input'])}, expected {expected}"
