"""The grammar of a call: each tool's schema is read as if it stood alone, whatever is in it."""

import json
from functools import cache
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from engine.core.errors import GrammarError
from engine.text.grammar import Grammar
from tests.engine.driving import run
from tests.engine.guided import compiler, engine, request, seeded, text, tokenizer

Schema = dict[str, Any]

A: Schema = {"properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
B: Schema = {"properties": {"b": {"enum": [3, 4]}}, "required": ["b"]}
DRAFT_7 = "http://json-schema.org/draft-07/schema#"


def by_reference(schema: Schema, **more: Any) -> Schema:
    return {"$ref": "#/$defs/x", "$defs": {"x": schema}, **more}


def by_anchor(schema: Schema, **more: Any) -> Schema:
    return {"$ref": "#x", "$defs": {"y": {"$anchor": "x", **schema}}, **more}


OF_A: dict[str, Schema] = {
    "plain": A,
    "reference at the root": by_reference(A),
    "reference of draft 7": {
        "$schema": DRAFT_7,
        "$ref": "#/definitions/x",
        "definitions": {"x": A},
    },
    "reference to a reference": by_reference(by_reference(A)["$defs"]["x"])
    | {"$ref": "#/$defs/z", "$defs": {"x": A, "z": {"$ref": "#/$defs/x"}}},
    "id": by_reference(A, **{"$id": "https://example.org/schema"}),
    "reference to its id": {
        "$id": "https://example.org/schema",
        "$ref": "https://example.org/schema#/$defs/x",
        "$defs": {"x": A},
    },
    "anchor": by_anchor(A),
    "anchor with an id": by_anchor(A, **{"$id": "https://example.org/schema"}),
    "anyOf at the root": {"anyOf": [A, {"type": "string"}]},
    "oneOf at the root": {"oneOf": [A]},
    "allOf at the root": {"allOf": [A, {"properties": {"a": {"type": "integer"}}}]},
}
"""Schemas of objects with an `a` of 1 or 2, and nothing else that is required."""


@cache
def compiled(tools: tuple[tuple[str, str], ...]) -> Grammar:
    return compiler().call([(name, json.loads(schema)) for name, schema in tools])


def grammar_of(**tools: Schema) -> Grammar:
    """Compile tools as a chat does: with parameters that are objects."""
    objects = {name: {**schema, "type": "object"} for name, schema in tools.items()}
    return compiled(tuple((name, json.dumps(schema)) for name, schema in objects.items()))


def accepts(grammar: Grammar, call: str) -> bool:
    """Tell whether `call` is a whole text of the grammar."""
    state = grammar.start()
    for token_id in tokenizer().encode(call, add_special_tokens=False):
        state.accept(token_id)
    return not state.error and (state.is_finished or state.forced() == [])


def call(name: str, parameters: Any) -> str:
    return json.dumps({"name": name, "parameters": parameters})


@pytest.mark.parametrize("kind", OF_A)
def test_references_ids_and_anchors_are_relative_to_the_tool(kind: str) -> None:
    """The other tool has the same names for something else."""
    schema = OF_A[kind]
    other = json.loads(json.dumps(schema).replace('"a"', '"b"').replace("[1, 2]", "[3, 4]"))
    grammar = grammar_of(first=schema, second=other)
    assert accepts(grammar, call("first", {"a": 1}))
    assert accepts(grammar, call("second", {"b": 3}))
    assert not accepts(grammar, call("first", {"b": 3}))
    assert not accepts(grammar, call("second", {"a": 1}))
    assert not accepts(grammar, call("first", "text"))


@pytest.mark.parametrize("kind", OF_A)
def test_what_a_referred_schema_requires_is_required(kind: str) -> None:
    assert not accepts(grammar_of(first=OF_A[kind], second=B), call("first", {}))


RECURSIVE: Schema = {"properties": {"next": {"$ref": "#"}}}


def test_a_reference_to_the_root_is_to_the_tool_s_own() -> None:
    grammar = grammar_of(f=RECURSIVE, g=A)
    assert accepts(grammar, call("f", {"next": {"next": {}}}))
    assert not accepts(grammar, call("f", {"next": {"name": "g", "parameters": {}}}))


NAMES = ["_name", "name", "parameters", "function", "$ref", "$id", "$defs", "x-guidance", "type"]


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_may_have_any_name(name: str) -> None:
    schema = {"properties": {name: {"enum": ["x", "y"]}}, "required": [name]}
    grammar = grammar_of(f=schema)
    assert accepts(grammar, call("f", {name: "x"}))
    assert not accepts(grammar, call("f", {name: "z"}))
    assert not accepts(grammar, call("x", {name: "x"}))


@pytest.mark.parametrize("value", [{"$ref": "#/$defs/x"}, {"$id": "a"}, {"x-guidance": {}}])
def test_data_that_looks_like_a_reference_is_data(value: Any) -> None:
    assert accepts(grammar_of(f={"properties": {"v": {"const": value}}}), call("f", {"v": value}))


@pytest.mark.parametrize(
    "name", ["get_weather", 'a "quoted" one', "back\\slash", "größe", "%json {}", "call_0", "/x/"]
)
def test_a_tool_may_have_any_name(name: str) -> None:
    grammar = compiler().call([(name, {**A, "type": "object"})])
    named = json.dumps({"name": name, "parameters": {"a": 1}}, ensure_ascii=False)
    assert accepts(grammar, named)
    assert not accepts(grammar, call("other", {"a": 1}))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_model_says_is_a_call_of_a_tool(seed: int) -> None:
    objects = {f"tool {n}": {**s, "type": "object"} for n, s in enumerate(OF_A.values())}
    asked = request(compiler().call(list(objects.items())), sampling=seeded(seed))
    said = json.loads(text(run(engine(), [(0, asked)]), asked))
    Draft202012Validator(objects[said["name"]]).validate(said["parameters"])


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"$ref": "#/nowhere"}, "Pointer '/nowhere' does not exist"),
        ({"properties": {"a": {"type": "strin"}}}, "Invalid type: strin"),
        ({"anyOf": [{"type": "string"}]}, "Unsatisfiable schema"),
    ],
)
def test_an_error_names_the_tool(schema: Schema, told: str) -> None:
    with pytest.raises(GrammarError, match="the parameters of tool second: ") as refused:
        grammar_of(first=A, second=schema)
    assert told in str(refused.value)
    assert "first" not in str(refused.value)


def test_what_cannot_be_enforced_is_told() -> None:
    grammar = grammar_of(f=A, g={"properties": {"x": {"not": {"type": "null"}}}})
    assert any("not" in warning for warning in grammar.warnings)
