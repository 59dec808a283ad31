"""Grammars: what is compiled, what is refused, and what is ignored with a warning."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engine.core.errors import GrammarError
from engine.text.grammar import Grammar, GrammarCompiler, TokenMasks
from tests.engine.guided import VOCAB_SIZE, compiler, tokenizer
from tests.engine.text.schemas import SCHEMAS, every, obj, string


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
    "no text": (r"[^\s\S]", "cannot be followed"),
    "letters counted twice": (r"(\p{L}{1,500}){1,20}", "cannot be followed: .*too many"),
    "letters counted thrice": ("((a{1,1000}){1,1000}){1,1000}", "cannot be followed: .*too many"),
    "words counted twice": (r"(\w{1,100}){1,10}", "cannot be followed: .*too many"),
    "deep": ("(" * 5000 + ")" * 5000, "nest"),
}
REFUSED_SCHEMAS: dict[str, tuple[Any, str]] = {
    "a pattern that nothing matches": ({"type": "string", "pattern": r"[^\s\S]"}, "Unsatisfiable"),
    "definitions of each other": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "no value of it ends",
    ),
    "itself": ({"$ref": "#"}, "no value of it ends"),
    "an object without end": (every(a={"$ref": "#"}), "Unsatisfiable"),
    "an array without end": ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "Unsat"),
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


def follows(grammar: Grammar, text: str) -> bool:
    """Whether the grammar allows each token of the text."""
    state = grammar.start()
    for token_id in tokenizer().encode(text):
        state.accept(token_id)
    return state.error == ""


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
            ({"type": "string", "pattern": "(?=a)b"}, "(?=a)b: look-around"),
            ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
            ({"type": "string", "pattern": r"\bword\b"}, "lookarounds not supported"),
            ({"type": "string", "pattern": r"^(\p{L}{1,500}){1,20}$"}, "cannot be followed"),
            ({"type": "object", "patternProperties": {"^(?!a)": {}}}, "^(?!a): look-around"),
        ],
    )
    def test_a_keyword_that_cannot_be_enforced_is_ignored_with_a_warning(
        self, schema: dict[str, Any], keyword: str
    ) -> None:
        (warning,) = compiler().json_schema(schema).warnings
        assert keyword in warning

    def test_a_decimal_of_pydantic_is_a_number_or_any_text(self) -> None:
        decimal = r"^(?![.+-]*$)[+-]?[0-9]*\.?[0-9]*$"
        grammar = compiler().json_schema(
            every(
                price={"anyOf": [{"type": "number"}, string(decimal)]},
                code=string("^[a-z]{3}$"),
            )
        )
        (warning,) = grammar.warnings
        assert "look-around" in warning
        assert follows(grammar, '{"price": 1.5, "code": "abc"}')
        assert follows(grammar, '{"price": "1.50", "code": "abc"}')
        assert not follows(grammar, '{"price": "1.50", "code": "ABC"}')
        assert not follows(grammar, '{"price": true, "code": "abc"}')

    @pytest.mark.parametrize(
        "around",
        [
            lambda s: every(a=s),
            lambda s: {"type": "array", "items": s},
            lambda s: {"type": "array", "prefixItems": [s]},
            lambda s: {"anyOf": [{"type": "null"}, s]},
            lambda s: {"allOf": [s, {"maxLength": 99}]},
            lambda s: {"type": "object", "additionalProperties": s},
            lambda s: {"type": "object", "patternProperties": {"^x": s}},
            lambda s: {"$ref": "#/$defs/pattern", "$defs": {"pattern": s}},
            lambda s: {"$ref": "#/parts/pattern", "parts": {"pattern": s}},
        ],
    )
    def test_a_pattern_is_ignored_wherever_it_is(self, around: Any) -> None:
        text = {"type": "string", "pattern": "^(?=a)"}
        (warning,) = compiler().json_schema(around(text)).warnings
        assert "^(?=a)" in warning

    def test_names_whose_pattern_is_ignored_may_be_any(self) -> None:
        schema = {
            **every(a={"type": "null"}),
            "patternProperties": {"^b": {"type": "boolean"}, "^(?!b)": {"type": "integer"}},
        }
        for others in ({}, {"additionalProperties": False}):
            grammar = compiler().json_schema(schema | others)
            assert follows(grammar, '{"a": null, "c": 1}')
            assert follows(grammar, '{"a": null, "b": true, "c": 1}')
            assert not follows(grammar, '{"a": null, "b": 1}')
            assert not follows(grammar, '{"a": 1}')
            assert follows(grammar, '{"a": null, "c": "x"}') == (not others)

    def test_a_warning_is_one_line(self) -> None:
        for schema in ({"pattern": "(?!\r\nx: y\x7f)" + "z" * 5000}, {"format": "no\r\nx: y"}):
            (warning,) = compiler().json_schema({"type": "string", **schema}).warnings
            assert warning.isprintable()
            assert len(warning) < 300

    def test_only_so_many_patterns_of_a_schema_are_tried(self) -> None:
        """Each may take long, and the schema's author chooses how many there are."""
        schema = every(**{f"p{i}": string(rf"^(\p{{L}}{{1,{500 + i}}}){{20}}$") for i in range(99)})
        assert len(compiler().json_schema(schema).warnings) == 32

    def test_a_part_of_a_schema_without_end_is_never_begun(self) -> None:
        endless = every(a={"$ref": "#/$defs/e"})
        schema = {**obj(x={"$ref": "#/$defs/e"}, y={"type": "null"}), "$defs": {"e": endless}}
        grammar = compiler().json_schema(schema)
        assert follows(grammar, "{}")
        assert follows(grammar, '{"y": null}')
        assert not follows(grammar, '{"x')

    def test_a_grammar_whose_limits_are_reached_is_compiled_anew(self) -> None:
        """Its sequences share a lexer, which takes no more text once it has reached its limits."""
        own = GrammarCompiler(tokenizer(), VOCAB_SIZE, [2])
        spent = own.regex("(a{1,500}){1,20}")
        state, masks = spent.start(), TokenMasks(VOCAB_SIZE)
        while not state.error:
            state.accept(tokenizer().encode("a")[0])
            masks.fill([state])
        assert "too many" in state.error
        again = own.regex("(a{1,500}){1,20}")
        assert again is not spent
        state = again.start()
        masks.fill([state])
        assert state.error == ""
        assert own.regex("(a{1,500}){1,20}") is again

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
