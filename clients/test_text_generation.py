"""`text-generation`, TGI's own client: answers, streams and errors."""

import asyncio
import json
import re
from collections.abc import Iterable, Iterator
from statistics import mean
from typing import Any

import pytest
from jsonschema import validate
from pydantic import BaseModel
from text_generation import AsyncClient, Client, types
from text_generation.errors import BadRequestError, OverloadedError, ValidationError
from text_generation.types import FinishReason, Grammar, GrammarType, Message, Tool

from clients.calling import Calls, sync_only
from clients.comparing import assert_equal_answers
from clients.wire import CHAT_PROMPT, CITY, PROMPT, TOOL, WEATHER, every_permit_taken, name_of

LONG_PROMPT = "Once upon a time, in a quiet village by the sea, there lived"


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    if request.param == "sync":
        yield Calls(Client(url, timeout=60), None)
    else:
        with asyncio.Runner() as runner:
            yield Calls(AsyncClient(url, timeout=60), runner)


def dumped(models: Iterable[BaseModel]) -> list[dict[str, Any]]:
    return [model.model_dump() for model in models]


def text_of(tokens: list[types.Token]) -> str:
    return "".join(token.text for token in tokens if not token.special)


def test_an_answer_has_text_and_details(client: Any) -> None:
    answer = client.generate(PROMPT, max_new_tokens=5)
    assert answer.generated_text.startswith(" Paris")
    assert answer.details.finish_reason == FinishReason.Length
    assert answer.details.generated_tokens == len(answer.details.tokens) == 5
    assert text_of(answer.details.tokens) == answer.generated_text
    assert all(token.logprob <= 0 for token in answer.details.tokens)
    assert answer.details.seed is None
    assert answer.details.prefill == []
    assert answer.details.top_tokens is None
    assert answer.details.best_of_sequences is None


def test_all_parameters_are_accepted_together(client: Any) -> None:
    asked = {
        "do_sample": True,
        "max_new_tokens": 8,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.1,
        "return_full_text": True,
        "seed": 7,
        "stop_sequences": ["never said"],
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.9,
        "truncate": 5,
        "typical_p": 0.9,
        "watermark": True,
        "top_n_tokens": 3,
    }
    answer = client.generate(LONG_PROMPT, decoder_input_details=True, **asked)
    details = answer.details
    assert answer.generated_text == LONG_PROMPT + text_of(details.tokens)
    assert details.seed == 7
    assert len(details.prefill) == 5
    assert LONG_PROMPT.endswith("".join(token.text for token in details.prefill))
    assert details.prefill[0].logprob is None
    assert all(token.logprob < 0 for token in details.prefill[1:])
    assert len(details.top_tokens) == details.generated_tokens == 8
    for token, best in zip(details.tokens, details.top_tokens, strict=True):
        logprobs = [candidate.logprob for candidate in best]
        assert 1 <= len(best) <= 3
        assert logprobs == sorted(logprobs, reverse=True)
        assert token.logprob <= logprobs[0]

    streamed = client.generate_stream(LONG_PROMPT, **asked)
    assert_equal_answers(dumped(event.token for event in streamed), dumped(details.tokens))
    for event, best in zip(streamed, details.top_tokens, strict=True):
        assert_equal_answers(dumped(event.top_tokens), dumped(best))
    assert streamed[-1].generated_text == answer.generated_text
    assert streamed[-1].details.seed == 7


@sync_only
def test_a_prompt_has_its_logprobs_when_asked(client: Any) -> None:
    prefill = client.generate(PROMPT, max_new_tokens=1, decoder_input_details=True).details.prefill
    assert "".join(token.text for token in prefill) == PROMPT
    assert [token.logprob is None for token in prefill] == [True] + [False] * (len(prefill) - 1)


def test_best_of_two_returns_the_other_sequence_too(client: Any) -> None:
    answer = client.generate(PROMPT, max_new_tokens=6, best_of=2, do_sample=True, temperature=2.0)
    (other,) = answer.details.best_of_sequences
    assert answer.details.seed is not None
    assert other.seed is not None
    assert other.seed != answer.details.seed
    assert text_of(other.tokens) == other.generated_text
    assert mean(t.logprob for t in answer.details.tokens) >= mean(t.logprob for t in other.tokens)


def test_a_stream_joins_to_the_unstreamed_answer(client: Any) -> None:
    answer = client.generate(PROMPT, max_new_tokens=12)
    streamed = client.generate_stream(PROMPT, max_new_tokens=12)
    assert_equal_answers(dumped(event.token for event in streamed), dumped(answer.details.tokens))
    assert all(event.generated_text is event.details is None for event in streamed[:-1])
    assert streamed[-1].generated_text == answer.generated_text
    assert streamed[-1].details.finish_reason == FinishReason.Length
    assert streamed[-1].details.generated_tokens == 12
    assert streamed[-1].details.seed is None


def test_a_stream_of_one_token_is_one_event(client: Any) -> None:
    (event,) = client.generate_stream(PROMPT, max_new_tokens=1)
    assert event.token.text == event.generated_text == " Paris"
    assert event.details.generated_tokens == 1


@sync_only
def test_the_end_of_sequence_token_is_reported_but_not_in_the_text(client: Any) -> None:
    answer = client.generate(CHAT_PROMPT, max_new_tokens=60)
    assert answer.details.finish_reason == FinishReason.EndOfSequenceToken
    assert answer.details.tokens[-1].special
    assert answer.details.tokens[-1].text == "<|im_end|>"
    assert "<|im_end|>" not in answer.generated_text
    assert text_of(answer.details.tokens) == answer.generated_text
    assert answer.details.generated_tokens == len(answer.details.tokens)


@sync_only
def test_a_stop_sequence_ends_the_text_and_stays_in_it(client: Any) -> None:
    answer = client.generate(PROMPT, max_new_tokens=20, stop_sequences=["."])
    assert answer.generated_text == " Paris."
    assert answer.details.finish_reason == FinishReason.StopSequence
    last = client.generate_stream(PROMPT, max_new_tokens=20, stop_sequences=["."])[-1]
    assert last.generated_text == " Paris."
    assert last.details.finish_reason == FinishReason.StopSequence


@sync_only
def test_a_seed_repeats_the_answer(client: Any) -> None:
    asked = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 10}
    texts = [client.generate(PROMPT, seed=seed, **asked).generated_text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert client.generate_stream(PROMPT, seed=1, **asked)[-1].generated_text == texts[0]


@sync_only
def test_a_json_grammar_is_followed(client: Any) -> None:
    grammar = Grammar(type=GrammarType.Json, value=CITY)
    answer = client.generate("A city as JSON: ", max_new_tokens=40, grammar=grammar)
    assert answer.details.finish_reason == FinishReason.EndOfSequenceToken
    validate(json.loads(answer.generated_text), CITY)
    streamed = client.generate_stream("A city as JSON: ", max_new_tokens=40, grammar=grammar)
    assert streamed[-1].generated_text == answer.generated_text


@sync_only
def test_json_has_the_white_space_that_tgi_allows(client: Any) -> None:
    """JSON has at most one space, around punctuation (section 2.5)."""
    grammar = Grammar(type=GrammarType.Json, value=CITY)
    text = client.generate(PROMPT, max_new_tokens=40, grammar=grammar).generated_text
    pattern = r'{ ?"name" ?: ?"(Paris|Rome|Oslo)" ?, ?"capital" ?: ?(true|false) ?}'
    assert re.fullmatch(pattern, text), text


@sync_only
def test_a_regex_grammar_is_followed(client: Any) -> None:
    grammar = Grammar(type=GrammarType.Regex, value="[0-9]{3}-[0-9]{4}")
    answer = client.generate("My phone number is ", max_new_tokens=20, grammar=grammar)
    digits, dash, rest = answer.generated_text.partition("-")
    assert dash
    assert digits.isdigit()
    assert rest.isdigit()
    assert (len(digits), len(rest)) == (3, 4)


REFUSED = [
    (
        {"max_new_tokens": 10_000},
        "`inputs` tokens + `max_new_tokens` must be <= 512. "
        "Given: 5 `inputs` tokens and 1024 `max_new_tokens`",
    ),
    (
        {"stop_sequences": list("abcde")},
        "`stop` supports up to 4 stop sequences. Given: 5",
    ),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    (
        {"truncate": 10_000},
        "`truncate` must be strictly positive and less than 511. Given: 10000",
    ),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    (
        {"grammar": Grammar(type=GrammarType.Json, value={"type": "object"})},
        "grammar is not valid: Grammar must have a 'properties' field",
    ),
]


@pytest.mark.parametrize(("asked", "detail"), REFUSED, ids=name_of)
def test_an_invalid_request_is_a_validation_error(
    client: Any, asked: dict[str, Any], detail: str
) -> None:
    with pytest.raises(ValidationError) as plain:
        client.generate(PROMPT, **asked)
    with pytest.raises(ValidationError) as streamed:
        client.generate_stream(PROMPT, **asked)
    assert str(plain.value) == str(streamed.value) == f"Input validation error: {detail}"


def test_too_many_of_best_of_is_a_validation_error(client: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        client.generate(PROMPT, best_of=3, do_sample=True)
    told = "Input validation error: `best_of` must be > 0 and <= 2. Given: 3"
    assert str(refused.value) == told


def test_a_full_server_is_an_overloaded_error_and_then_answers_again(client: Any, url: str) -> None:
    with every_permit_taken(url):
        for method in (client.generate, client.generate_stream):
            with pytest.raises(OverloadedError, match="Model is overloaded"):
                method(PROMPT, max_new_tokens=1)
    assert client.generate(PROMPT, max_new_tokens=1).generated_text == " Paris"


CHAT = [Message(role="user", content="What is the capital of France? Answer in one word.")]


def test_a_chat_is_answered_with_its_usage(client: Any) -> None:
    answer = client.chat(CHAT, max_tokens=6, temperature=0.0)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert "Paris" in choice.message.content
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("length", "stop")
    usage = answer.usage
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    assert 1 <= usage["completion_tokens"] <= 6


@sync_only
def test_a_chat_takes_every_parameter(client: Any) -> None:
    asked = {
        "frequency_penalty": 0.2,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 6,
        "n": 1,
        "presence_penalty": -0.5,
        "seed": 3,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    one, two = (client.chat(CHAT, **asked) for _ in range(2))
    assert_equal_answers(dumped(one.choices), dumped(two.choices))
    content = one.choices[0].logprobs["content"]
    assert len(content) == one.usage["completion_tokens"]
    assert all(entry["top_logprobs"] for entry in content)


def test_a_chat_calls_the_chosen_tool(client: Any) -> None:
    tools = [Tool.model_validate(TOOL)]
    answer = client.chat(
        CHAT, max_tokens=60, temperature=0.0, tools=tools, tool_choice="get_weather"
    )
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].message.content is None
    assert call["function"]["name"] == "get_weather"
    validate(json.loads(call["function"]["arguments"]), WEATHER["parameters"])


def test_an_invalid_chat_is_a_bad_request(client: Any) -> None:
    """The error of a chat has OpenAI's shape, of which this client takes the status."""
    with pytest.raises(BadRequestError, match="`temperature` must be"):
        client.chat(CHAT, max_tokens=1, temperature=-1.0)


def test_a_streamed_chat_fails_in_release_0_7_0_as_it_does_with_tgi(client: Any) -> None:
    """The client requires `tool_calls` in every delta, which TGI does not send. It takes the chunk
    for an error payload, which it then cannot parse.
    """
    with pytest.raises((KeyError, AttributeError)):
        client.chat(CHAT, max_tokens=2, stream=True)
