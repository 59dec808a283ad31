"""The `anthropic` client's Messages against Skiff, with every answer checked against its types."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx2
import pytest
from anthropic import beta_tool
from jsonschema import validate
from pydantic import BaseModel

from clients.calling import in_version, sync_only
from clients.server import serve
from clients.wire import CITY, MESSAGES, WEATHER, every_permit_taken

TOOL = {
    "name": WEATHER["name"],
    "description": WEATHER["description"],
    "input_schema": WEATHER["parameters"],
}
GREEDY = {"extra_body": {"temperature": 0}}
"""The client has no parameter `temperature` any more."""


class City(BaseModel):
    name: Literal["Paris", "Rome", "Oslo"]
    capital: bool


def options(url: str) -> dict[str, Any]:
    return {"base_url": url, "max_retries": 0, "api_key": "-", "_strict_response_validation": True}


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    yield from in_version(
        request.param, anthropic.Anthropic, anthropic.AsyncAnthropic, **options(url)
    )


def ask(client: Any, **asked: Any) -> Any:
    default = {"model": "skiff", "max_tokens": 16, "messages": MESSAGES} | GREEDY
    return client.messages.create(**default | asked)


def text_of(message: Any) -> str:
    (block,) = message.content
    assert block.type == "text"
    return str(block.text)


def test_a_text_is_answered(client: Any) -> None:
    answer = ask(client, max_tokens=40)
    assert "Paris" in text_of(answer)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "skiff")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.usage.input_tokens > 0


@sync_only
def test_it_is_the_answer_of_a_chat(client: Any, url: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    chat = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    answer = ask(client)
    assert text_of(answer) == chat["choices"][0]["message"]["content"]
    assert answer.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert answer.usage.output_tokens == chat["usage"]["completion_tokens"]


@sync_only
def test_an_answer_that_is_cut_tells_so(client: Any) -> None:
    answer = ask(client, max_tokens=2)
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 2)


@sync_only
def test_a_stop_sequence_is_told_and_is_not_in_the_text(client: Any) -> None:
    free = text_of(ask(client, max_tokens=40))
    stop = free[5:8]
    for stream in (False, True):
        answer = ask(client, max_tokens=40, stop_sequences=[stop, "never said"], stream=stream)
        if stream:
            deltas = [e.delta for e in answer if e.type == "content_block_delta"]
            text = "".join(delta.text for delta in deltas)
            (end,) = [e.delta for e in answer if e.type == "message_delta"]
        else:
            text, end = text_of(answer), answer
        assert text == free[: free.index(stop)]
        assert (end.stop_reason, end.stop_sequence) == ("stop_sequence", stop)


@sync_only
def test_a_system_prompt_and_blocks_are_read(client: Any) -> None:
    blocks = [
        {"type": "text", "text": "Answer in one word.", "cache_control": {"type": "ephemeral"}}
    ]
    texts = [text_of(ask(client, system=system)) for system in ("Answer in one word.", blocks)]
    assert texts[0] == texts[1]
    assert ask(client, system=blocks).usage.input_tokens != ask(client).usage.input_tokens


@sync_only
def test_a_begun_answer_is_continued(client: Any) -> None:
    begun = {"role": "assistant", "content": "The capital of France is"}
    assert text_of(ask(client, messages=[*MESSAGES, begun], max_tokens=3)).startswith(" Paris")


@sync_only
def test_a_conversation_goes_on_with_the_content_of_the_last_answer(client: Any) -> None:
    first = ask(client)
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "And of Italy?"},
    ]
    assert text_of(ask(client, messages=turns))


def test_the_events_of_a_stream_are_those_of_anthropic(client: Any) -> None:
    plain = ask(client, max_tokens=8)
    events = ask(client, max_tokens=8, stream=True)
    deltas = [event.delta.text for event in events if event.type == "content_block_delta"]
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * len(deltas),
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "".join(deltas) == text_of(plain)
    start, end = events[0].message, events[-2]
    assert start.usage.input_tokens == end.usage.input_tokens == plain.usage.input_tokens
    assert end.usage.output_tokens == plain.usage.output_tokens
    assert end.delta.stop_reason == plain.stop_reason


def test_the_clients_own_accumulator_reads_the_stream(url: str) -> None:
    client = anthropic.Anthropic(**options(url))
    plain = ask(client)
    with client.messages.stream(
        model="skiff", max_tokens=16, messages=MESSAGES, **GREEDY
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(final) == text_of(plain)
    assert final.stop_reason == plain.stop_reason
    assert final.usage.output_tokens == plain.usage.output_tokens


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=["any", "tool"]
)
def test_a_tool_is_called_the_same_streamed_or_not(client: Any, choice: Any) -> None:
    asked = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 60}
    answer = ask(client, **asked)
    (block,) = answer.content
    assert (block.type, block.name, answer.stop_reason) == ("tool_use", "get_weather", "tool_use")
    validate(block.input, WEATHER["parameters"])
    events = ask(client, stream=True, **asked)
    deltas = [event.delta.partial_json for event in events if event.type == "content_block_delta"]
    assert json.loads("".join(deltas)) == block.input
    assert events[1].content_block.name == "get_weather"
    assert events[-2].delta.stop_reason == "tool_use"


@sync_only
def test_the_model_reads_the_result_of_a_tool(client: Any) -> None:
    question = {"role": "user", "content": "What is the weather in Oslo?"}
    asked = {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 60}
    call = ask(client, messages=[question], **asked)
    result = {
        "type": "tool_result",
        "tool_use_id": call.content[0].id,
        "content": [{"type": "text", "text": "Rain, 7 degrees"}],
    }
    turns = [
        question,
        {"role": "assistant", "content": call.content},
        {"role": "user", "content": [result]},
    ]
    assert text_of(ask(client, messages=turns, max_tokens=24))


def test_the_clients_own_loop_calls_the_tool(url: str) -> None:
    called = []

    @beta_tool
    def get_weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
        """Get the weather in a city."""
        called.append(city)
        return "Rain, 7 degrees"

    runner = anthropic.Anthropic(**options(url)).beta.messages.tool_runner(
        model="skiff",
        max_tokens=60,
        messages=[{"role": "user", "content": "What is the weather in Oslo?"}],
        tools=[get_weather],
        tool_choice={"type": "any"},
        max_iterations=2,
        **GREEDY,
    )
    first, second = runner
    assert (first.stop_reason, second.stop_reason) == ("tool_use", "tool_use")
    assert second.usage.input_tokens > first.usage.input_tokens  # the whole conversation
    assert called
    assert set(called) <= {"Paris", "Rome", "Oslo"}


@sync_only
def test_tools_left_to_the_model_give_a_call_or_an_answer(client: Any) -> None:
    answer = ask(client, tools=[TOOL], max_tokens=80)
    (block,) = answer.content
    assert block.type in ("tool_use", "text")
    count = ask(client, tools=[TOOL], tool_choice={"type": "none"}).usage.input_tokens
    assert count == ask(client).usage.input_tokens


def test_the_client_parses_an_answer_into_a_model(url: str) -> None:
    client = anthropic.Anthropic(**options(url))
    asked: dict[str, Any] = {"model": "skiff", "max_tokens": 40, "messages": MESSAGES} | GREEDY
    answer = client.messages.parse(output_format=City, **asked)
    assert isinstance(answer.parsed_output, City)
    format = {"type": "json_schema", "schema": CITY}
    validate(
        json.loads(text_of(ask(client, max_tokens=40, output_config={"format": format}))), CITY
    )


@sync_only
def test_tokens_are_counted_as_the_answer_counts_them(client: Any) -> None:
    counted = client.messages.count_tokens(model="skiff", messages=MESSAGES, system="Be brief.")
    assert counted.input_tokens == ask(client, system="Be brief.").usage.input_tokens
    with_tools = client.messages.count_tokens(model="skiff", messages=MESSAGES, tools=[TOOL])
    assert with_tools.input_tokens > counted.input_tokens


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "messages"),
    ],
    ids=["max_tokens", "image", "server tool", "choice", "length"],
)
def test_what_cannot_be_done_is_a_bad_request_that_names_the_field(
    client: Any, asked: dict[str, Any], named: str
) -> None:
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError) as refused:
            ask(client, stream=stream, **asked)
        error = refused.value
        assert error.type == "invalid_request_error"
        assert error.request_id == error.body["request_id"]  # type: ignore[index, unused-ignore]
        assert named in error.body["error"]["message"]  # type: ignore[index, unused-ignore]


def test_a_full_server_is_overloaded(client: Any, url: str) -> None:
    with every_permit_taken(url):
        for stream in (False, True):
            with pytest.raises(anthropic.InternalServerError) as refused:
                ask(client, stream=stream)
            assert (refused.value.status_code, refused.value.type) == (529, "overloaded_error")


@sync_only
def test_other_routes_are_not_found(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.batches.list()
    assert missing.value.type == "not_found_error"


def test_the_key_may_be_sent_either_way() -> None:
    with serve("--api-key", "Sesame-42") as server:
        asked: dict[str, Any] = {"model": "skiff", "max_tokens": 1, "messages": MESSAGES}
        for given in ({"api_key": "Sesame-42"}, {"auth_token": "Sesame-42"}):
            keyed: dict[str, Any] = {"base_url": server.url, "max_retries": 0} | given
            assert anthropic.Anthropic(**keyed).messages.create(**asked).usage.output_tokens == 1
        with pytest.raises(anthropic.AuthenticationError) as refused:
            anthropic.Anthropic(base_url=server.url, api_key="x").messages.create(**asked)
        assert refused.value.type == "authentication_error"
