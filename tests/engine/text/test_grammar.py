"""Guided decoding: answers match the grammar, from a model that generates anything.

Its weights are random and its scores nearly equal: whatever a mask lets through is drawn.
"""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from transformers import AutoTokenizer, LlamaConfig

from engine.core.config import DEFAULT_MODEL_ID
from engine.core.errors import GrammarError
from engine.core.request import (
    Failed,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    StoppingParams,
)
from engine.engine import Engine
from engine.loading.checkpoint import Checkpoint, locate
from engine.loading.loader import LoadedModel, prepare_model
from engine.text.grammar import (
    Grammar,
    GrammarCompiler,
    GrammarState,
    TokenMasks,
    closed,
)
from engine.text.tokenizer import Tokenizer
from tests.engine.driving import Answers, make_engine, run
from tests.engine.models import build
from tests.engine.test_failures import sabotage
from tests.engine.text.schemas import SCHEMAS, every

VOCAB_SIZE = 49152
SAMPLED = SamplingParams(do_sample=True, seed=1, logprobs=True)
GREEDY = SamplingParams(logprobs=True)
_numbers = count()


@cache
def tokenizer() -> Tokenizer:
    path = locate(DEFAULT_MODEL_ID).path
    return Tokenizer(AutoTokenizer.from_pretrained(path, truncation_side="left"))


@cache
def loaded() -> LoadedModel:
    """An untrained model with the embedded model's vocabulary."""
    model = build(
        LlamaConfig,
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    return prepare_model(model, tokenizer(), Checkpoint(Path("/nowhere"), "tiny-guided"))


@cache
def compiler() -> GrammarCompiler:
    return make_engine(loaded()).grammars


def engine(**config: object) -> Engine:
    return make_engine(loaded(), **({"num_blocks": 512} | config))


def request(
    grammar: Grammar | None,
    sampling: SamplingParams = SAMPLED,
    prompt: str = "Say something:",
    max_new_tokens: int = 1000,
    **stopping: Any,
) -> Request:
    return Request(
        f"request-{next(_numbers)}",
        tokenizer().encode(prompt),
        sampling,
        StoppingParams(max_new_tokens, **stopping),
        grammar=grammar,
    )


def json_request(schema: dict[str, Any], **options: Any) -> Request:
    return request(compiler().json_schema(schema), **options)


def regex_request(pattern: str, **options: Any) -> Request:
    return request(compiler().regex(pattern), **options)


def text(answers: Answers, request: Request) -> str:
    finished = answers.last(request)
    assert isinstance(finished, Finished), finished
    return finished.generated_text


def say(request: Request, **config: object) -> str:
    return text(run(engine(**config), [(0, request)]), request)


def seeded(seed: int) -> SamplingParams:
    return replace(SAMPLED, seed=seed)


# -- compiling --------------------------------------------------------------------------


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


HOSTILE = "((a{1,1000}){1,1000}){1,1000}"
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


# -- generating -------------------------------------------------------------------------

FREE = SamplingParams(do_sample=True, seed=99)


def check_valid(schema: dict[str, Any], said: str) -> None:
    Draft202012Validator(schema).validate(json.loads(said))


def generate_all(names: list[str], seed: int) -> dict[str, str]:
    """Eight at a time, with unguided requests among them."""
    requests = {n: json_request(SCHEMAS[n], sampling=seeded(seed)) for n in names}
    arrivals = [(3 * i, r) for i, r in enumerate(requests.values())]
    free = [request(None, FREE, max_new_tokens=30, ignore_eos=True) for _ in range(8)]
    answers = run(engine(), [*arrivals, *((20 * i, r) for i, r in enumerate(free))])
    answers.check_endings([*requests.values(), *free])
    said = {}
    for name, guided in requests.items():
        finished = answers.last(guided)
        assert isinstance(finished, Finished), (name, finished)
        assert finished.reason is FinishReason.EOS_TOKEN, (name, finished.generated_text)
        said[name] = finished.generated_text
    return said


def test_there_are_sixty_schemas() -> None:
    assert len(SCHEMAS) >= 60


@pytest.mark.slow
def test_greedy_answers_are_valid() -> None:
    for name, said in generate_all(list(SCHEMAS)[::4], seed=0).items():
        check_valid(SCHEMAS[name], said)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_sampled_answers_are_valid_for_any_seed(seed: int) -> None:
    for name, said in generate_all(list(SCHEMAS), seed).items():
        check_valid(SCHEMAS[name], said)


FORMATS = {
    "date": r"\d{4}-\d{2}-\d{2}",
    "time": r"\d{2}:\d{2}:\d{2}(\.\d+)?([zZ]|[+-]\d{2}:\d{2})",
    "date and time": r"\d{4}-\d{2}-\d{2}[tT]\d{2}:\d{2}:\d{2}(\.\d+)?([zZ]|[+-]\d{2}:\d{2})",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"(\d{1,3}\.){3}\d{1,3}",
}


@pytest.mark.slow
def test_strings_with_a_format_have_that_format() -> None:
    for name, said in generate_all(list(FORMATS), seed=7).items():
        assert re.fullmatch(FORMATS[name], json.loads(said)), (name, said)


PATTERNS = [
    "[0-9]{3}-[0-9]{4}",
    "(yes|no)",
    "a{3}b?c{0,4}",
    "[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8}){0,2}",
    r"\d{1,3}(\.\d{1,3}){3}",
    "(foo|foobar|foobarbaz)!",
    "größe: [0-9]{1,4} (mm|cm|km)",
    "[ぁ-ん]{1,6}",
    r"\$[0-9]{1,6}\.[0-9]{2}",
    "🙂{1,3}",
    "line one\nline [0-9]",
    "The answer is: (forty-two|fifty-four)\\.",
]


def test_answers_match_the_regex_as_a_whole() -> None:
    requests = {(p, s): regex_request(p, sampling=seeded(s)) for p in PATTERNS for s in range(3)}
    answers = run(engine(), [(i, r) for i, r in enumerate(requests.values())])
    for (pattern, _), guided in requests.items():
        said = text(answers, guided)
        assert re.fullmatch(pattern, said), (pattern, said)


def test_an_answer_may_be_empty_if_the_grammar_allows_it() -> None:
    guided = regex_request("")
    answers = run(engine(), [(0, guided)])
    assert text(answers, guided) == ""
    assert answers.ids(guided) == [2]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_eos_ends_the_sequence_where_the_grammar_may_end_and_adds_no_text(ignore_eos: bool) -> None:
    """This holds if the client asks to ignore EOS, too: no other token could follow."""
    guided = [
        regex_request("[0-9]{2,4}", sampling=seeded(i), ignore_eos=ignore_eos) for i in range(8)
    ]
    answers = run(engine(), [(0, r) for r in guided])
    for r in guided:
        *ids, last = answers.ids(r)
        assert last == 2
        assert 2 not in ids
        finished = answers.last(r)
        assert isinstance(finished, Finished)
        assert finished.reason is FinishReason.EOS_TOKEN
        assert 2 <= len(finished.generated_text) <= 4
        assert finished.generated_text.isdigit()


ORDER, LONG_KEYS = SCHEMAS["order"], SCHEMAS["long keys"]
FORCING = every(
    a_constant_with_a_long_name={"const": "whose value is a long sentence, said at once"},
    number={"type": "integer", "minimum": 0, "maximum": 99},
    another_constant={"const": "and so is this one, in the middle of an answer"},
)


@cache
def guided_requests(sampling: SamplingParams = GREEDY) -> list[Request]:
    schemas = [FORCING, ORDER, LONG_KEYS, SCHEMAS["person"], SCHEMAS["enum of unicode"]]
    return [json_request(s, sampling=replace(sampling, seed=i)) for i, s in enumerate(schemas)]


@cache
def free_request(sampling: SamplingParams) -> Request:
    return request(None, sampling, max_new_tokens=40, ignore_eos=True)


KINDS = [GREEDY, SAMPLED, replace(SAMPLED, repetition_penalty=1.5, presence_penalty=0.7)]
slow = pytest.mark.slow
kinds = pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(KINDS[0], id="greedy"),
        pytest.param(KINDS[1], id="sampled", marks=slow),
        pytest.param(KINDS[2], id="penalties", marks=slow),
    ],
)
_alone: dict[str, Answers] = {}


def check_same(answers: Answers, requests: list[Request]) -> None:
    """Check that each request gets the same answer as alone."""
    answers.check_endings(requests)
    for r in requests:
        if r.request_id not in _alone:
            _alone[r.request_id] = run(engine(), [(0, r)])
        expected = _alone[r.request_id]
        assert answers.ids(r) == expected.ids(r)
        assert answers.logprobs(r) == pytest.approx(expected.logprobs(r), abs=1e-4)
        assert text(answers, r) == text(expected, r)


@kinds
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="company"),
        pytest.param({"max_batch_tokens": 9}, id="chunks"),
        pytest.param({"num_blocks": 9, "max_total_tokens": 144}, id="preemption"),
    ],
)
@pytest.mark.slow
def test_answers_are_the_same_alone_and_in_a_batch(
    sampling: SamplingParams, config: dict[str, object]
) -> None:
    requests = [*guided_requests(sampling), free_request(sampling)]
    serving = engine(**config)
    check_same(run(serving, [(2 * i, r) for i, r in enumerate(requests)]), requests)
    if "num_blocks" in config:
        assert serving.figures().num_preemptions > 0


def test_answers_are_the_same_after_steps_that_sample_nothing() -> None:
    """The prompt is alone and in chunks: sampling after the last chunk waits for no token."""
    guided = regex_request("[a-z]{12}", sampling=GREEDY, prompt="a long prompt " * 20)
    check_same(run(engine(max_batch_tokens=16), [(0, guided)]), [guided])


@kinds
@pytest.mark.parametrize("step", [0, 2, *(pytest.param(n, marks=slow) for n in (1, 3, 5, 9))])
def test_answers_are_the_same_after_a_lost_step(sampling: SamplingParams, step: int) -> None:
    requests = guided_requests(sampling)
    serving = engine()
    sabotage(serving, lambda _: serving.num_steps == step, ValueError("once"))
    check_same(run(serving, [(0, r) for r in [free_request(FREE), *requests]]), requests)


@pytest.mark.slow
def test_a_failure_in_sampling_is_handled_as_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    requests, serving = guided_requests(), engine()
    sample, calls = serving.runner._sample, count()

    def fail_once(*args: Any) -> Any:
        if next(calls) == 3:
            raise ValueError("once")
        return sample(*args)

    monkeypatch.setattr(serving.runner, "_sample", fail_once)
    check_same(run(serving, [(0, r) for r in requests]), requests)


@pytest.mark.slow
def test_each_fork_follows_the_grammar_independently() -> None:
    grammar = compiler().json_schema(ORDER)
    requests = [request(grammar, replace(GREEDY, repetition_penalty=1 + i)) for i in range(3)]
    check_same(run(engine(), [(0, requests)]), requests)


@pytest.mark.slow
def test_unguided_requests_are_unchanged_beside_guided_ones() -> None:
    free = [free_request(sampling) for sampling in KINDS]
    answers = run(engine(), [(i, r) for i, r in enumerate([*guided_requests(), *free])])
    check_same(answers, free)


# -- forced tokens ----------------------------------------------------------------------


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced tokens are drawn like all others, where nothing but the next of them is allowed."""
    forced, fill = GrammarState.forced, TokenMasks.fill
    runs: dict[GrammarState, list[int]] = {}

    def fill_with_the_next(masks: TokenMasks, states: Any) -> Any:
        filled = fill(masks, states)
        for row, state in enumerate(states):
            if not runs.setdefault(state, []):
                continue
            token_id = runs[state].pop(0)
            filled[row] = 0
            filled[row, token_id // 32] = np.uint32(1 << token_id % 32).view(np.int32)
        return filled

    def remember(state: GrammarState) -> list[int]:
        if not runs[state] and len(tokens := forced(state)) > 1:
            runs[state] = tokens
        return []

    monkeypatch.setattr(TokenMasks, "fill", fill_with_the_next)
    monkeypatch.setattr(GrammarState, "forced", remember)


@kinds
def test_slices_of_forced_tokens_change_nothing(
    sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, serving = guided_requests(sampling), engine()
    answers = run(serving, [(0, r) for r in requests])
    check_same(answers, requests)
    one_by_one(monkeypatch)
    drawing = engine()
    check_same(run(drawing, [(0, r) for r in requests]), requests)
    assert drawing.num_steps > serving.num_steps


def test_a_grammar_of_one_text_gives_it_without_slices_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GrammarState, "forced", lambda _: [])
    assert json.loads(say(json_request(CONSTANT))) == CONSTANT["const"]


CONSTANT = {"const": "a long sentence of which no word is for the model to choose, not one"}


def test_forced_tokens_take_no_steps_of_their_own() -> None:
    guided, serving = json_request(CONSTANT), engine()
    answers = run(serving, [(0, guided)])
    assert len(answers.ids(guided)) > 12
    assert serving.num_steps < 8
    assert json.loads(text(answers, guided)) == CONSTANT["const"]


def test_forced_tokens_have_probability_one() -> None:
    guided = json_request(CONSTANT, sampling=replace(SAMPLED, top_n_tokens=3))
    answers = run(engine(), [(0, guided)])
    outputs = answers.tokens(guided)
    assert [output.token.logprob for output in outputs[1:]] == [0.0] * (len(outputs) - 1)
    for output in outputs[1:]:
        assert [token.id for token in output.top_tokens] == [output.token.id]


@pytest.mark.parametrize("max_new_tokens", range(1, 14))
def test_the_limit_within_a_forced_run_ends_it_there(max_new_tokens: int) -> None:
    guided = json_request(CONSTANT, max_new_tokens=max_new_tokens)
    whole = json_request(CONSTANT)
    answers = run(engine(), [(0, guided), (0, whole)])
    assert answers.ids(guided) == answers.ids(whole)[:max_new_tokens]
    finished = answers.last(guided)
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.LENGTH
    assert finished.num_generated_tokens == max_new_tokens


def test_a_stop_string_within_a_forced_run_ends_it_there() -> None:
    guided = json_request(CONSTANT, stop=("no word",))
    answers = run(engine(), [(0, guided)])
    finished = answers.last(guided)
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.STOP_SEQUENCE
    assert finished.generated_text.endswith("of which no word")


@pytest.mark.parametrize("steps", range(6))
def test_an_abort_in_any_phase_frees_the_sequence(steps: int) -> None:
    staying, leaving, *_ = guided_requests()
    answers = run(engine(), [(0, leaving), (0, staying)], aborts={steps: leaving})
    check_same(answers, [staying])


# -- grammars that fail -----------------------------------------------------------------


def test_a_grammar_in_error_fails_its_own_request_alone() -> None:
    """The hostile grammar compiles, and reaches its limit after some tokens."""
    hostile, *others = regex_request(HOSTILE + "{30}", ignore_eos=True), *guided_requests()
    answers = run(engine(), [(0, r) for r in [hostile, *others]])
    failed = answers.last(hostile)
    assert isinstance(failed, Failed)
    assert "too many expressions" in failed.message
    check_same(answers, others)


def test_a_token_that_the_grammar_does_not_allow_fails_its_own_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This would happen if a mask were lost on the way to the device."""
    serving = engine()
    bad, good = json_request(ORDER), guided_requests()[0]
    fill = TokenMasks.fill

    def fill_wrongly(self: TokenMasks, states: Any) -> Any:
        masks = fill(self, states)
        masks[[i for i, s in enumerate(states) if s is wrong]] = -1
        return masks

    monkeypatch.setattr(TokenMasks, "fill", fill_wrongly)
    serving.add(bad)
    wrong = serving._live[bad.request_id][0].constraint
    answers = run(serving, [(0, good)])
    failed = answers.last(bad)
    assert isinstance(failed, Failed)
    assert "grammar" in failed.message
    check_same(answers, [good])


def test_hostile_grammars_take_bounded_time_a_step() -> None:
    patterns = ["(.*a){50}", ".*.*.*.*.*x", "([ab]*a[ab]{200}|c)*", HOSTILE]
    guided = [regex_request(p, max_new_tokens=60) for p in patterns]
    serving, longest = engine(), 0.0
    for r in guided:
        serving.add(r)
    while serving.has_work:
        started = time.monotonic()
        serving.step()
        longest = max(longest, time.monotonic() - started)
    assert longest < 5
