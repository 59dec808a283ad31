"""Streamed and unstreamed answers with the same seed are equal, in any script.

High temperatures make the model generate what it never would otherwise: incomplete characters,
bytes that are not text, control tokens.
"""

import asyncio
from itertools import cycle
from typing import Any

import httpx2
import pytest

from clients.comparing import assert_equal_answers
from clients.wire import events

pytestmark = pytest.mark.anyio

TEXTS = [
    "The capital of France is",
    "🦄🌈 Once upon a time 👩‍👩‍👧‍👦",
    "Translate to emoji: happy birthday! 🎂🎉",
    "🇫🇷🇯🇵🏳️‍🌈 flags:",
    "日本の首都は",
    "中国的首都是北京、法国的首都是",
    "서울은 대한민국의",
    "Привет, как",
    "Ελληνικά: καλημέρα",
    "مرحبا بالعالم",
    "שלום עולם",
    "हिन्दी में नमस्ते",
    "ภาษาไทย สวัสดี",
    "e\u0301a\u0308o\u0302 combining: n\u0303",
    "Z\u0351\u036b\u0343a\u0334l\u0321g\u0322o\u0489",
    "\U00010348\U0001d11e\U0001f9ec rare planes",
    "\u200b\u200d\ufeff zero widths",
    "naïve café — “quotes” … ½ €",
    "tabs\tand\r\nnewlines\n\n\n",
    "<|im_start|>user\nWrite three emoji.<|im_end|>\n<|im_start|>assistant\n",
]
TEMPERATURES = cycle([0.9, 2.5, 6.0, 30.0])
CASES = [
    {
        "inputs": text,
        "parameters": {
            "max_new_tokens": 8,
            "do_sample": True,
            "temperature": next(TEMPERATURES),
            "seed": 1000 * turn + number,
            "details": True,
            "top_n_tokens": 1,
            "return_full_text": turn == 2,
        },
    }
    for turn in range(4)
    for number, text in enumerate(TEXTS[turn:] + TEXTS[:turn])
]


async def test_80_answers_are_equal_streamed_or_not(url: str) -> None:
    limit = asyncio.Semaphore(12)
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:

        async def both(case: dict[str, Any]) -> tuple[Any, list[Any]]:
            async with limit:
                plain, stream = await asyncio.gather(
                    client.post("/generate", json=case), client.post("/generate_stream", json=case)
                )
            assert plain.status_code == stream.status_code == 200
            return plain.json(), events(stream.text)

        pairs = await asyncio.gather(*map(both, CASES))

    num_tokens = 0
    for case, (plain, streamed) in zip(CASES, pairs, strict=True):
        details = plain["details"]
        assert_equal_answers([event["token"] for event in streamed], details["tokens"])
        assert_equal_answers([event["top_tokens"] for event in streamed], details["top_tokens"])
        assert streamed[-1]["generated_text"] == plain["generated_text"], case
        assert streamed[-1]["details"]["finish_reason"] == details["finish_reason"]
        assert streamed[-1]["details"]["generated_tokens"] == details["generated_tokens"]
        check_text(case, plain)
        num_tokens += len(details["tokens"])
    assert num_tokens > len(CASES) * 5  # most were not cut short


def check_text(case: dict[str, Any], plain: Any) -> None:
    """Check that the texts of the tokens join to the generated text. Tokens of an incomplete last
    character have the text "", and the contract does not define what the generated text then has.
    """
    parameters = case["parameters"]
    text = plain["generated_text"]
    if parameters["return_full_text"]:
        assert text.startswith(case["inputs"])
        text = text.removeprefix(case["inputs"])
    tokens = [token for token in plain["details"]["tokens"] if not token["special"]]
    joined = "".join(token["text"] for token in tokens)
    if tokens and tokens[-1]["text"] == "":
        assert text == "" or text.startswith(joined), case
    else:
        assert text == joined, case


async def test_a_chat_is_equal_streamed_or_not(url: str) -> None:
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:

        async def both(number: int, text: str) -> None:
            body = {
                "messages": [{"role": "user", "content": text}],
                "max_tokens": 8,
                "temperature": 3.0,
                "seed": number,
                "logprobs": True,
            }
            plain, stream = await asyncio.gather(
                client.post("/v1/chat/completions", json=body),
                client.post("/v1/chat/completions", json=body | {"stream": True}),
            )
            assert plain.status_code == stream.status_code == 200, plain.text
            (choice,) = plain.json()["choices"]
            *chunks, done = events(stream.text)
            choices = [chunk["choices"][0] for chunk in chunks]
            deltas = [c["delta"]["content"] for c in choices]
            content = choice["message"]["content"]
            assert done == "[DONE]"
            assert content == "".join(deltas), body
            told = [c["logprobs"]["content"] for c in choices if c["logprobs"] is not None]
            entries = [entry for part in told for entry in part]
            assert_equal_answers(entries, choice["logprobs"]["content"])

        await asyncio.gather(*(both(number, text) for number, text in enumerate(TEXTS[:10])))
