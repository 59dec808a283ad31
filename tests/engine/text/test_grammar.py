"""Grammars: what is compiled, what is refused, and what is ignored with a warning."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engine.core.errors import GrammarError
from engine.text.grammar import (
    GrammarCompiler,
    TokenMasks,
    closed,
)
from tests.engine.guided import VOCAB_SIZE, compiler, tokenizer
from tests.engine.text.schemas import SCHEMAS, every


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


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


REFUSED_PATTERNS = {
    "unclosed group": ("(", "unclosed group"),
    "look-ahead": ("(?=a)b", "look-ahead"),
    "look-behind": ("(?<!a)b", "look-behind"),
    "backreference": (r"(a)\1", "backreferences"),
    "word boundary": (r"\bword\b", "lookarounds not supported"),
    "too much work": ("(a|b)*" * 5000, "limit"),
    "too long": ("a" * 300_000, "larger than 262144 bytes"),
    "not text": ("\ud800", "surrogates not allowed"),
    "deep": ("(" * 5000 + ")" * 5000, "nest"),
}
REFUSED_SCHEMAS: dict[str, tuple[Any, str]] = {
    "a regex in it": ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    "a file elsewhere": ({"$ref": "https://example.com/x.json"}, "not present in a registry"),
    "no such definition": ({"$ref": "#/$defs/missing"}, "does not exist"),
    "no type": ({"type": "nonsense"}, "Invalid type: nonsense"),
    "a number for a type": ({"type": 5}, "type must be"),
    "properties of no kind": ({"properties": 5}, "properties must be an object"),
    "an enum of nothing": ({"enum": []}, "Unsatisfiable"),
    "impossible bounds": ({"type": "integer", "minimum": 5, "maximum": 2}, "greater than"),
    "deep": (nested(2000), "nested too deeply"),
    "rather deep": (nested(180), "(?i)recursion|nested"),
    "a large enum": ({"enum": [f"value-{i}" for i in range(20_000)]}, "larger than 262144 bytes"),
    "a large number": ({"enum": [2**70]}, "64-bit"),
    "no text": ({"const": "\ud800"}, "surrogates not allowed"),
    "no names": ({1: 2}, "key must be str"),
    "true": (True, "is an object"),
    "a list": ([], "is an object"),
    "text": ("string", "is an object"),
}


class TestCompiling:
    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("case", REFUSED_PATTERNS)
    def test_a_regex_that_cannot_be_followed_is_refused_at_once(self, case: str) -> None:
        pattern, reason = REFUSED_PATTERNS[case]
        with pytest.raises(GrammarError, match=reason):
            compiler().regex(pattern)

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("case", REFUSED_SCHEMAS)
    def test_a_schema_that_cannot_be_followed_is_refused_at_once(self, case: str) -> None:
        schema, reason = REFUSED_SCHEMAS[case]
        with pytest.raises(GrammarError, match=reason):
            compiler().json_schema(schema)

    @pytest.mark.parametrize(
        ("schema", "keyword"),
        [
            ({"type": "array", "uniqueItems": True}, "uniqueItems"),
            ({"not": {"type": "string"}}, "not"),
            ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if"),
            ({"contains": {"type": "integer"}}, "contains"),
            ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
            ({"type": "string", "format": "nonsense"}, "nonsense"),
            ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ],
    )
    def test_a_keyword_that_cannot_be_enforced_is_ignored_with_a_warning(
        self, schema: dict[str, Any], keyword: str
    ) -> None:
        (warning,) = compiler().json_schema(schema).warnings
        assert keyword in warning

    def test_a_schema_that_can_be_enforced_gives_no_warning(self) -> None:
        assert [n for n, s in SCHEMAS.items() if compiler().json_schema(s).warnings] == []
        assert compiler().regex("[a-z]+").warnings == ()

    def test_a_base_and_what_extends_it_can_both_be_satisfied(self) -> None:
        extended = {"allOf": [{"$ref": "#/$defs/base"}, every(b={"type": "integer"})]}
        schema = {**every(whole=extended), "$defs": {"base": every(a={"type": "integer"})}}
        state = compiler().json_schema(schema).start()
        for token_id in tokenizer().encode('{"whole": {"a": 1, "b": 2}}'):
            state.accept(token_id)
        assert (state.is_finished, state.error) == (True, "")

    def test_the_same_source_is_compiled_once(self) -> None:
        schema = every(a={"type": "integer"})
        assert compiler().json_schema(schema) is compiler().json_schema(dict(schema))
        assert compiler().regex("a+") is compiler().regex("a+")
        assert compiler().regex("[1]") is not compiler().json_schema({"const": 1})

    def test_the_cache_forgets_what_was_used_least_recently(self) -> None:
        own = GrammarCompiler(tokenizer(), VOCAB_SIZE, [2])
        kept, dropped = own.regex("kept"), own.regex("dropped")
        for i in range(254):
            own.regex(f"x{i}")
        assert own.regex("kept") is kept
        own.regex("one more")
        assert own.regex("kept") is kept
        assert own.regex("dropped") is not dropped
        assert len(own._cache) == 256

    def test_several_threads_may_compile_at_once(self) -> None:
        """The first thread prepares the tokenizer; all threads get their own grammars."""
        own = GrammarCompiler(tokenizer(), VOCAB_SIZE, [2])
        patterns = [f"a{{{i % 7 + 1}}}b" for i in range(64)]
        own.prepare()
        with ThreadPoolExecutor(8) as threads:
            grammars = list(threads.map(own.regex, patterns))
            list(threads.map(own.json_schema, list(SCHEMAS.values()) * 2))
        for pattern, grammar in zip(patterns, grammars, strict=True):
            state = grammar.start()
            for token_id in tokenizer().encode("a" * (int(pattern[2]))):
                state.accept(token_id)
            assert state.error == ""
            assert state.forced() == tokenizer().encode("b")

    def test_states_of_one_grammar_know_nothing_of_each_other(self) -> None:
        grammar = compiler().regex("abc|xyz")
        first, second = grammar.start(), grammar.start()
        first.accept(tokenizer().encode("x")[0])
        second.accept(tokenizer().encode("a")[0])
        assert tokenizer().decode(first.forced(), False) == "yz"
        assert tokenizer().decode(second.forced(), False) == "bc"

    def test_the_mask_of_an_unguided_row_allows_every_token(self) -> None:
        state = compiler().regex("[0-9]").start()
        free, guided = TokenMasks(VOCAB_SIZE).fill([None, state])
        assert (free == -1).all()
        allowed = [i for i in range(VOCAB_SIZE) if guided[i // 32] >> (i % 32) & 1]
        assert {tokenizer().decode([i], False) for i in allowed} == set("0123456789")
