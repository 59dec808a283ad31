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
from clients.wire import (
    CHAT_PROMPT,
    CITY,
    MESSAGES,
    PROMPT,
    TOOL,
    WEATHER,
    every_permit_taken,
    name_of,
)

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
    assert answer.id.startswith("cmpl-")
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
    asked = {"prompt": PROMPT, "max_tokens": 6, "logprobs": 2, **GREEDY}
    plain = client.completions.create(**asked)
    options = {"stream_options": {"include_usage": True}}
    *chunks, last = client.completions.create(stream=True, **options, **asked)
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in choices) == plain.choices[0].text
    assert [choice.finish_reason for choice in choices] == [None] * 5 + ["length"]
    told = plain.choices[0].logprobs
    assert [token for choice in choices for token in choice.logprobs.tokens] == told.tokens
    assert [n for choice in choices for n in choice.logprobs.text_offset] == told.text_offset
    assert {chunk.id for chunk in chunks} == {last.id}
    assert last.choices == []
    assert last.usage == plain.usage
    assert {chunk.usage for chunk in chunks} == {None}


@sync_only
def test_a_streamed_completion_has_no_usage_unless_asked_for(client: Any) -> None:
    chunks = client.completions.create(stream=True, prompt=PROMPT, max_tokens=2, **GREEDY)
    assert [chunk.usage for chunk in chunks] == [None, None]
    assert len({chunk.id for chunk in chunks}) == 1


@sync_only
def test_a_completion_that_ends_by_itself_has_no_text_of_its_last_token(client: Any) -> None:
    asked = {"prompt": CHAT_PROMPT, "max_tokens": 60, **GREEDY}
    (plain,) = client.completions.create(**asked).choices
    chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **asked)]
    assert plain.finish_reason == chunks[-1].finish_reason == "stop"
    assert "".join(chunk.text for chunk in chunks) == plain.text
    assert "<|im_end|>" not in plain.text


@sync_only
@pytest.mark.parametrize("stop", ["Paris is l", [" lov", "never"], "is"])
def test_a_completion_ends_before_its_stop_string(client: Any, stop: str | list[str]) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 40, **GREEDY}
    free = client.completions.create(**asked | {"max_tokens": 80}).choices[0].text
    strings = [stop] if isinstance(stop, str) else stop
    expected = free[: min([free.find(s) for s in strings if s in free], default=len(free))]
    (plain,) = client.completions.create(stop=stop, **asked).choices
    chunks = client.completions.create(stop=stop, stream=True, **asked)
    streamed = "".join(chunk.choices[0].text for chunk in chunks)
    assert plain.text == streamed
    assert expected.startswith(plain.text)
    if any(s in free for s in strings) and plain.finish_reason == "stop":
        assert plain.text == expected


@sync_only
def test_a_prompt_may_be_token_ids(client: Any) -> None:
    ids = [504, 3575, 282, 4649, 314]  # PROMPT
    plain = client.completions.create(prompt=PROMPT, max_tokens=4, **GREEDY)
    one = client.completions.create(prompt=ids, max_tokens=4, echo=True, **GREEDY)
    two = client.completions.create(prompt=[ids, ids[:2]], max_tokens=4, **GREEDY)
    assert one.choices[0].text == PROMPT + plain.choices[0].text
    assert two.choices[0].text == plain.choices[0].text
    assert two.usage.prompt_tokens == 7


@sync_only
def test_several_choices_have_the_seeds_that_follow_one_another(client: Any) -> None:
    asked = {"model": "tgi", "prompt": PROMPT, "max_tokens": 6, "temperature": 1.5}
    alone = [client.completions.create(seed=s, **asked).choices[0].text for s in (5, 6, 7)]
    together = client.completions.create(seed=5, n=3, **asked)
    assert [choice.text for choice in together.choices] == alone
    assert together.usage.prompt_tokens == 5
    assert len(set(alone)) == 3
    streamed = ["", "", ""]
    for chunk in client.completions.create(seed=5, n=3, stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == alone


@sync_only
def test_the_best_of_two_has_the_higher_mean_logprob(client: Any) -> None:
    asked = {"model": "tgi", "prompt": PROMPT, "max_tokens": 6, "temperature": 1.5, "seed": 5}
    both = client.completions.create(n=2, logprobs=0, **asked).choices
    means = [sum(choice.logprobs.token_logprobs) / 6 for choice in both]
    best = client.completions.create(best_of=2, **asked).choices
    assert [choice.text for choice in best] == [both[means.index(max(means))].text]


@sync_only
def test_a_bias_bans_and_forces_tokens(client: Any) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 3, "logprobs": 1, **GREEDY}
    plain = client.completions.create(**asked).choices[0]
    paris = 7042
    banned = client.completions.create(logit_bias={str(paris): -100}, **asked).choices[0]
    forced = client.completions.create(logit_bias={str(paris): 100}, **asked).choices[0]
    assert plain.text.startswith(" Paris")
    assert not banned.text.startswith(" Paris")
    assert forced.text == " Paris" * 3
    first = banned.logprobs
    assert first.top_logprobs[0][" Paris"] > first.token_logprobs[0]  # the model's own


@sync_only
def test_a_frequency_penalty_counts_what_was_generated(client: Any) -> None:
    """TGI's penalty is a share of the context, and would not change so short an answer."""
    asked = {"prompt": " ".join("1" * 10), "max_tokens": 16, **GREEDY}
    plain = client.completions.create(**asked).choices[0].text
    punished = client.completions.create(frequency_penalty=2.0, **asked).choices[0].text
    assert plain == " 1" * 8
    assert punished.startswith(" 1")  # nothing was generated yet, so nothing is punished
    assert punished.count("1") < plain.count("1")


@sync_only
def test_every_echoed_token_has_its_logprob_but_the_first(client: Any) -> None:
    asked = {"prompt": PROMPT, "logprobs": 1, "echo": True, **GREEDY}
    told = client.completions.create(max_tokens=2, **asked).choices[0]
    logprobs = told.logprobs
    assert "".join(logprobs.tokens) == told.text
    assert [
        told.text.index(t, o) for t, o in zip(logprobs.tokens, logprobs.text_offset, strict=True)
    ] == (logprobs.text_offset)
    assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
    assert all(p < 0 for p in logprobs.token_logprobs[1:])
    alone = client.completions.create(max_tokens=0, **asked)
    assert alone.choices[0].text == PROMPT
    assert alone.choices[0].logprobs.tokens == logprobs.tokens[:5]
    assert alone.usage.completion_tokens == 0


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
    ({"top_p": 1.5}, "top_p", "`top_p` must be >= 0.0 and <= 1.0. Given: 1.5"),
    ({"max_tokens": 0}, "max_tokens", "`max_new_tokens` must be strictly positive"),
    (
        {"top_logprobs": 21, "logprobs": True},
        "top_logprobs",
        "`top_logprobs` must be >= 0 and <= 20. Given: 21",
    ),
    (
        {"presence_penalty": -2.1},
        "presence_penalty",
        "`presence_penalty` must be >= -2.0 and <= 2.0",
    ),
    ({"logit_bias": {"7": 101}}, "logit_bias", "`logit_bias` must be >= -100.0 and <= 100.0"),
]


@pytest.mark.parametrize(("asked", "param", "told"), REFUSED_BY_VALIDATION, ids=name_of)
def test_an_invalid_request_is_a_bad_request_that_names_the_field(
    client: Any, asked: dict[str, Any], param: str, told: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, stream=stream, **asked)
        error = refused.value
        assert told in error.message
        assert (error.type, error.param, error.code) == ("invalid_request_error", param, None)


@sync_only
def test_a_prompt_that_is_too_long_has_openais_code(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, messages=[{"role": "user", "content": "word " * 600}])
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"


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
    ({"stop": 3}, "stop", "stop: invalid type: integer `3`, expected a sequence"),
    (
        {"response_format": {"type": "xml"}},
        "response_format.type",
        "response_format: unknown variant `xml`",
    ),
    (
        {"messages": [{"role": "user"}]},
        "messages[0]",
        "messages[0]: data did not match any variant of",
    ),
]


@pytest.mark.parametrize(("asked", "param", "told"), REFUSED_BY_SHAPE, ids=name_of)
def test_a_body_of_another_shape_is_a_bad_request_that_names_the_field(
    client: Any, asked: dict[str, Any], param: str, told: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, stream=stream, **asked)
        assert told in refused.value.message
        assert refused.value.param == param


def test_a_body_that_is_not_json_is_a_bad_request_in_openais_shape(url: str) -> None:
    headers = {"content-type": "application/json"}
    refused = httpx2.post(f"{url}/v1/completions", content=b"{", headers=headers)
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"


@sync_only
def test_a_route_that_is_not_served_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.embeddings.create(model="tgi", input="x")
    assert refused.value.type == "invalid_request_error"


def test_a_tool_that_does_not_exist_is_a_bad_request(client: Any) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, tools=[TOOL], tool_choice="get_news", stream=stream)
        assert "Tool with name get_news not found" in refused.value.message
        assert refused.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"suffix": "!"}, "suffix", "unsupported_parameter"),
        ({"prompt": ["x"] * 5}, "prompt", None),
        ({"prompt": ""}, "prompt", None),
        ({"prompt": [49152]}, "prompt", None),
        ({"n": 33}, "n", None),
        ({"logprobs": 6}, "logprobs", None),
    ],
    ids=str,
)
def test_an_invalid_completion_is_a_bad_request_that_names_the_field(
    client: Any, asked: dict[str, Any], param: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**GREEDY | {"prompt": PROMPT, "max_tokens": 1} | asked)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_a_full_server_is_a_rate_limit(client: Any, url: str) -> None:
    with every_permit_taken(url):
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as refused:
                chat(client, max_tokens=1, stream=stream)
            assert refused.value.type == "rate_limit_error"
            assert refused.value.code == "rate_limit_exceeded"


@sync_only
def test_parameters_that_change_nothing_are_ignored(client: Any) -> None:
    plain = chat(client, max_tokens=4)
    answer = chat(client, max_tokens=4, user="me", metadata={"a": "b"}, store=False)
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
    parameters = {**CITY, "additionalProperties": False}
    function = {"name": "find", "parameters": parameters, "strict": True}
    strict = {"type": "function", "function": function}
    asked = {"messages": MESSAGES, "tools": [strict], "tool_choice": "required", "max_tokens": 60}
    with client.chat.completions.stream(**asked | GREEDY) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in events
    (call,) = final.choices[0].message.tool_calls
    assert call.function.name == "find"
    validate(call.function.parsed_arguments, parameters)
