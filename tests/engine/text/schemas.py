"""JSON schemas of every kind that guided decoding is asked for, each of which has an end: a model
that says anything that is allowed runs on for as long as it may.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "maxLength": 12}
SMALL: Schema = {"type": "integer", "minimum": 0, "maximum": 99}


def obj(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def every(**properties: Schema) -> Schema:
    """All of the properties are required."""
    return obj(*properties, **properties)


def array(items: Schema, at_least: int = 0, at_most: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": at_least, "maxItems": at_most}


def enum(*values: Any) -> Schema:
    return {"enum": list(values)}


def string(pattern: str | None = None, **bounds: Any) -> Schema:
    return {"type": "string", **({"pattern": pattern} if pattern else {}), **bounds}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_LINKED = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": every(value=SMALL, next=nullable({"$ref": "#/$defs/node"})),
    },
}
_EXPRESSION = {
    "$defs": {
        "expr": {
            "oneOf": [
                SMALL,
                every(op=enum("not", "neg"), of={"$ref": "#/$defs/expr"}),
            ]
        }
    },
    **every(expr={"$ref": "#/$defs/expr"}),
}
_SHAPES = {
    "anyOf": [
        every(kind={"const": "circle"}, radius=SMALL),
        every(kind={"const": "square"}, side=SMALL),
        every(kind={"const": "label"}, text=TEXT),
    ]
}

SCHEMAS: dict[str, Schema] = {
    # values
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "integer": {"type": "integer", "minimum": -1000, "maximum": 1000},
    "integer of one sign": {"type": "integer", "exclusiveMinimum": 0, "maximum": 7},
    "integer of three values": {"type": "integer", "minimum": 999, "maximum": 1001},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "number": {"type": "number", "minimum": -1.5, "maximum": 2.5},
    "number without bounds": {"type": "number"},
    "probability": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    "text": TEXT,
    "text of a length": string(minLength=3, maxLength=5),
    "empty text": string(maxLength=0),
    "several types": {"type": ["integer", "boolean", "null"], "minimum": 0, "maximum": 9},
    "constant": {"const": "forty-two"},
    "constant number": {"const": 3.5},
    "constant object": {"const": {"a": [1, 2, {"b": None}]}},
    "enum": enum("red", "green", "blue"),
    "enum of every type": enum(1, "one", None, True, [1], {"one": 1}),
    "enum of unicode": enum("größe", "日本語", "🙂", "\u0000", 'quo"te', "back\\slash", "a\nb"),
    "enum of prefixes": enum("a", "ab", "abc", "abcd"),
    # patterns and formats
    "pattern": string("^[A-Z]{2}[0-9]{4}$"),
    "pattern within": string("^[a-z]{0,4}x[a-z]{0,4}$"),
    "alternatives": string("^(yes|no|maybe)$"),
    "phone": string(r"^\+[0-9]{1,3} [0-9]{4,8}$"),
    "hex colour": string("^#([0-9a-f]{3}|[0-9a-f]{6})$"),
    "unicode pattern": string("^[äöü]{1,3}$"),
    "date": string(format="date"),
    "time": string(format="time"),
    "date and time": string(format="date-time"),
    "uuid": string(format="uuid"),
    "ipv4": string(format="ipv4"),
    # arrays
    "integers": array(SMALL),
    "at least two": array({"type": "boolean"}, 2, 4),
    "exactly three": array(enum("a", "b"), 3, 3),
    "no items": array(SMALL, 0, 0),
    "matrix": array(array(SMALL, 2, 2), 2, 2),
    "tuple": {
        "type": "array",
        "prefixItems": [SMALL, TEXT, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "objects": array(every(x=SMALL, y=SMALL), 1, 3),
    # objects
    "empty": every(),
    "one property": every(answer={"type": "boolean"}),
    "person": every(name=TEXT, age=SMALL, admin={"type": "boolean"}),
    "optional": obj("id", id=SMALL, name=TEXT, note=nullable(TEXT)),
    "all optional": obj(a=SMALL, b=SMALL, c=SMALL, d=SMALL),
    "type left out": {"properties": {"a": SMALL}, "required": ["a"]},
    "patterns of keys": {
        **every(a=SMALL),
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "nullable": every(value=nullable(SMALL), other={"type": ["string", "null"], "maxLength": 3}),
    "unicode keys": every(**{"größe": SMALL, "名前": TEXT, "🙂": {"type": "null"}}),
    "awkward keys": every(**{"": SMALL, 'a"b': SMALL, "c\\d": SMALL, "e f": SMALL}),
    "long keys": every(
        a_rather_long_name_that_is_forced=SMALL, another_one_that_is_forced_as_well=SMALL
    ),
    "nested": every(a=every(b=every(c=every(d=every(e=SMALL))))),
    "order": every(
        id=string(format="uuid"),
        items=array(every(sku=string("^[A-Z]{3}-[0-9]{3}$"), count=SMALL), 1, 2),
        status=enum("open", "paid", "sent"),
        paid=nullable(string(format="date")),
    ),
    "weather call": every(
        name={"const": "get_weather"},
        arguments=every(city=TEXT, unit=enum("celsius", "fahrenheit")),
    ),
    "any of two types": {"anyOf": [SMALL, {"type": "boolean"}]},
    "one of": {"oneOf": [every(a=SMALL), every(b=TEXT)]},
    "tagged": _SHAPES,
    "array of tagged": array(_SHAPES, 1, 2),
    "references": {
        **every(from_={"$ref": "#/$defs/point"}, to={"$ref": "#/$defs/point"}),
        "$defs": {"point": every(x=SMALL, y=SMALL)},
    },
    "definitions": {
        **every(size={"$ref": "#/definitions/size"}),
        "definitions": {"size": enum("S", "M", "L")},
    },
    "linked list": _LINKED,
    "expression": _EXPRESSION,
    "two bases": {
        "allOf": [
            {**obj("a", a=SMALL, b=TEXT), "additionalProperties": False},
            obj("b", a={"type": "integer", "minimum": 50}, b=string("^[a-z]*$")),
        ]
    },
}
