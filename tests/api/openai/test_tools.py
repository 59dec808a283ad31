"""Tools: the prompt that lists them, the grammar of a call, and the call that a client gets."""

import json
import time
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from api.openai.tools import CallReader
from engine.core.request import (
    Event,
    FinishReason,
    Request,
    TokenOutput,
)
from tests.api.client import client
from tests.api.scripted import (
    ScriptedEngine,
    ScriptedGrammar,
    finished,
    grammar_of,
    output,
    token,
)

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Weather?"}]}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it", "parameters": CITY},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = ['{"', 'function": {"_name', '": "weather', '",', ' "city":', ' "Oslo', '"}', "}"]
NO_TOOL = ['{"function": {"_name": "', 'no_tool"', "}}"]
EOS = TokenOutput(token(2, "</s>", special=True))


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1700000000.5)


def steps(pieces: Sequence[str], reason: FinishReason = FinishReason.EOS_TOKEN) -> Any:
    """Return a step for each piece of text, and one for the EOS token if that is the reason."""
    outputs = [output(piece) for piece in pieces]
    if reason is FinishReason.EOS_TOKEN:
        outputs.append(EOS)
    last = finished("".join(pieces), len(outputs), reason)
    return [*([o] for o in outputs[:-1]), [outputs[-1], last]]


def saying(*pieces: str, reason: FinishReason = FinishReason.EOS_TOKEN) -> ScriptedEngine:
    """Return an engine that generates `pieces` under a grammar, and two tokens without one."""

    def script(request: Request) -> Sequence[list[Event]]:
        if request.grammar is None:
            return [[output(" Hello")], [output(" you"), finished(" Hello you", 2)]]
        said: list[list[Event]] = steps(pieces, reason)
        return said

    return ScriptedEngine(script)


async def ask(engine: ScriptedEngine, **body: Any) -> httpx2.Response:
    async with client(engine) as http:
        return await http.post(PATH, json=ASKED | {"tools": [WEATHER, CLOCK]} | body)


def call_schema(name: str) -> dict[str, Any]:
    own: dict[str, Any] = CITY if name == "weather" else {"properties": {}, "required": []}
    return {
        "type": "object",
        "properties": {"_name": {"type": "string", "const": name}, **own["properties"]},
        "required": ["_name", *own["required"]],
        "additionalProperties": False,
    }


def schema(*names: str) -> dict[str, Any]:
    return {
        "$defs": {str(n): call_schema(name) for n, name in enumerate(names)},
        "type": "object",
        "properties": {
            "function": {"anyOf": [{"$ref": f"#/$defs/{n}"} for n in range(len(names))]}
        },
        "required": ["function"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (None, ("weather", "clock", "no_tool")),
        ("auto", ("weather", "clock", "no_tool")),
        ("required", ("weather", "clock")),
        ("clock", ("clock",)),
        ({"type": "function", "function": {"name": "weather"}}, ("weather",)),
    ],
)
async def test_the_grammar_is_a_call_of_one_of_the_tools(
    choice: object, names: tuple[str, ...]
) -> None:
    engine = saying(*CALL)
    assert (await ask(engine, tool_choice=choice)).status_code == 200
    expected = schema(*names)
    grammar = grammar_of(engine.requests[0])
    assert isinstance(grammar, ScriptedGrammar)
    assert grammar == ScriptedGrammar("json", expected)
    assert isinstance(grammar.source, dict)
    first = json.dumps(grammar.source["$defs"]["0"])
    assert first.index("_name") < first.index("city" if "weather" in names else "required")


async def test_references_of_a_tool_are_to_its_own_definitions() -> None:
    engine = saying(*CALL)
    unit = {"$defs": {"Unit": {"enum": ["C", "F"]}}, "properties": {"u": {"$ref": "#/$defs/Unit"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": unit}}
    await ask(engine, tools=[CLOCK, tool], tool_choice="required")
    grammar = engine.requests[0].grammar
    assert grammar is not None
    moved = grammar.source["$defs"]["1"]  # type: ignore[attr-defined]
    assert moved["properties"]["u"] == {"$ref": "#/$defs/1/$defs/Unit"}
    assert moved["$defs"] == unit["$defs"]


TOLD = (
    '[{"type":"function","function":{"description":"Tells it","name":"weather","arguments":'
    '"{\\"type\\":\\"object\\",\\"properties\\":{\\"city\\":{\\"type\\":\\"string\\"}},'
    '\\"required\\":[\\"city\\"]}"}}]'
)
PROMPT = (
    "\nGiven the functions available, please respond with a JSON for a function call with its "
    "proper arguments that best answers the given prompt. Respond in the format {name: function "
    "name, parameters: dictionary of argument name and its value}.Do not use variables.\n"
)


@pytest.mark.parametrize(
    ("template_knows_tools", "tool_prompt", "appendix"),
    [
        (False, None, f"\n---\n{TOLD}\n{PROMPT}"),
        (False, "", f"\n---\n{TOLD}\n{PROMPT}"),
        (False, "Call one.", f"\n---\n{TOLD}\nCall one."),
        (True, "Call one.", "\n---\nCall one."),
    ],
)
async def test_the_last_message_lists_the_tools_for_the_model(
    template_knows_tools: bool, tool_prompt: str | None, appendix: str
) -> None:
    engine = saying(*CALL)
    engine.tokenizer.chat_uses_tools = template_knows_tools
    await ask(engine, tools=[WEATHER], tool_choice="required", tool_prompt=tool_prompt)
    [(messages, tools)] = engine.tokenizer.chats
    assert messages == [{"role": "user", "content": "Weather?" + appendix}]
    assert tools == json.loads(TOLD)


async def test_a_last_message_of_calls_is_left_alone() -> None:
    engine = saying(*CALL)
    call = {"id": "0", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    await ask(engine, messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert "---" not in engine.tokenizer.chats[0][0][0]["content"]


async def test_a_call_is_tgis_to_the_byte() -> None:
    answer = await ask(saying(*CALL))
    assert answer.status_code == 200
    assert answer.content == (
        b'{"object":"chat.completion","id":"","created":1700000000,"model":"org/model",'
        b'"system_fingerprint":"3.3.6-dev0-native","choices":[{"index":0,"message":'
        b'{"role":"assistant","tool_calls":[{"id":"0","type":"function","function":'
        b'{"description":null,"name":"weather","arguments":"{\\"city\\":\\"Oslo\\"}"}}]},'
        b'"logprobs":null,"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":%d,"completion_tokens":9,"total_tokens":%d}}'
        % (num_prompt := int(answer.headers["x-prompt-tokens"]), num_prompt + 9)
    )


async def test_arguments_keep_their_order_and_their_digits() -> None:
    text = '{"function": {"_name": "f", "z": [1.0, 2], "a": 100000000000000000000000, "é": {}}}'
    answer = await ask(saying(text))
    function = answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]
    assert function["arguments"] == '{"z":[1.0,2],"a":100000000000000000000000,"é":{}}'


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ('{"function": {"_name": "we', "EOF while parsing a string at line 1 column 26"),
        ("{}", "missing field `function`"),
        ('{"function": {"_name": "f", "a": 1e999}}', "Out of range float values"),
    ],
)
async def test_a_call_cut_short_is_a_tool_error(text: str, detail: str) -> None:
    answer = await ask(saying(text, reason=FinishReason.LENGTH))
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "tool_error"
    told = answer.json()["error"]
    assert told.startswith(f"Tool error: Failed to parse generated text: {detail}")
    assert told.endswith(" " + json.dumps(text))


async def test_an_answer_in_words_is_that_of_a_second_generation() -> None:
    engine = saying(*NO_TOOL)
    answer = await ask(engine, logprobs=True)
    told = answer.json()
    assert told["choices"][0]["message"] == {"role": "assistant", "content": " Hello you"}
    assert told["choices"][0]["finish_reason"] == "length"
    assert [t["token"] for t in told["choices"][0]["logprobs"]["content"]] == [" Hello", " you"]
    assert told["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert answer.headers["x-prompt-tokens"] == "2"
    assert answer.headers["x-compute-characters"] == str(len("user: Weather?"))
    assert engine.tokenizer.chats[1] == (ASKED["messages"], None)
    assert [request.grammar is None for request in engine.requests] == [False, True]


@pytest.mark.parametrize(
    "body",
    [
        {"tool_choice": "none"},
        {"tools": []},
        {"tools": None},
        {"tools": None, "tool_choice": "required"},
        {"tools": None, "tool_choice": "clock"},
    ],
)
async def test_without_tools_an_answer_is_plain_text(body: dict[str, Any]) -> None:
    engine = saying()
    answer = await ask(engine, **body)
    assert answer.json()["choices"][0]["message"]["content"] == " Hello you"
    assert engine.tokenizer.chats == [(ASKED["messages"], None)]


async def test_an_empty_list_of_tools_may_have_a_response_format() -> None:
    engine = saying("{}")
    value: dict[str, Any] = {"properties": {}}
    body = {"tools": [], "response_format": {"type": "json", "value": value}}
    assert (await ask(engine, **body)).json()["choices"][0]["message"]["content"] == "{}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"tool_choice": "news"}, "Tool with name news not found"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "news"}}},
            "Tool with name news not found",
        ),
        (
            {"response_format": {"type": "json_object"}},
            "Grammar and tools are mutually exclusive",
        ),
    ],
)
async def test_tools_that_cannot_be_offered_are_refused(
    body: dict[str, Any], text: str, stream: bool
) -> None:
    answer = await ask(saying(), stream=stream, **body)
    assert answer.status_code == 422
    assert answer.json() == {"error": f"Tool error: {text}", "error_type": "tool_error"}


# Streams.


async def deltas(engine: ScriptedEngine, **body: Any) -> list[tuple[dict[str, Any], str | None]]:
    answer = await ask(engine, stream=True, **body)
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    return [(choice["delta"], choice["finish_reason"]) for choice in choices]


def arguments(text: str, name: str | None = None, id: str = "0") -> dict[str, Any]:
    function = {"name": name, "arguments": text}
    call = {"index": 0, "id": id, "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}


EMPTY = {"role": "assistant", "content": ""}


async def test_a_streamed_call_begins_with_its_name_and_ends_with_the_reason() -> None:
    assert await deltas(saying(*CALL)) == [
        (arguments("{", "weather"), None),
        (arguments(' "city":'), None),
        (arguments(' "Oslo'), None),
        (arguments('"}'), None),
        (arguments(""), None),
        (EMPTY, "stop"),
    ]


async def test_the_first_chunk_of_a_call_is_tgis_to_the_byte() -> None:
    answer = await ask(saying(*CALL), stream=True)
    assert answer.content.split(b"\n\n")[0] == (
        b'data: {"object":"chat.completion.chunk","id":"","created":1700000000,'
        b'"model":"org/model","system_fingerprint":"3.3.6-dev0-native","choices":[{"index":0,'
        b'"delta":{"role":"assistant","tool_calls":[{"index":0,"id":"0","type":"function",'
        b'"function":{"name":"weather","arguments":"{"}}]},"logprobs":null,'
        b'"finish_reason":null}],"usage":null}'
    )


async def test_a_call_whose_last_token_ends_it_has_the_reason_there() -> None:
    *_, last = await deltas(saying(*CALL, reason=FinishReason.LENGTH))
    assert last == (arguments(""), "length")


@pytest.mark.parametrize("length", [1, 2, 6])
async def test_a_streamed_call_that_is_cut_short_has_the_reason_length(length: int) -> None:
    *_, (delta, reason) = await deltas(saying(*CALL[:length], reason=FinishReason.LENGTH))
    assert reason == "length"
    assert delta == (arguments(' "Oslo') if length == 6 else EMPTY)


async def test_a_streamed_answer_in_words_is_a_second_stream() -> None:
    engine = saying(*NO_TOOL)
    assert await deltas(engine) == [
        ({"role": "assistant", "content": " Hello"}, None),
        ({"role": "assistant", "content": " you"}, "length"),
    ]
    assert engine.num_aborts == 1


async def test_usage_of_a_streamed_answer_in_words_is_that_of_the_second_generation() -> None:
    options = {"include_usage": True}
    answer = await ask(saying(*NO_TOOL), stream=True, stream_options=options)
    *_, last, _, _ = answer.text.split("\n\n")
    usage = json.loads(last.removeprefix("data: "))["usage"]
    assert usage == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


@pytest.mark.parametrize(
    ("ids", "expected"), [(["0"], "1"), (["3", "1"], "4"), (["call_x"], None), ([], "0")]
)
async def test_ids_of_streamed_calls_count_on(ids: list[str], expected: str | None) -> None:
    function = {"name": "clock", "arguments": "{}"}
    earlier = [{"role": "assistant", "tool_calls": [{"id": i, "function": function}]} for i in ids]
    [(first, _), *_] = await deltas(saying(*CALL), messages=[*earlier, *ASKED["messages"]])
    told = first["tool_calls"][0]["id"]
    assert told == expected if expected else len(told) == 36


TEXTS = [
    ('{"function": {"_name": "f"}}', "f", {}),
    ('{"function":{"_name":"f","a":{"b":"}}"}}}', "f", {"a": {"b": "}}"}}),
    ('{ "function" : { "_name" : "f" , "a" : [ { } ] } } ', "f", {"a": [{}]}),
    ('{"function": {"_name": "a \\"b\\" é", "c": "\\\\"}}', 'a "b" é', {"c": "\\"}),
]


@pytest.mark.parametrize(("text", "name", "expected"), TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
def test_a_call_read_in_pieces_of_any_size_is_the_whole_call(
    text: str, name: str, expected: object, size: int
) -> None:
    reader = CallReader()
    pieces = [reader.read(text[i : i + size]) for i in range(0, len(text), size)]
    assert reader.name == name
    assert reader.is_complete
    assert json.loads("".join(piece for piece in pieces if piece)) == expected
    assert reader.read("more") is None
