"""Completions by the `openai` client, which knows nothing of TGI."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from clients.calling import in_version, sync_only
from clients.wire import (
    CHAT_PROMPT,
    PROMPT,
)

GREEDY = {"model": "tgi", "temperature": 0}


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    options = {"base_url": f"{url}/v1"}
    yield from in_version(request.param, openai.OpenAI, openai.AsyncOpenAI, **options)


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
