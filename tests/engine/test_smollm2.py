"""The embedded default model answers as transformers does, in every mode of the engine."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.core.config import DEFAULT_MODEL_ID, LoadConfig
from engine.core.request import Finished, FinishReason, StoppingParams
from engine.loading.checkpoint import locate
from engine.loading.loader import LoadedModel, load
from tests.engine.driving import check_greedy, generate, greedy, make_engine, run

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n",
    "日本の首都は",
    "🙂🙃",
    "List three colours of the rainbow, one per line, and then explain in detail why " * 6,
]
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load(LoadConfig(DEFAULT_MODEL_ID))


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    """Return the model as transformers loads it, unchanged by the engine."""
    return AutoModelForCausalLM.from_pretrained(locate(DEFAULT_MODEL_ID).path, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(smollm2: LoadedModel) -> list[list[int]]:
    return [smollm2.tokenizer.encode(text) for text in PROMPTS]


def test_smollm2_alone_answers_as_generate(
    smollm2: LoadedModel, reference: PreTrainedModel, prompts: list[list[int]]
) -> None:
    engine = make_engine(smollm2)
    for prompt in prompts:
        request = greedy(prompt, NUM_TOKENS)
        answers = run(engine, [(0, request)])
        check_greedy(reference, answers, request)
        assert answers.ids(request) == generate(reference, prompt, NUM_TOKENS)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"max_sequences": 4}, id="company"),
        pytest.param({"max_batch_tokens": 11, "max_sequences": 6}, id="chunks"),
        pytest.param({"num_blocks": 14, "max_total_tokens": 200}, id="preemption"),
    ],
)
def test_smollm2_answers_the_same_in_a_batch(
    smollm2: LoadedModel,
    reference: PreTrainedModel,
    prompts: list[list[int]],
    config: dict[str, int],
) -> None:
    engine = make_engine(smollm2, **config)
    requests = [greedy(p, NUM_TOKENS) for p in [*prompts, prompts[-1]]]
    leaving = greedy(prompts[1], 100)
    arrivals = [(2 * i, r) for i, r in enumerate(requests)] + [(1, leaving)]
    answers = run(engine, arrivals, aborts={9: leaving})
    answers.check_endings(requests)
    for request in requests:
        check_greedy(reference, answers, request)
    if "num_blocks" in config:
        assert engine.figures().num_preemptions > 0
    else:
        assert engine.figures().num_prefix_hit_tokens > 0


def test_random_traffic_over_a_full_pool(
    smollm2: LoadedModel, reference: PreTrainedModel, prompts: list[list[int]]
) -> None:
    rng = random.Random(0)
    engine = make_engine(smollm2, num_blocks=16, max_batch_tokens=48, max_total_tokens=200)
    requests = [
        greedy(rng.choice(prompts)[: rng.randrange(1, 60)], rng.randrange(1, 24)) for _ in range(16)
    ]
    answers = run(engine, [(rng.randrange(30), r) for r in requests])
    answers.check_endings(requests)
    for request in requests:
        check_greedy(reference, answers, request)


@pytest.mark.parametrize(("start", "length"), [(2, 7), (3, 10), (11, 1), (20, 30)])
def test_smollm2_ends_with_the_token_that_completes_a_stop_string(
    smollm2: LoadedModel, start: int, length: int
) -> None:
    engine = make_engine(smollm2)
    whole = greedy(smollm2.tokenizer.encode("The capital of France is"), NUM_TOKENS)
    answers = run(engine, [(0, whole)])
    texts = [output.token.text for output in answers.tokens(whole)]
    stop = "".join(texts)[start : start + length]
    stopped = replace(
        whole, request_id="stopped", stopping=StoppingParams(NUM_TOKENS + 1, ("never", stop))
    )
    answers = run(engine, [(0, stopped)])
    num_taken = next(n for n in range(1, NUM_TOKENS + 1) if stop in "".join(texts[:n]))
    end = answers.last(stopped)
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.STOP_SEQUENCE
    assert end.generated_text == "".join(texts[:num_taken])
    assert end.text_before_stop == "".join(texts).split(stop)[0]
