"""What a body may be: what serde_json refuses is refused in its words, and no body takes long."""

import json
import time

import pydantic_core
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.generation.request import GenerateRequest
from api.http.body import parse_body
from api.http.errors import BodyRejected
from api.openai.requests import ChatRequest, CompletionRequest
from tests.api.client import client
from tests.api.scripted import ScriptedEngine

PARSE = "Failed to parse the request body as JSON: "
SHAPE = "Failed to deserialize the JSON body into the target type: "
CHAT = '{"messages": [{"role": "user", "content": "x"}], '


def refusal(text: str, model: type = GenerateRequest) -> tuple[int, str]:
    with pytest.raises(BodyRejected) as caught:
        parse_body(text.encode(), model)
    return caught.value.status, str(caught.value)


def with_grammar(value: str) -> str:
    """Return a body whose grammar has this `value`, which is JSON."""
    return '{"inputs":"x","parameters":{"grammar":{"type":"json","value":' + value + "}}}"


# -- numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", ["1e400", "-1e400", "1E+309", "1.8e308", "9" * 310, "1" * 250 + "e99", "1e99999999"]
)
@pytest.mark.parametrize(
    ("before", "after", "path"),
    [
        ('{"inputs": "1e400", "parameters": {"temperature": ', "}}", "parameters.temperature: "),
        ('{"inputs":"x","parameters":{"seed":1,\n"top_k":', "}}", "parameters.top_k: "),
        ('{"parameters":{"max_new_tokens":', '},"inputs":"x"}', "parameters.max_new_tokens: "),
        ('{"inputs":', "}", "inputs: "),
        ('{"inputs":"x","parameters":{"details":', "}}", "parameters.details: "),
        ('{"inputs":"x","parameters":{"stop":["a",', "]}}", "parameters.stop[1]: "),
    ],
)
def test_a_number_beyond_all_floats_is_no_json(
    number: str, before: str, after: str, path: str
) -> None:
    line, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + len(number)
    assert refusal(before + number + after) == (
        400,
        f"{PARSE}{path}number out of range at line {line} column {column}",
    )


@pytest.mark.parametrize("number", ["1e400", "[[1e400]]", '{"a": -1e999}'])
def test_a_number_beyond_all_floats_is_no_part_of_a_grammar(number: str) -> None:
    status, text = refusal(with_grammar(number))
    assert status == 400
    assert "number out of range" in text


@pytest.mark.parametrize("number", ["1e308", "-1.7976931348623157e308", "1e-400", "0e999"])
def test_numbers_that_a_float_can_hold_are_taken(number: str) -> None:
    body = '{"inputs":"x","parameters":{"temperature":' + number + "}}"
    parse_body(body.encode(), GenerateRequest)


def test_a_number_that_nobody_reads_may_be_anything() -> None:
    parse_body(b'{"inputs": "x", "extra": [1e400]}', GenerateRequest)


# -- names that are repeated -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "model", "problem"),
    [
        ('{"inputs":"x","inputs":"x"}', GenerateRequest, "duplicate field `inputs`"),
        ('{"inputs":"x","inp\\u0075ts":"y"}', GenerateRequest, "duplicate field `inputs`"),
        (
            '{"inputs":"x","parameters":{"seed":1,"seed":2}}',
            GenerateRequest,
            "parameters: duplicate field `seed`",
        ),
        (
            '{"inputs":"x","parameters":{"grammar":{"type":"json","value":1,"value":2}}}',
            GenerateRequest,
            "parameters.grammar: duplicate field `value`",
        ),
        (CHAT + '"stream":true,"stream":true}', ChatRequest, "duplicate field `stream`"),
        (
            '{"messages":[{"role":"a","content":"b"},{"role":"a","role":"a","content":"b"}]}',
            ChatRequest,
            "messages[1]: duplicate field `role`",
        ),
        (
            CHAT + '"tools":[{"function":{"name":"a","name":"b"}}]}',
            ChatRequest,
            "tools[0].function: duplicate field `name`",
        ),
        (
            CHAT + '"stream_options":{"include_usage":true,"include_usage":false}}',
            ChatRequest,
            "stream_options: duplicate field `include_usage`",
        ),
        ('{"prompt":"a","prompt":"a"}', CompletionRequest, "duplicate field `prompt`"),
    ],
)
def test_a_field_that_is_given_twice_is_refused(text: str, model: type, problem: str) -> None:
    assert refusal(text, model) == (422, f"{SHAPE}{problem} at line 1 column {len(text)}")


@pytest.mark.parametrize(
    "text",
    [
        '{"inputs":"x","other":1,"other":2}',
        '{"inputs":"x","other":{"inputs":1,"inputs":2}}',
        '{"inputs":"\\"inputs\\":1,\\"inputs\\":2"}',
        '{"inputs":"x","parameters":{"grammar":{"type":"json","value":{"a":1,"a":2}}}}',
    ],
)
def test_names_that_are_no_fields_may_be_repeated(text: str) -> None:
    body = parse_body(text.encode(), GenerateRequest)
    grammar = body.parameters.grammar
    assert grammar is None or grammar.value == {"a": 2}


class Pairs(list[tuple[str, object]]):
    """An object whose names may repeat."""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(st.tuples(st.sampled_from('ab:"\\'), inner), max_size=4).map(Pairs)
    ),
    max_leaves=12,
)


def dumped(value: object) -> str:
    if isinstance(value, Pairs):
        pairs = (f"{json.dumps(name)} : {dumped(v)}" for name, v in value)
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(dumped, value))}]"
    return json.dumps(value)


@given(value=json_values)
def test_a_value_is_what_a_parser_makes_of_it_whatever_it_repeats(value: object) -> None:
    grammar = parse_body(with_grammar(dumped(value)).encode(), GenerateRequest).parameters.grammar
    assert grammar is not None
    assert grammar.value == pydantic_core.from_json(dumped(value))


def test_what_follows_the_body_is_ignored_and_its_repeats_are_not() -> None:
    assert parse_body(b' {"inputs": "x"} {"inputs"', GenerateRequest).inputs == "x"
    assert refusal('{"inputs":"x","inputs":"y"} x')[0] == 422


# -- bodies that would take long ----------------------------------------------------------

SIZE = 1_900_000


def filled(head: str, unit: str, tail: str) -> str:
    return head + unit * (SIZE // len(unit)) + unit.rstrip(",") + tail


@pytest.mark.parametrize(
    "text",
    [
        filled('{"inputs":"x","other":[', "[],", "]}"),
        filled('{"inputs":"x","other":[', "1,", "]}"),
        filled('{"inputs":"x","other":[', '"",', "]}"),
        filled('{"inputs":"x","parameters":{"stop":[', "1,", "]}}"),
        '{"inputs":"x",' + ",".join(f'"{n}":0' for n in range(120_000)) + "}",
        filled('{"inputs":"', '\\"[', '","other":[' + "[]," * 40_000 + "1]}"),
    ],
    ids=["arrays", "numbers", "strings", "bad items", "names", "after a text"],
)
def test_a_body_of_a_great_many_values_is_refused(text: str) -> None:
    assert refusal(text) == (400, f"{PARSE}it has too many values")


@pytest.mark.parametrize("unit", ["a,b;[c]{d} ", '\\"[],{}', "\\\\,", "\\n[", "\\u00e9,"])
def test_a_text_may_be_of_any_characters(unit: str) -> None:
    text = filled('{"inputs":"', unit, '"}')
    assert parse_body(text.encode(), GenerateRequest).inputs == json.loads(text)["inputs"]


def test_a_long_list_is_refused_at_its_first_bad_item() -> None:
    text = '{"inputs":"x","parameters":{"stop":["a",' + "1," * 200_000 + "1]}}"
    started = time.process_time()
    assert refusal(text)[1].startswith(f"{SHAPE}parameters.stop[1]: invalid type: integer `1`")
    assert time.process_time() - started < 0.5


@pytest.mark.anyio
async def test_a_long_body_is_answered_as_a_short_one_is() -> None:
    async with client(ScriptedEngine()) as http:
        for size in (10, 100_000):
            body = {"inputs": "x" * size, "parameters": {"max_new_tokens": -1}}
            answer = await http.post("/generate", json=body)
            assert answer.status_code == 422
            assert "parameters.max_new_tokens: invalid value: integer `-1`" in answer.text
