"""Rust's number types and serde's error messages for pydantic models.

TGI parses bodies with Rust's serde, and its clients see serde's messages: "invalid type: string
\"a\", expected f32". Strict pydantic accepts what serde accepts; this module defines the number
types under their Rust names and translates pydantic's errors into serde's messages.
"""

import ctypes
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

F64_MAX = sys.float_info.max
F32_MAX = 3.4028234663852886e38
U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1

_REPORTED_AT_PARENT = ("missing", "literal_error")
"""Types of pydantic errors that name a field where serde names the struct around it."""


class RepeatingObject(dict[str, Any]):
    """A JSON object with its last value of each name, in which the names in `repeated` are given
    more than once.
    """

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [name for name, count in Counter(n for n, _ in pairs).items() if count > 1]


def check_repeated(value: object, fields: Iterable[str]) -> None:
    """Refuse an object that repeats one of its struct's `fields`. Other names it may repeat."""
    if isinstance(value, RepeatingObject):
        for name in value.repeated:
            if name in fields:
                text = f"duplicate field `{name}`"
                raise PydanticCustomError("serde", "{text}", {"text": text})


def is_out_of_range(value: object) -> bool:
    """Tell whether a parsed number is one that serde_json cannot parse."""
    return isinstance(value, int | float) and not -F64_MAX <= value <= F64_MAX


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
    """Round to the nearest f32, so that values compare with limits as in TGI. Values beyond the
    range become the largest f32, since an infinity would turn a masked score into NaN.
    """
    if (type(value) is not int and type(value) is not float) or is_out_of_range(value):
        raise _refusal("type", value, "f32")
    return ctypes.c_float(max(-F32_MAX, min(F32_MAX, value))).value


F32 = Annotated[float, BeforeValidator(_f32)]
I32 = Annotated[
    int, Field(ge=-(2**31), le=2**31 - 1), BeforeValidator(_integer("i32", -(2**31), 2**31 - 1))
]
U32 = Annotated[int, Field(ge=0, le=U32_MAX), BeforeValidator(_integer("u32", 0, U32_MAX))]
U64 = Annotated[int, Field(ge=0, le=U64_MAX), BeforeValidator(_integer("u64", 0, U64_MAX))]
USIZE = Annotated[int, Field(ge=0, le=U64_MAX), BeforeValidator(_integer("usize", 0, U64_MAX))]
SEED = Annotated[int, BeforeValidator(_integer("i64", -(2**63), U64_MAX))]
"""A seed of OpenAI, an i64, or one of TGI, a u64."""

T = TypeVar("T")
Vec = Annotated[list[T], Field(fail_fast=True)]
"""A list that is refused at its first bad item. The errors of a million would take seconds."""


def no_variant(name: str) -> PydanticCustomError:
    """Return serde's error for a value that fits no variant of an untagged enum. It gives no
    reason.
    """
    text = "data did not match any variant of untagged enum {name}"
    return PydanticCustomError("serde", text, {"name": name})


def untagged(name: str) -> WrapValidator:
    """Return a validator that replaces any error inside a union by `no_variant`."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise no_variant(name) from None

    return WrapValidator(validate)


def tagged(variants: Mapping[str, type[BaseModel]], default: str | None = None) -> WrapValidator:
    """Return a validator that reads a map as the variant that its `type` names, or that `default`
    names if it has none.
    """

    def validate(value: object, _: ValidatorFunctionWrapHandler) -> BaseModel:
        if not isinstance(value, dict):
            raise _refusal("type", value, "a map")
        name = value.get("type", default)
        variant = variants.get(name) if isinstance(name, str) else None
        if variant is None:
            raise PydanticCustomError("serde", "{text}", {"text": _no_tag(name, variants)})
        return variant.model_validate(value)

    return WrapValidator(validate)


def _no_tag(name: object, known: Iterable[str]) -> str:
    if name is None:
        return "missing field `type`"
    if not isinstance(name, str):
        return f"invalid type: {unexpected(name)}, expected a string"
    return f"unknown variant `{name}`, expected one of {', '.join(f'`{tag}`' for tag in known)}"


def text_or_list(item: Any) -> WrapValidator:
    """Return a validator of a string or a list of `item`, whose errors tell which item is wrong."""
    items: TypeAdapter[list[Any]] = TypeAdapter(Vec[item])

    def validate(value: object, _: ValidatorFunctionWrapHandler) -> str | list[Any]:
        if isinstance(value, list):
            return items.validate_python(value)
        if not isinstance(value, str):
            raise _refusal("type", value, "a string or a sequence")
        return value

    return WrapValidator(validate)


def json_text(value: object, allow_nan: bool = True) -> str:
    """Return compact JSON as serde_json prints it. orjson is not used: it has no integers beyond
    64 bits. Without `allow_nan`, raises ValueError for NaN and infinities.
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=allow_nan)


def unexpected(value: object) -> str:
    """Return serde's description of a value that it did not expect."""
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


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error in serde's words: the `path` of the refused value, which ends in a colon or is
    empty, and the `message`.
    """

    path: str
    message: str
    value: object


def first_refusal(error: ValidationError) -> Refusal:
    """Return the error that serde would meet first, and stop at."""
    first = _first(error)
    path = _path(first["loc"][:-1] if first["type"] in _REPORTED_AT_PARENT else first["loc"])
    return Refusal(f"{path}: " if path else "", _message(first), first["input"])


def field_at_fault(error: ValidationError) -> str | None:
    """Return the path of the field that serde would refuse first, such as `messages[0].role`."""
    return _path(_first(error)["loc"]) or None


def _first(error: ValidationError) -> ErrorDetails:
    """Return the error that serde would meet first. It misses a field only at the struct's end."""
    return min(error.errors(include_url=False), key=lambda detail: detail["type"] == "missing")


def _path(loc: tuple[int | str, ...]) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return "".join(steps).removeprefix(".")


def _message(detail: ErrorDetails) -> str:
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
