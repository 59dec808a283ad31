"""An untrained model that follows grammars, for tests of guided decoding.

Its weights are random, so its scores are nearly equal: any token that a mask allows is drawn.
"""

from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig

from engine.core.config import DEFAULT_MODEL_ID
from engine.core.request import (
    Finished,
    Request,
    SamplingParams,
    StoppingParams,
)
from engine.engine import Engine
from engine.loading.checkpoint import Checkpoint, locate
from engine.loading.loader import LoadedModel, prepare_model
from engine.text.grammar import (
    Grammar,
    GrammarCompiler,
)
from engine.text.tokenizer import Tokenizer
from tests.engine.driving import Answers, make_engine, run
from tests.engine.models import build
from tests.engine.text.schemas import SCHEMAS, every

VOCAB_SIZE = 49152
SAMPLED = SamplingParams(do_sample=True, seed=1, logprobs=True)
GREEDY = SamplingParams(logprobs=True)
_numbers = count()


@cache
def tokenizer() -> Tokenizer:
    path = locate(DEFAULT_MODEL_ID).path
    return Tokenizer(AutoTokenizer.from_pretrained(path, truncation_side="left"))


@cache
def loaded() -> LoadedModel:
    """An untrained model with the embedded model's vocabulary."""
    model = build(
        LlamaConfig,
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    return prepare_model(model, tokenizer(), Checkpoint(Path("/nowhere"), "tiny-guided"))


@cache
def compiler() -> GrammarCompiler:
    return make_engine(loaded()).grammars


def engine(**config: object) -> Engine:
    return make_engine(loaded(), **({"num_blocks": 512} | config))


def request(
    grammar: Grammar | None,
    sampling: SamplingParams = SAMPLED,
    prompt: str = "Say something:",
    max_new_tokens: int = 1000,
    **stopping: Any,
) -> Request:
    return Request(
        f"request-{next(_numbers)}",
        tokenizer().encode(prompt),
        sampling,
        StoppingParams(max_new_tokens, **stopping),
        grammar=grammar,
    )


def json_request(schema: dict[str, Any], **options: Any) -> Request:
    return request(compiler().json_schema(schema), **options)


def regex_request(pattern: str, **options: Any) -> Request:
    return request(compiler().regex(pattern), **options)


def text(answers: Answers, request: Request) -> str:
    finished = answers.last(request)
    assert isinstance(finished, Finished), finished
    return finished.generated_text


def say(request: Request, **config: object) -> str:
    return text(run(engine(**config), [(0, request)]), request)


def seeded(seed: int) -> SamplingParams:
    return replace(SAMPLED, seed=seed)


FREE = SamplingParams(do_sample=True, seed=99)
HOSTILE = "[0-9]{40}((a{1,1000}){1,1000}){1,1000}"
"""It compiles, since its digits can be followed."""
ORDER, LONG_KEYS = SCHEMAS["order"], SCHEMAS["long keys"]
FORCING = every(
    a_constant_with_a_long_name={"const": "whose value is a long sentence, said at once"},
    number={"type": "integer", "minimum": 0, "maximum": 99},
    another_constant={"const": "and so is this one, in the middle of an answer"},
)


@cache
def guided_requests(sampling: SamplingParams = GREEDY) -> list[Request]:
    schemas = [FORCING, ORDER, LONG_KEYS, SCHEMAS["person"], SCHEMAS["enum of unicode"]]
    return [json_request(s, sampling=replace(sampling, seed=i)) for i, s in enumerate(schemas)]


@cache
def free_request(sampling: SamplingParams) -> Request:
    return request(None, sampling, max_new_tokens=40, ignore_eos=True)


KINDS = [GREEDY, SAMPLED, replace(SAMPLED, repetition_penalty=1.5, presence_penalty=0.7)]
slow = pytest.mark.slow
kinds = pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(KINDS[0], id="greedy"),
        pytest.param(KINDS[1], id="sampled", marks=slow),
        pytest.param(KINDS[2], id="penalties", marks=slow),
    ],
)
_alone: dict[str, Answers] = {}


def check_same(answers: Answers, requests: list[Request]) -> None:
    """Check that each request gets the same answer as alone."""
    answers.check_endings(requests)
    for r in requests:
        if r.request_id not in _alone:
            _alone[r.request_id] = run(engine(), [(0, r)])
        expected = _alone[r.request_id]
        assert answers.ids(r) == expected.ids(r)
        assert answers.logprobs(r) == pytest.approx(expected.logprobs(r), abs=1e-4)
        assert text(answers, r) == text(expected, r)
