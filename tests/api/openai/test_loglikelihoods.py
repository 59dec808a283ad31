"""Completions tell the logprobs of a text as transformers computes them: what lm-evaluation-harness
asks of `/v1/completions`, request for request.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.core.config import DEFAULT_MODEL_ID, LoadConfig
from engine.loading.checkpoint import locate
from engine.loading.loader import LoadedModel, load
from tests.engine.driving import make_engine
from tests.test_end_to_end import worker

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

PAIRS = [
    ("The capital of France is", " Paris, and the capital of Italy is Rome."),
    ("def fibonacci(n):\n", "    if n <= 1:\n        return n\n"),
    ("日本の首都は", "東京です 🗼🙂"),
    ("1, 2, 3, 4,", " 5, 6, 7, 8"),
    ("Once upon a time there lived", " seventeen purple algorithms" * 12),
]
"""Contexts and continuations, some likely and some not."""


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load(LoadConfig(DEFAULT_MODEL_ID))


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    """Return the model as transformers loads it, unchanged by the engine."""
    return AutoModelForCausalLM.from_pretrained(locate(DEFAULT_MODEL_ID).path, dtype=torch.float32)


@pytest.fixture
async def http(smollm2: LoadedModel) -> AsyncIterator[httpx2.AsyncClient]:
    """Return a client of a server that computes prompts in chunks, several in a step."""
    async with worker(make_engine(smollm2, max_batch_tokens=48)) as served, served.client() as http:
        yield http


def asked(prompts: list[list[int]]) -> dict[str, Any]:
    """Return the harness' request for the logprobs of `prompts`."""
    return {
        "model": "tgi",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def read(choice: dict[str, Any], num_context: int) -> tuple[float, bool]:
    """Return the sum and whether every token is the likeliest, as the harness reads them."""
    logprobs = choice["logprobs"]["token_logprobs"][num_context:-1]
    tops = choice["logprobs"]["top_logprobs"][num_context:-1]
    greedy = all(own == max(top.values()) for own, top in zip(logprobs, tops, strict=True))
    return sum(logprobs), greedy


def expected(model: PreTrainedModel, context: list[int], ids: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
    logprobs = torch.log_softmax(logits, -1)
    chosen = torch.tensor(ids)
    return logprobs[range(len(ids)), chosen].sum().item(), logits.argmax(-1).equal(chosen)


async def test_loglikelihoods_are_those_of_transformers(
    http: httpx2.AsyncClient, smollm2: LoadedModel, reference: PreTrainedModel
) -> None:
    encode = smollm2.tokenizer.encode
    pairs = [(encode(context), encode(text)) for context, text in PAIRS]
    pairs.append(([1], pairs[0][0]))  # the harness' context of a text without one
    bodies = [asked([context + ids]) for context, ids in pairs] * 2
    bodies.append(asked([context + ids for context, ids in pairs[:4]]))
    posts = [http.post("/v1/completions", json=body) for body in bodies]
    answers = [answer.json() for answer in await asyncio.gather(*posts)]
    choices = [choice for answer in answers for choice in answer["choices"]]
    told = [
        read(choice, len(context))
        for choice, (context, _) in zip(choices, pairs * 2 + pairs[:4], strict=True)
    ]
    wanted = [expected(reference, context, ids) for context, ids in pairs]
    for (own, greedy), (theirs, is_greedy) in zip(told, wanted * 2 + wanted[:4], strict=True):
        assert own == pytest.approx(theirs, abs=1e-3)
        assert greedy == is_greedy
    assert {greedy for _, greedy in told} == {True, False}


async def test_all_choices_of_a_prompt_tell_its_logprobs(
    http: httpx2.AsyncClient, smollm2: LoadedModel, reference: PreTrainedModel
) -> None:
    encode = smollm2.tokenizer.encode
    pairs = [(encode(context), encode(text)) for context, text in PAIRS[:2]]
    body = asked([context + ids for context, ids in pairs]) | {"n": 3, "temperature": 1.5}
    answer = (await http.post("/v1/completions", json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for choice in answer["choices"]:
        context, ids = pairs[choice["index"] // 3]
        own, _ = read(choice, len(context))
        assert own == pytest.approx(expected(reference, context, ids)[0], abs=1e-3)


@pytest.mark.parametrize("text", [text for _, text in PAIRS])
async def test_offsets_are_where_the_tokens_are_in_the_text(
    http: httpx2.AsyncClient, text: str
) -> None:
    body = {"prompt": text, "max_tokens": 4, "temperature": 0, "logprobs": 0, "echo": True}
    (choice,) = (await http.post("/v1/completions", json=body)).json()["choices"]
    whole, offsets = choice["text"], choice["logprobs"]["text_offset"]
    assert whole.startswith(text)
    assert offsets == sorted(offsets)
    for token, offset in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        assert whole.startswith(token, offset) or "\ufffd" in token


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 1.7, "top_p": 0.3, "seed": 3},
        {"frequency_penalty": 1.5, "presence_penalty": 1, "temperature": 0},
        {"logit_bias": {"28": -100, "30": 5}, "temperature": 0},
    ],
    ids=str,
)
async def test_logprobs_are_the_models_own_whatever_the_parameters_are(
    http: httpx2.AsyncClient,
    smollm2: LoadedModel,
    reference: PreTrainedModel,
    changed: dict[str, Any],
) -> None:
    prompt = smollm2.tokenizer.encode(PAIRS[0][0])
    body = {"prompt": prompt, "max_tokens": 8, "logprobs": 2} | changed
    (choice,) = (await http.post("/v1/completions", json=body)).json()["choices"]
    ids = smollm2.tokenizer.encode(choice["text"])
    own, _ = expected(reference, prompt, ids)
    assert len(ids) == 8
    assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(own, abs=1e-3)
