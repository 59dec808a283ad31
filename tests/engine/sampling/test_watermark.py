"""A watermark changes the choice of tokens so that a detector that knows the hash finds it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from engine.core.request import Request, SamplingParams, StoppingParams
from kernels.watermark import green_list
from tests.engine.driving import Answers, check_greedy, greedy, make_engine, run
from tests.engine.models import VOCAB_SIZE, family, reference
from tests.engine.test_failures import sabotage

GAMMA = 0.5
PROMPTS = [list(range(n, 2 * n + 3)) for n in (1, 16, 29)]
KINDS = [
    SamplingParams(logprobs=True),
    SamplingParams(do_sample=True, seed=4, temperature=0.7, logprobs=True),
    SamplingParams(do_sample=True, seed=5, top_p=0.9, repetition_penalty=1.2, logprobs=True),
]


def requests(num_tokens: int, watermark: bool = True) -> list[Request]:
    return [
        Request(
            f"{i}-{j}",
            prompt,
            replace(kind, watermark=watermark),
            StoppingParams(num_tokens, ignore_eos=True),
        )
        for i, prompt in enumerate(PROMPTS)
        for j, kind in enumerate(KINDS)
    ]


def z_score(request: Request, answers: Answers) -> float:
    """Return by how many standard deviations the text has more green tokens than chance gives."""
    ids = [request.prompt_ids[-1], *answers.ids(request)]
    pairs = list(pairwise(ids))
    green = green_list(torch.tensor([before for before, _ in pairs]), GAMMA, VOCAB_SIZE)
    count = sum(bool(green[i, after]) for i, (_, after) in enumerate(pairs))
    return (count - GAMMA * len(pairs)) / (len(pairs) * GAMMA * (1 - GAMMA)) ** 0.5


@pytest.mark.slow
def test_sixty_tokens_are_enough_to_detect_the_watermark() -> None:
    """The tokens are sampled, because tiny models repeat themselves when greedy."""
    engine = make_engine(family("llama"), watermark=(GAMMA, 4.0))
    marked, plain = requests(60), requests(60, watermark=False)
    with_it, without = (run(engine, [(0, r) for r in rs]) for rs in (marked, plain))
    for request in marked:
        assert z_score(request, with_it) > 4
    scores = [z_score(request, without) for request in plain if request.sampling.do_sample]
    assert abs(sum(scores) / len(scores)) < 2


def test_a_greedy_watermarked_token_is_the_best_of_the_raised_scores() -> None:
    gamma, delta = 0.25, 3.0
    engine = make_engine(family("llama"), watermark=(gamma, delta))
    request = greedy(PROMPTS[1], 12, watermark=True)
    ids = run(engine, [(0, request)]).ids(request)
    for i, token_id in enumerate(ids):
        tokens = [*request.prompt_ids, *ids[:i]]
        with torch.inference_mode():
            logits = reference("llama")(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        green = green_list(torch.tensor(tokens[-1:]), gamma, VOCAB_SIZE)[0]
        raised = logits + green * delta
        assert raised[token_id] > raised.max() - 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="in a batch"),
        pytest.param({"max_batch_tokens": 9, "max_sequences": 6}, id="chunks"),
        pytest.param({"num_blocks": 9, "max_total_tokens": 128}, id="preemption"),
    ],
)
def test_watermarked_tokens_are_the_same_alone_and_in_a_batch(config: dict[str, object]) -> None:
    """The previous token may be only on the device, in the prompt, or computed again."""
    marked = requests(20)
    plain = greedy(PROMPTS[2], 20)
    engine = make_engine(family("llama"), **config)
    together = run(engine, [(i, r) for i, r in enumerate([plain, *marked])])
    for request in marked:
        alone = run(make_engine(family("llama")), [(0, request)])
        assert together.ids(request) == alone.ids(request)
        assert together.logprobs(request) == pytest.approx(alone.logprobs(request), abs=1e-4)
    check_greedy(reference("llama"), together, plain)


def test_a_step_that_failed_changes_no_watermarked_token() -> None:
    marked = requests(12)
    whole = run(make_engine(family("llama")), [(0, r) for r in marked])
    engine = make_engine(family("llama"))
    sabotage(engine, lambda _: engine.num_steps in {1, 6}, ValueError("once"))
    answers = run(engine, [(0, r) for r in marked])
    assert [answers.ids(r) for r in marked] == [whole.ids(r) for r in marked]
