"""How a JSON schema is rewritten before it is compiled: closed, enforceable, finite."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.errors import GrammarError
from engine.text.json_schema import closed, enforceable, finite
from tests.engine.guided import compiler


class TestClosed:
    def test_a_schema_with_properties_is_an_object_with_only_those(self) -> None:
        schema = {"properties": {"a": {"type": "integer"}}}
        assert closed(schema) == {**schema, "type": "object", "additionalProperties": False}

    def test_additional_properties_that_are_allowed_stay_allowed(self) -> None:
        for own in ({"additionalProperties": True}, {"additionalProperties": {"type": "null"}}):
            schema = {"type": "object", "properties": {"a": {}}, **own}
            assert closed(schema) == schema

    def test_patterns_of_properties_are_further_ones(self) -> None:
        schema = {"type": "object", "properties": {"a": {}}, "patternProperties": {"^b": {}}}
        assert closed(schema) == schema

    @pytest.mark.parametrize(
        "around",
        [
            lambda s: {"type": "object", "properties": {"p": s}, "additionalProperties": False},
            lambda s: {"type": "array", "items": s},
            lambda s: {"anyOf": [s, {"type": "null"}]},
            lambda s: {"oneOf": [s]},
            lambda s: {"prefixItems": [s]},
            lambda s: {"$defs": {"d": s}},
            lambda s: {"definitions": {"d": s}},
            lambda s: {"patternProperties": {"^x": s}},
            lambda s: {"additionalProperties": s},
        ],
    )
    def test_nested_schemas_are_closed(self, around: Any) -> None:
        inner = {"properties": {"a": {"type": "integer"}}}
        assert closed(around(around(inner))) == around(around(closed(inner)))

    def test_schemas_that_are_combined_are_not_closed(self) -> None:
        schema: dict[str, Any] = {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
        assert closed(schema) == schema

    def test_definitions_that_are_combined_are_not_closed(self) -> None:
        base: dict[str, Any] = {"properties": {"a": {}}}
        other: dict[str, Any] = {"properties": {"b": {}}}
        whole = {"allOf": [{"$ref": "#/$defs/base"}, {"properties": {"c": {}}}]}
        schema = {"properties": {"whole": whole}, "$defs": {"base": base, "other": other}}
        result = closed(schema)
        assert result["properties"]["whole"] == whole
        assert result["$defs"] == {"base": base, "other": closed(other)}
        alone = {"allOf": [{"$ref": "#/$defs/base"}]}  # as pydantic wraps a reference
        assert closed({**schema, "properties": {"a": alone}})["$defs"]["base"] == closed(base)

    def test_a_property_may_have_a_keywords_name(self) -> None:
        schema = {"properties": {"properties": {"type": "string"}, "items": {"type": "string"}}}
        assert closed(schema)["properties"] == schema["properties"]

    def test_data_is_not_a_schema(self) -> None:
        schema = {"enum": [{"properties": {"a": 1}}], "const": {"properties": {}}}
        assert closed(schema) == schema

    def test_the_schema_itself_is_left_as_it_is(self) -> None:
        schema: dict[str, Any] = {"properties": {"a": {"properties": {}}}}
        closed(schema)
        assert schema == {"properties": {"a": {"properties": {}}}}


class TestEnforceable:
    def kept(self, schema: Any) -> Any:
        return enforceable(schema, lambda _: "fault", [])

    def test_data_and_names_are_no_patterns(self) -> None:
        schema = {
            "enum": [{"pattern": "x"}],
            "properties": {"pattern": {"const": {"pattern": "x"}}, "enum": {"type": "null"}},
            "$defs": {"pattern": {"default": {"pattern": "x"}}},
        }
        assert self.kept(schema) == schema
        assert self.kept({"properties": {"enum": {"pattern": "x"}}}) == {"properties": {"enum": {}}}

    def test_each_pattern_is_named_once_in_order(self) -> None:
        told: list[str] = []
        schema = {"anyOf": [{"pattern": "a"}, {"pattern": "b"}], "patternProperties": {"c": True}}
        enforceable(schema, lambda pattern: "" if pattern == "b" else "fault", told)
        assert told == ["Pattern ignored: a: fault", "Pattern ignored: c: fault"]

    def test_names_without_pattern_fall_among_the_others(self) -> None:
        names = {"patternProperties": {"a": {"type": "null"}}}
        assert self.kept(names) == {"patternProperties": {}}
        assert self.kept(names | {"additionalProperties": True})["additionalProperties"] is True
        for others in (False, {"type": "integer"}):
            kept = self.kept(names | {"additionalProperties": others})
            assert kept["additionalProperties"] == {"anyOf": [others, {"type": "null"}]}

    def test_what_is_no_schema_is_left_for_the_compiler_to_refuse(self) -> None:
        for schema in ({"pattern": 5}, {"patternProperties": 5}, {"items": "x"}, {"allOf": 5}):
            assert self.kept(schema) == schema

    def test_the_schema_itself_is_left_as_it_is(self) -> None:
        schema: Any = {"pattern": "a", "patternProperties": {"a": {"pattern": "b"}}}
        self.kept(schema)
        assert schema == {"pattern": "a", "patternProperties": {"a": {"pattern": "b"}}}


REFERENCES = [{"$ref": f"#/$defs/{name}"} for name in "abc"] + [{"$ref": "#"}]


def compound(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    both = st.lists(parts, min_size=1, max_size=2)
    return st.one_of(
        both.map(lambda s: {"anyOf": s}),
        parts.map(lambda s: {"allOf": [s]}),
        parts.map(lambda s: {"type": "object", "properties": {"x": s}, "required": ["x"]}),
        parts.map(lambda s: {"type": "object", "properties": {"x": s, "y": {"type": "null"}}}),
        parts.map(lambda s: {"type": "array", "items": s, "minItems": 1}),
        parts.map(lambda s: {"type": "array", "items": s, "minItems": 0}),
        both.map(lambda s: {"type": "array", "prefixItems": s, "minItems": 2}),
    )


schemas = st.recursive(st.sampled_from([*REFERENCES, {"type": "null"}]), compound, max_leaves=4)


def has_value(root: Any, schema: Any, depth: int) -> bool:
    """Whether a value is valid that takes at most `depth` references within each other."""
    if "$ref" in schema:
        target = root["$defs"][schema["$ref"][-1]] if schema["$ref"] != "#" else root
        return depth > 0 and has_value(root, target, depth - 1)
    if "anyOf" in schema:
        return any(has_value(root, s, depth) for s in schema["anyOf"])
    needed = schema.get("allOf", [])
    if "required" in schema:
        needed = [schema["properties"]["x"]]
    if schema.get("minItems"):
        first = schema.get("prefixItems", [])
        needed = first if len(first) == 2 or "items" not in schema else [schema["items"]]
    return all(has_value(root, s, depth) for s in needed)


class TestFinite:
    @settings(max_examples=400, deadline=None)
    @given(schemas, st.fixed_dictionaries(dict.fromkeys("abc", schemas)))
    def test_a_schema_compiles_if_and_only_if_a_value_of_it_ends(
        self, schema: Any, definitions: Any
    ) -> None:
        root = schema | {"$defs": definitions}
        if has_value(root, schema, depth=4):
            compiler().json_schema(root)
        else:
            with pytest.raises(GrammarError, match="Unsatisfiable"):
                compiler().json_schema(root)

    def test_a_schema_without_references_is_left_as_it_is(self) -> None:
        schema = {"properties": {"$ref": {"type": "null"}}, "enum": [{"$ref": "#"}], "x": 5}
        assert finite(schema) == schema

    def test_a_reference_is_found_by_its_pointer(self) -> None:
        for name, pointer in (("a/b", "a~1b"), ("a~b", "a~0b"), ("a b", "a%20b"), ("é", "é")):
            for target, kept in (({"type": "null"}, True), ({"$ref": f"#/$defs/{pointer}"}, False)):
                reference = {"$ref": f"#/$defs/{pointer}"}
                result = finite({"items": reference, "$defs": {name: target}})
                assert result["items"] == (reference if kept else False)
        listed = {"anyOf": [{"type": "null"}, {"$ref": "#/anyOf/1"}, {"$ref": "#/anyOf/0"}]}
        assert finite(listed) == {"anyOf": [{"type": "null"}, False, {"$ref": "#/anyOf/0"}]}

    def test_a_reference_to_elsewhere_is_left_for_the_compiler(self) -> None:
        for reference in ("#anchor", "https://example.com", "#/$defs/none", "#/anyOf/7", 5):
            schema = {"anyOf": [{"$ref": reference}]}
            assert finite(schema) == schema

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("last", [{"type": "null"}, {"$ref": "#/$defs/d0"}])
    def test_a_long_chain_of_references_is_followed_to_its_end(self, last: Any) -> None:
        chain: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}
        result = finite({"items": {"$ref": "#/$defs/d0"}, "$defs": chain | {"d5000": last}})
        assert result["items"] == ({"$ref": "#/$defs/d0"} if "type" in last else False)
