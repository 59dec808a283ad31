"""Tools: the prompt that lists them, the grammar of a call, and the call that a client gets."""

import json
import re
import time
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from api.chat.call import CallReader
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
CALL = ['{"', 'name": "', "weather", '", "parameters":', ' {"', 'city":', ' "Oslo', '"}', "}"]
NO_TOOL = ['{"name": "', 'no_tool"', ', "parameters": {}}']
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


def called(answer: httpx2.Response) -> dict[str, Any]:
    """Return the one call of an answer."""
    (choice,) = answer.json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert isinstance(call, dict)
    return call


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


EMPTY: dict[str, Any] = {"type": "object", "additionalProperties": False}
SCHEMAS = {"weather": CITY, "clock": EMPTY, "no_tool": EMPTY}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (None, ("weather", "clock", "no_tool")),
        ("auto", ("weather", "clock", "no_tool")),
        ("required", ("weather", "clock")),
        ("clock", ("clock",)),
        ({"type": "function", "function": {"name": "weather"}}, ("weather",)),
        (allowed("auto", "clock"), ("clock", "no_tool")),
        (allowed("required", "clock", "weather"), ("clock", "weather")),
    ],
)
async def test_the_grammar_is_a_call_of_one_of_the_tools(
    choice: object, names: tuple[str, ...]
) -> None:
    engine = saying(*CALL)
    assert (await ask(engine, tool_choice=choice)).status_code == 200
    expected = tuple((name, SCHEMAS[name]) for name in names)
    assert grammar_of(engine.requests[0]) == ScriptedGrammar("call", expected)


@pytest.mark.parametrize("names", [["no_tool"], ["no_tool", "no_tool_"]])
async def test_the_name_of_an_answer_in_words_is_that_of_no_tool(names: list[str]) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    engine = saying('{"name": "no_tool", "parameters": {}}')
    message = (await ask(engine, tools=tools)).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "no_tool"
    grammar = grammar_of(engine.requests[0])
    assert isinstance(grammar, ScriptedGrammar)
    assert isinstance(grammar.source, tuple)
    assert [name for name, _ in grammar.source] == [*names, names[-1] + "_"]


OBJECTS: list[tuple[Any, dict[str, Any]]] = [
    (None, EMPTY),
    (True, {"type": "object"}),
    ({}, {"type": "object"}),
    ({"type": ["object", "null"]}, {"type": "object"}),
    ({"$ref": "#/$defs/a", "$defs": {"a": CITY}}, {}),
    ({"anyOf": [CITY, {"type": "string"}]}, {}),
    ({"allOf": [CITY, {"required": ["city"]}]}, {}),
    ({"properties": {"_name": {"type": "string"}, "name": {"const": 1}}}, {}),
    ({"properties": {"$ref": {"const": {"$ref": "#/a"}}}}, {}),
    ({"$id": "https://example.org/a", "$ref": "#b", "$defs": {"b": {"$anchor": "b"}}}, {}),
]


@pytest.mark.parametrize(("parameters", "changed"), OBJECTS)
async def test_a_schema_of_parameters_is_kept_as_it_is(
    parameters: Any, changed: dict[str, Any]
) -> None:
    """But the arguments are always an object."""
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    engine = saying('{"name": "f", "parameters": {}}')
    assert (await ask(engine, tools=[tool], tool_choice="required")).status_code == 200
    expected = changed or {**parameters, "type": "object"}
    assert grammar_of(engine.requests[0]) == ScriptedGrammar("call", (("f", expected),))


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


async def test_a_call_is_openais_to_the_byte() -> None:
    answer = await ask(saying(*CALL))
    assert answer.status_code == 200
    id, call_id = answer.json()["id"], called(answer)["id"]
    assert answer.content == (
        b'{"object":"chat.completion","id":"%s","created":1700000000,"model":"org/model",'
        b'"system_fingerprint":"3.3.6-dev0-native","choices":[{"index":0,"message":'
        b'{"role":"assistant","content":null,"refusal":null,"tool_calls":[{"id":"%s",'
        b'"type":"function","function":{"name":"weather","arguments":"{\\"city\\": \\"Oslo\\"}"'
        b'}}]},"logprobs":null,"finish_reason":"tool_calls"}],'
        b'"usage":{"prompt_tokens":%d,"completion_tokens":10,"total_tokens":%d}}'
        % (
            id.encode(),
            call_id.encode(),
            num_prompt := int(answer.headers["x-prompt-tokens"]),
            num_prompt + 10,
        )
    )


async def test_ids_of_calls_are_unique() -> None:
    ids = [called(await ask(saying(*CALL)))["id"] for _ in range(3)]
    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", id) for id in ids)


async def test_arguments_are_the_generated_text() -> None:
    arguments = '{"z": [1.0, 2], "a": 100000000000000000000000, "b": 1e999, "é": {}}'
    answer = await ask(saying(f'{{"name": "f", "parameters": {arguments}}}'))
    assert called(answer)["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('{"name": "we', None, ""),
        ('{"name": "weather", "parameters": ', "weather", ""),
        ('{"name": "weather", "parameters": {"city": "Os', "weather", '{"city": "Os'),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_call_cut_short_is_what_there_is(
    text: str, name: str | None, arguments: str, choice: str
) -> None:
    engine = saying(text, reason=FinishReason.LENGTH)
    answer = await ask(engine, tool_choice=choice)
    assert answer.status_code == 200
    told = answer.json()["choices"][0]
    assert told["finish_reason"] == "length"
    if name is None:
        assert told["message"] == {"role": "assistant", "content": "", "refusal": None}
    else:
        assert called(answer)["function"] == {"name": name, "arguments": arguments}
    streamed = await deltas(engine, tool_choice=choice)
    assert joined(streamed) == (name, arguments)
    assert streamed[-1][1] == "length"


async def test_an_answer_in_words_is_that_of_a_second_generation() -> None:
    engine = saying(*NO_TOOL)
    answer = await ask(engine, logprobs=True)
    told = answer.json()
    words = {"role": "assistant", "content": " Hello you", "refusal": None}
    assert told["choices"][0]["message"] == words
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


NEWS = {"type": "function", "function": {"name": "news"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice",
    ["news", NEWS, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NEWS]}}],
)
async def test_a_tool_that_is_not_there_is_refused(choice: object, stream: bool) -> None:
    answer = await ask(saying(), stream=stream, tool_choice=choice)
    assert answer.status_code == 400
    told = answer.json()["error"]
    assert told["message"] == "Tool error: Tool with name news not found"
    assert told["param"] == "tool_choice"


@pytest.mark.parametrize("parameters", [False, 5, "text", [], {"type": "string"}, {"type": []}])
async def test_parameters_that_are_no_object_are_refused(parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    answer = await ask(saying(), tools=[tool])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"


async def test_stop_strings_are_for_an_answer_in_words() -> None:
    engine = saying(*NO_TOOL)
    assert (await ask(engine, stop=["name"])).status_code == 200
    assert [request.stopping.stop for request in engine.requests] == [(), ("name",)]


async def test_an_answer_in_words_follows_the_response_format() -> None:
    schema = {"properties": {"a": {"type": "string"}}}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    engine = saying(*NO_TOOL)
    answer = await ask(engine, response_format=format)
    assert answer.status_code == 200
    kinds = [grammar_of(request) for request in engine.requests]
    assert [kind.kind for kind in kinds if isinstance(kind, ScriptedGrammar)] == ["call", "json"]
    assert kinds[1] == ScriptedGrammar("json", schema)


async def test_of_n_answers_each_is_a_call_or_in_words() -> None:
    def script(request: Request) -> Sequence[list[Event]]:
        if request.grammar is None:
            return [[output("Hi"), finished("Hi", 1, FinishReason.EOS_TOKEN)]]
        said: list[list[Event]] = steps(CALL if request.sampling.seed % 2 else NO_TOOL)
        return said

    told = (await ask(ScriptedEngine(script), n=4, seed=1)).json()
    reasons = [choice["finish_reason"] for choice in told["choices"]]
    assert reasons == ["tool_calls", "stop", "tool_calls", "stop"]
    assert [choice["message"]["content"] for choice in told["choices"]] == [None, "Hi"] * 2
    ids = [c["message"]["tool_calls"][0]["id"] for c in told["choices"] if c["index"] % 2 == 0]
    assert len(set(ids)) == 2
    assert told["usage"]["completion_tokens"] == 2 * (len(CALL) + 1) + 2
    ends = {}
    streamed = await ask(ScriptedEngine(script), n=4, seed=1, stream=True)
    for event in streamed.text.split("\n\n")[:-2]:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        ends[choice["index"]] = choice["finish_reason"]
    assert [ends[index] for index in range(4)] == reasons


# Streams.


async def deltas(engine: ScriptedEngine, **body: Any) -> list[tuple[dict[str, Any], str | None]]:
    answer = await ask(engine, stream=True, **body)
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    return [(choice["delta"], choice["finish_reason"]) for choice in choices]


def started(id: str, name: str = "weather") -> dict[str, Any]:
    call = {
        "index": 0,
        "id": id,
        "type": "function",
        "function": {"name": name, "arguments": ""},
    }
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def more(arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]}


def joined(streamed: list[tuple[dict[str, Any], str | None]]) -> tuple[str | None, str]:
    """Return the name and the arguments of a streamed call."""
    calls = [call["function"] for delta, _ in streamed for call in delta.get("tool_calls", ())]
    names = [call["name"] for call in calls if "name" in call]
    assert len(names) <= 1
    return (names or [None])[0], "".join(call["arguments"] for call in calls)


async def test_a_streamed_call_begins_with_its_name_and_ends_with_the_reason() -> None:
    (first, reason), *rest = await deltas(saying(*CALL))
    assert first == started(first["tool_calls"][0]["id"])
    assert reason is None
    assert rest == [
        (more('{"'), None),
        (more('city":'), None),
        (more(' "Oslo'), None),
        (more('"}'), None),
        ({}, "tool_calls"),
    ]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
async def test_a_streamed_call_joins_to_the_unstreamed_one(size: int) -> None:
    text = "".join(CALL)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    plain = called(await ask(saying(*pieces)))["function"]
    assert joined(await deltas(saying(*pieces))) == (plain["name"], plain["arguments"])


async def test_a_streamed_answer_in_words_is_a_second_stream() -> None:
    engine = saying(*NO_TOOL)
    assert await deltas(engine) == [
        ({"role": "assistant", "content": " Hello"}, None),
        ({"content": " you"}, None),
        ({"content": ""}, "length"),
    ]
    assert engine.num_aborts == 0


async def test_usage_of_a_streamed_answer_in_words_is_that_of_the_second_generation() -> None:
    options = {"include_usage": True}
    answer = await ask(saying(*NO_TOOL), stream=True, stream_options=options)
    *_, last, _, _ = answer.text.split("\n\n")
    usage = json.loads(last.removeprefix("data: "))["usage"]
    assert usage == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


TEXTS = [
    ('{"name": "f", "parameters": {}}', "f", {}),
    ('{"name": "f", "parameters": {"a": {"b": "}}"}}} ', "f", {"a": {"b": "}}"}}),
    ('{"name": "f", "parameters": {"a" : [ { } ] } } ', "f", {"a": [{}]}),
    ('{"name": "a \\"b\\" é", "parameters": {"c": "\\\\", "d": "\\"}"}}', 'a "b" é', None),
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
    arguments = json.loads("".join(pieces))
    assert arguments == (json.loads(text)["parameters"] if expected is None else expected)
    assert reader.read("more") == ""
