"""The `openai` client, which knows nothing of TGI, against Skiff."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from jsonschema import validate

from clients.calling import Calls, sync_only
from clients.comparing import assert_equal_answers
from clients.wire import CITY, MESSAGES, PROMPT, TOOL, WEATHER, every_permit_taken, name_of

GREEDY = {"model": "tgi", "temperature": 0}
OTHER_TOOL = {"type": "function", "function": {"name": "get_time", "parameters": None}}


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    options = {"base_url": f"{url}/v1", "api_key": "-", "max_retries": 0, "timeout": 60}
    if request.param == "sync":
        yield Calls(openai.OpenAI(**options), None)
    else:
        with asyncio.Runner() as runner:
            client = Calls(openai.AsyncOpenAI(**options), runner)
            yield client
            client.close()


def chat(client: Any, **asked: Any) -> Any:
    return client.chat.completions.create(**GREEDY | {"messages": MESSAGES} | asked)


def test_the_model_is_listed_by_the_name_that_info_gives(client: Any, url: str) -> None:
    served = httpx2.get(f"{url}/info").json()["model_id"]
    assert [(m.id, m.object, m.created, m.owned_by) for m in client.models.list()] == [
        (served, "model", 0, served)
    ]


def test_a_completion_has_text_and_usage(client: Any) -> None:
    answer = client.completions.create(prompt=PROMPT, max_tokens=5, **GREEDY)
    (choice,) = answer.choices
    assert choice.text.startswith(" Paris")
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert answer.object == "text_completion"
    assert answer.id == ""
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 5, 10)


@sync_only
def test_each_of_several_prompts_has_its_completion(client: Any) -> None:
    prompts = [PROMPT, "One, two, three,"]
    alone = [client.completions.create(prompt=prompt, max_tokens=4, **GREEDY) for prompt in prompts]
    together = client.completions.create(prompt=prompts, max_tokens=4, **GREEDY)
    texts = {choice.index: choice.text for choice in together.choices}
    assert texts == {n: answer.choices[0].text for n, answer in enumerate(alone)}
    assert together.usage.total_tokens == sum(answer.usage.total_tokens for answer in alone)


def test_a_streamed_completion_joins_to_the_unstreamed_one(client: Any) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 6, **GREEDY}
    plain = client.completions.create(**asked)
    chunks = client.completions.create(stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [""] * 5 + ["length"]
    assert chunks[-1].usage == plain.usage
    assert all(getattr(chunk, "usage", None) is None for chunk in chunks[:-1])


def test_a_chat_is_answered_with_its_usage(client: Any) -> None:
    answer = chat(client, max_tokens=6)
    (choice,) = answer.choices
    assert "Paris" in choice.message.content
    assert choice.message.role == "assistant"
    assert choice.message.tool_calls is None
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint == "3.3.6-dev0-native"
    usage = answer.usage
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    assert 1 <= usage.completion_tokens <= 6


@sync_only
def test_the_model_is_the_served_one_or_the_name_asked_for(client: Any) -> None:
    (served,) = (model.id for model in client.models.list())
    assert chat(client, max_tokens=1).model == served
    assert chat(client, max_tokens=1, model="gpt-4o").model == "gpt-4o"


@sync_only
def test_a_chat_that_ends_by_itself_has_finish_reason_stop(client: Any) -> None:
    answer = chat(client, messages=[{"role": "user", "content": "Say OK."}], max_tokens=60)
    assert answer.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in answer.choices[0].message.content


@sync_only
def test_max_completion_tokens_limits_the_answer(client: Any) -> None:
    answer = chat(client, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices == chat(client, max_tokens=3).choices


@sync_only
def test_stop_sequences_end_the_answer_and_are_cut_from_it(client: Any) -> None:
    asked = {"messages": [{"role": "user", "content": "Count from one to ten."}], "max_tokens": 24}
    free = chat(client, logprobs=True, **asked).choices[0]
    stop = free.logprobs.content[4].token
    stopped = chat(client, stop=[stop, "never said"], **asked).choices[0]
    assert stopped.finish_reason == "stop"
    assert stop not in stopped.message.content
    assert free.message.content.startswith(stopped.message.content + stop)


@sync_only
def test_a_stop_sequence_may_end_inside_a_token(client: Any) -> None:
    asked = {"messages": [{"role": "user", "content": "Count from one to ten."}], "max_tokens": 24}
    text = chat(client, **asked).choices[0].message.content
    stop = text[3:9]
    for stream in (False, True):
        answer = chat(client, stop=stop, stream=stream, **asked)
        if stream:
            said = "".join(c.choices[0].delta.content for c in answer)
        else:
            said = answer.choices[0].message.content
        assert said == text[: text.index(stop)]


@sync_only
def test_a_seed_repeats_the_answer_streamed_or_not(client: Any) -> None:
    asked = {"max_tokens": 8, "temperature": 1.5, "seed": 5}
    texts = [chat(client, **asked).choices[0].message.content for _ in range(2)]
    chunks = chat(client, stream=True, **asked)
    assert texts[0] == texts[1] == "".join(c.choices[0].delta.content for c in chunks)
    assert chat(client, **asked | {"seed": 6}).choices[0].message.content != texts[0]


def test_logprobs_belong_to_the_tokens_of_the_text(client: Any) -> None:
    answer = chat(client, max_tokens=3, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    assert len(entries) == answer.usage.completion_tokens == 3
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        best = entry.top_logprobs
        assert len(best) == 3
        assert best[0].logprob == entry.logprob  # greedy
        assert [x.logprob for x in best] == sorted((x.logprob for x in best), reverse=True)


@sync_only
def test_top_logprobs_are_empty_unless_asked_for(client: Any) -> None:
    entries = chat(client, max_tokens=2, logprobs=True).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in entries] == [[], []]
    assert chat(client, max_tokens=1).choices[0].logprobs is None


def test_a_streamed_chat_joins_to_the_unstreamed_one(client: Any) -> None:
    asked = {"max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    plain = chat(client, **asked)
    *chunks, last = chat(client, stream=True, stream_options={"include_usage": True}, **asked)
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.delta.content for choice in choices) == plain.choices[0].message.content
    assert [choice.delta.role for choice in choices] == ["assistant", *[None] * (len(choices) - 1)]
    assert [c.finish_reason for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == plain.choices[0].finish_reason
    told = [choice.logprobs for choice in choices if choice.logprobs is not None]
    entries = [entry for logprobs in told for entry in logprobs.content]
    assert_equal_answers(
        [entry.model_dump() for entry in entries],
        [entry.model_dump() for entry in plain.choices[0].logprobs.content],
    )
    assert len(entries) == plain.usage.completion_tokens
    assert {chunk.usage for chunk in chunks} == {None}
    assert last.choices == []
    assert last.usage == plain.usage
    assert {chunk.id for chunk in chunks} == {last.id} != {plain.id}


def test_several_answers_are_the_same_streamed_or_not(client: Any) -> None:
    asked = {"n": 3, "max_tokens": 8, "temperature": 1.5, "seed": 5}
    answer = chat(client, **asked)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert texts[1] == chat(client, **asked | {"n": 1, "seed": 6}).choices[0].message.content
    assert answer.usage.completion_tokens <= 24
    streamed = ["", "", ""]
    for chunk in chat(client, stream=True, **asked):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content
    assert streamed == texts


@sync_only
def test_logprobs_are_the_models_own_whatever_is_sampled(client: Any) -> None:
    free = chat(client, max_tokens=1, logprobs=True, top_logprobs=20).choices[0]
    asked = {
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
        "temperature": 0.3,
        "top_p": 0.5,
    }
    sampled = chat(client, seed=1, presence_penalty=1, **asked).choices[0]
    assert len(free.logprobs.content[0].top_logprobs) == 20
    assert_equal_answers(
        [top.model_dump() for top in sampled.logprobs.content[0].top_logprobs],
        [top.model_dump() for top in free.logprobs.content[0].top_logprobs],
    )


@sync_only
def test_a_stream_has_no_usage_unless_asked_for(client: Any) -> None:
    chunks = chat(client, stream=True, max_tokens=2)
    assert {len(chunk.choices) for chunk in chunks} == {1}
    assert {chunk.usage for chunk in chunks} == {None}


BY_NAME = {"type": "function", "function": {"name": "get_weather"}}
ALLOWED = {
    "type": "allowed_tools",
    "allowed_tools": {"mode": "required", "tools": [BY_NAME]},
}


@pytest.mark.parametrize(
    "choice",
    ["required", "get_weather", BY_NAME, ALLOWED],
    ids=["required", "name", "object", "allowed"],
)
def test_a_tool_is_called_the_same_streamed_or_not(client: Any, choice: Any) -> None:
    tools = [TOOL] if choice == "required" else [TOOL, OTHER_TOOL]
    asked = {"tools": tools, "tool_choice": choice, "max_tokens": 60}
    plain = chat(client, **asked)
    message = plain.choices[0].message
    assert plain.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    (call,) = message.tool_calls
    assert call.id.startswith("call_")
    assert (call.type, call.function.name) == ("function", "get_weather")
    validate(json.loads(call.function.arguments), WEATHER["parameters"])

    choices = [chunk.choices[0] for chunk in chat(client, stream=True, **asked)]
    assert [c.finish_reason for c in choices if c.finish_reason] == ["tool_calls"]
    first, *rest = [piece for c in choices for piece in c.delta.tool_calls or ()]
    assert (first.index, first.type, first.function.name) == (0, "function", "get_weather")
    assert first.function.arguments == ""
    assert {(piece.index, piece.id, piece.function.name) for piece in rest} == {(0, None, None)}
    arguments = "".join(piece.function.arguments for piece in rest)
    assert arguments == call.function.arguments


@sync_only
@pytest.mark.parametrize("max_tokens", [2, 12])
def test_a_call_cut_by_max_tokens_is_the_same_streamed_or_not(client: Any, max_tokens: int) -> None:
    asked = {"tools": [TOOL], "tool_choice": "required", "max_tokens": max_tokens}
    (plain,) = chat(client, **asked).choices
    assert plain.finish_reason == "length"
    *_, last = choices = [chunk.choices[0] for chunk in chat(client, stream=True, **asked)]
    assert last.finish_reason == "length"
    pieces = [piece for c in choices for piece in c.delta.tool_calls or ()]
    calls = plain.message.tool_calls or ()
    assert [call.function.name for call in calls] == [
        piece.function.name for piece in pieces if piece.id
    ]
    assert "".join(call.function.arguments for call in calls) == "".join(
        piece.function.arguments for piece in pieces
    )


@sync_only
def test_a_tool_made_from_a_nested_model_is_called(client: Any) -> None:
    """Its parameters have a reference at their root, and one is named as part of a call."""
    cities = {"enum": ["Paris", "Rome", "Oslo"]}
    place = {"type": "object", "properties": {"_name": cities}, "required": ["_name"]}
    parameters = {"$ref": "#/$defs/Place", "$defs": {"Place": place}}
    tool = {"type": "function", "function": {"name": "locate", "parameters": parameters}}
    answer = chat(client, tools=[tool, TOOL], tool_choice="locate", max_tokens=60)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "locate"
    validate(json.loads(call.function.arguments), parameters)


@sync_only
def test_an_answer_in_words_beside_tools_follows_the_response_format(client: Any) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    answer = chat(client, tools=[TOOL], response_format=schema, max_tokens=80)
    message = answer.choices[0].message
    if message.tool_calls:
        validate(json.loads(message.tool_calls[0].function.arguments), WEATHER["parameters"])
    else:
        validate(json.loads(message.content), CITY)


@sync_only
def test_tools_left_to_the_model_give_a_call_or_an_answer(client: Any) -> None:
    answer = chat(client, tools=[TOOL], max_tokens=80)
    message = answer.choices[0].message
    if message.tool_calls:
        validate(json.loads(message.tool_calls[0].function.arguments), WEATHER["parameters"])
    else:
        assert message.content


@sync_only
def test_tools_that_must_not_be_used_change_nothing(client: Any) -> None:
    plain = chat(client, max_tokens=5)
    answer = chat(client, max_tokens=5, tools=[TOOL], tool_choice="none")
    assert answer.choices[0].message.content == plain.choices[0].message.content


@sync_only
def test_the_model_reads_the_result_of_a_tool(client: Any) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    conversation = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "0", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "0", "content": "Sunny, 25 degrees"},
    ]
    answer = chat(client, messages=conversation, max_tokens=4)
    assert answer.usage.prompt_tokens > chat(client, max_tokens=1).usage.prompt_tokens
    assert answer.choices[0].message.content


@sync_only
def test_content_in_parts_is_joined(client: Any) -> None:
    text = MESSAGES[0]["content"]
    parts = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]
    answer = chat(client, messages=[{"role": "user", "content": parts}], max_tokens=5)
    assert answer.choices == chat(client, max_tokens=5).choices


@sync_only
def test_an_unfinished_assistant_message_is_continued(client: Any) -> None:
    """The model continues the assistant's last message ([S] in section 6.3)."""
    begun = [*MESSAGES, {"role": "assistant", "content": "The capital of France is"}]
    answer = chat(client, messages=begun, max_tokens=3)
    assert answer.choices[0].message.content.startswith(" Paris")


@sync_only
@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "value": {"name": "city", "schema": CITY}},
        {"type": "json_object", "value": CITY},
    ],
    ids=["json_schema", "json_object"],
)
def test_a_response_format_in_tgis_form_makes_json_that_validates(
    client: Any, response_format: dict[str, Any]
) -> None:
    asked = {"max_tokens": 40, "response_format": response_format}
    answer = chat(client, **asked)
    validate(json.loads(answer.choices[0].message.content), CITY)
    assert answer.choices[0].finish_reason == "stop"
    chunks = chat(client, stream=True, **asked)
    streamed = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert streamed == answer.choices[0].message.content


REFUSED_BY_VALIDATION = [
    ({"top_p": 0.0}, "Input validation error: `top_p` must be > 0.0 and < 1.0"),
    ({"max_tokens": 0}, "Input validation error: `max_new_tokens` must be strictly positive"),
    (
        {"top_logprobs": 6, "logprobs": True},
        "Input validation error: `top_n_tokens` must be >= 0 and <= 5. Given: 6",
    ),
    (
        {"presence_penalty": -2.1},
        "Input validation error: `presence_penalty` must be >= -2.0 and <= 2.0",
    ),
]


@pytest.mark.parametrize(("asked", "told"), REFUSED_BY_VALIDATION, ids=name_of)
def test_an_invalid_request_is_an_unprocessable_entity(
    client: Any, asked: dict[str, Any], told: str
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as plain:
        chat(client, **asked)
    assert plain.value.response.json() == {"error": told, "error_type": "validation"}
    with pytest.raises(openai.APIError) as streamed:
        chat(client, stream=True, **asked)
    assert not isinstance(streamed.value, openai.APIStatusError)  # an event of a stream begun
    assert streamed.value.message == told
    assert streamed.value.body == {"message": told, "http_status_code": 422}


TAKEN_AS_OPENAI_MEANS_IT = [
    {"stop": "x"},
    {"top_p": 1},
    {"logit_bias": {"42": -100}},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}},
    {"max_tokens": 1, "max_completion_tokens": 2},
    {"presence_penalty": 0.5},
    {"tools": []},
    {"parallel_tool_calls": False, "tools": [TOOL], "tool_choice": "none"},
    {"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES]},
    {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
]
"""TGI refuses these values or gives them another meaning."""


@pytest.mark.parametrize("asked", TAKEN_AS_OPENAI_MEANS_IT, ids=str)
def test_values_that_openais_client_may_send_are_accepted(
    client: Any, asked: dict[str, Any]
) -> None:
    answer = chat(client, **{"max_tokens": 2} | asked)
    assert answer.choices[0].message.content is not None
    assert answer.usage.completion_tokens <= 2


REFUSED_BY_SHAPE = [
    ({"stop": 3}, "stop: invalid type: integer `3`, expected a sequence"),
    ({"response_format": {"type": "xml"}}, "response_format: unknown variant `xml`"),
    ({"messages": [{"role": "user"}]}, "messages[0]: data did not match any variant of"),
]


@pytest.mark.parametrize(("asked", "told"), REFUSED_BY_SHAPE, ids=name_of)
def test_a_body_of_another_shape_is_an_unprocessable_entity_in_plain_text(
    client: Any, asked: dict[str, Any], told: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            chat(client, stream=stream, **asked)
        response = refused.value.response
        assert response.headers["content-type"] == "text/plain; charset=utf-8"
        assert response.text.startswith("Failed to deserialize the JSON body into the target type")
        assert told in response.text


def test_a_tool_that_does_not_exist_is_an_unprocessable_entity(client: Any) -> None:
    for stream in (False, True):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            chat(client, tools=[TOOL], tool_choice="get_news", stream=stream)
        assert refused.value.response.json() == {
            "error": "Tool error: Tool with name get_news not found",
            "error_type": "tool_error",
        }


def test_tools_and_a_response_format_exclude_each_other(client: Any) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        chat(client, tools=[TOOL], response_format={"type": "json_object", "value": CITY})
    assert refused.value.response.json() == {
        "error": "Tool error: Grammar and tools are mutually exclusive",
        "error_type": "tool_error",
    }


@pytest.mark.parametrize(
    ("asked", "error", "error_type"),
    [
        (
            {"suffix": "!"},
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
            "suffix not supported",
        ),
        (
            {"prompt": ["x"] * 5},
            "Number of prompts exceeds the maximum allowed batch size of 4",
            "batch size exceeded",
        ),
        ({"prompt": ""}, "Input validation error: `inputs` cannot be empty", "validation"),
    ],
    ids=["suffix", "prompts", "empty"],
)
def test_an_invalid_completion_is_an_unprocessable_entity(
    client: Any, asked: dict[str, Any], error: str, error_type: str
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.completions.create(**GREEDY | {"prompt": PROMPT, "max_tokens": 1} | asked)
    assert refused.value.response.json() == {"error": error, "error_type": error_type}


def test_a_full_server_is_a_rate_limit(client: Any, url: str) -> None:
    with every_permit_taken(url):
        with pytest.raises(openai.RateLimitError) as refused:
            chat(client, max_tokens=1)
        assert refused.value.response.json() == {
            "error": "Model is overloaded",
            "error_type": "overloaded",
        }
        with pytest.raises(openai.APIError) as streamed:
            chat(client, max_tokens=1, stream=True)
        assert streamed.value.body == {"message": "Model is overloaded", "http_status_code": 422}


@sync_only
def test_parameters_that_tgi_ignores_are_ignored(client: Any) -> None:
    plain = chat(client, max_tokens=4)
    answer = chat(client, max_tokens=4, n=2, user="me", metadata={"a": "b"}, store=False)
    assert answer.choices == plain.choices


def test_headers_agree_with_the_usage(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    raw = client.chat.completions.with_raw_response.create(
        messages=MESSAGES, max_tokens=3, **GREEDY
    )
    usage = raw.parse().usage
    assert raw.headers["x-prompt-tokens"] == str(usage.prompt_tokens)
    assert raw.headers["x-generated-tokens"] == str(usage.completion_tokens)


def test_the_clients_own_accumulator_reads_the_stream(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    asked = {"messages": [{"role": "user", "content": "Say OK."}], "max_tokens": 60} | GREEDY
    plain = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == plain.choices[0].message.content
    assert final.choices[0].finish_reason == plain.choices[0].finish_reason


def test_the_clients_own_accumulator_reads_the_call_of_a_tool(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    strict = {"type": "function", "function": WEATHER | {"strict": True}}
    parameters = WEATHER["parameters"] | {"additionalProperties": False}
    strict["function"]["parameters"] = parameters
    asked = {"messages": MESSAGES, "tools": [strict], "tool_choice": "required", "max_tokens": 60}
    with client.chat.completions.stream(**asked | GREEDY) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in events
    (call,) = final.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    validate(call.function.parsed_arguments, parameters)
