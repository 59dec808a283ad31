"""The logprobs of a prompt's tokens, and of the alternatives at each position: the model's own,
however the prompt is computed.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.core.request import Finished, Request, SamplingParams
from engine.core.scheduler import PROMPT_LOGPROB_ROWS
from kernels.ops import TRITON
from tests.engine.driving import Answers, check_greedy, greedy, make_engine, run
from tests.engine.models import FAMILIES, VOCAB_SIZE, byte_tokenizer, family, prepared, reference
from tests.engine.test_failures import sabotage

FAST = ("llama",)
families = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES],
)


@torch.inference_mode()
def prompt_logprobs(name: str, prompt: list[int], **options: object) -> torch.Tensor:
    """Return the model's own logprobs behind each prompt token, [tokens, vocab_size]."""
    model = reference(name, **options)
    logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def asking(request: Request, num_top: int = 2) -> Request:
    return replace(request, prompt_logprobs=True, prompt_top_tokens=num_top)


def check_logprobs(name: str, answers: Answers, request: Request, **options: object) -> None:
    """Check the prompt's own tokens, logprobs and alternatives, of which the first has none."""
    finished = answers.last(request)
    assert isinstance(finished, Finished)
    assert [token.id for token in finished.prompt] == request.prompt_ids
    assert finished.prompt[0].logprob is None
    own, n = prompt_logprobs(name, request.prompt_ids, **options), len(request.prompt_ids)
    expected = own[torch.arange(n - 1), request.prompt_ids[1:]].tolist()
    assert [token.logprob for token in finished.prompt[1:]] == pytest.approx(expected, abs=1e-4)
    if not request.prompt_top_tokens:
        assert finished.prompt_top_tokens == ()
        return
    first, *others = finished.prompt_top_tokens
    assert first == ()
    for tokens, row in zip(others, own[:-1], strict=True):
        best = row.sort(descending=True).values[: len(tokens)].tolist()
        assert len(tokens) >= request.prompt_top_tokens
        assert [token.logprob for token in tokens] == pytest.approx(best, abs=1e-4)
        assert row[[token.id for token in tokens]].tolist() == pytest.approx(best, abs=1e-4)


def check_prompt(name: str, answers: Answers, request: Request) -> None:
    """Check what is said of the prompt; and that the answer is the model's."""
    check_logprobs(name, answers, request)
    check_greedy(reference(name), answers, request)


def prompt(num_tokens: int, stem: int = 0) -> list[int]:
    return [(5 * i + 31 * stem + i * i) % 256 for i in range(num_tokens)]


@families
@pytest.mark.parametrize(
    ("num_tokens", "num_top"), [(1, 3), (2, 0), (2, 1), (16, 5), (17, 20), (100, 2)]
)
def test_a_prompts_logprobs_are_the_models_own(name: str, num_tokens: int, num_top: int) -> None:
    request = asking(greedy(prompt(num_tokens), 4), num_top)
    check_prompt(name, run(make_engine(family(name)), [(0, request)]), request)


def test_a_prompt_token_has_its_text_and_whether_it_is_special() -> None:
    request = asking(greedy([256, *byte_tokenizer().encode("Hello")], 2), VOCAB_SIZE)
    finished = run(make_engine(family("llama")), [(0, request)]).last(request)
    assert isinstance(finished, Finished)
    assert "".join(token.text for token in finished.prompt) == "<s>Hello"
    assert [token.special for token in finished.prompt] == [True] + [False] * 5
    for tokens in finished.prompt_top_tokens[1:]:
        own = {token.id: (token.text, token.special) for token in tokens}
        assert len(own) == len(tokens) == VOCAB_SIZE
        assert own[256] == ("<s>", True)
        assert own[request.prompt_ids[1]] == ("H", False)


def test_requests_without_prompt_logprobs_get_none() -> None:
    plain = greedy(prompt(20), 2)
    requests = [plain, replace(plain, request_id="top", prompt_top_tokens=3)]
    answers = run(make_engine(family("llama")), [(0, r) for r in requests])
    for request in requests:
        finished = answers.last(request)
        assert isinstance(finished, Finished)
        assert finished.prompt == ()
        assert finished.prompt_top_tokens == ()


@families
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"max_batch_tokens": 512}, id="company"),
        pytest.param({"max_batch_tokens": 13}, id="chunks"),
        pytest.param({"num_blocks": 20, "max_total_tokens": 240}, id="preemption"),
    ],
)
@pytest.mark.slow
def test_several_requests_for_prompt_logprobs_run_beside_ordinary_ones(
    name: str, config: dict[str, object]
) -> None:
    """More rows than a step keeps of them, all together."""
    engine = make_engine(family(name), **config)
    lengths = 200, 90, 33, 1
    asked = [asking(greedy(prompt(n, stem), 20), 3 * stem) for stem, n in enumerate(lengths)]
    others = [greedy(prompt(n, 7), 12) for n in (50, 3, 50)]
    assert sum(len(request.prompt_ids) for request in asked) > PROMPT_LOGPROB_ROWS
    answers = run(engine, [(i, r) for i, r in enumerate([*others[:1], *asked, *others[1:]])])
    answers.check_endings([*asked, *others])
    for request in asked:
        check_prompt(name, answers, request)
    for request in others:
        check_greedy(reference(name), answers, request)
    if "num_blocks" in config:
        assert engine.figures().num_preemptions > 0


def test_a_prompt_longer_than_a_steps_rows_gets_all_logprobs() -> None:
    loaded = prepared("llama", max_position_embeddings=1024)
    engine = make_engine(loaded, max_batch_tokens=1000)
    request = asking(greedy(prompt(2 * PROMPT_LOGPROB_ROWS + 10), 2))
    check_logprobs("llama", run(engine, [(0, request)]), request, max_position_embeddings=1024)


@pytest.mark.slow
@pytest.mark.parametrize("num_top", [0, 4])
def test_the_kernels_give_the_models_own_logprobs_too(num_top: int) -> None:
    engine = make_engine(prepared("llama", TRITON, num_hidden_layers=1), max_batch_tokens=16)
    asked = [asking(greedy(prompt(n, n), 2), num_top) for n in (20, 9)]
    answers = run(engine, [(0, r) for r in [*asked, greedy(prompt(5), 6)]])
    for request in asked:
        check_logprobs("llama", answers, request, num_hidden_layers=1)


def test_prefix_hits_are_not_used_for_prompt_logprobs() -> None:
    engine = make_engine(family("llama"))
    first, again = greedy(prompt(50), 2), asking(greedy(prompt(50), 2))
    answers = run(engine, [(0, first), (6, again)])
    check_prompt("llama", answers, again)
    assert engine.figures().num_prefix_hit_tokens == 0


@pytest.mark.parametrize("step", range(5))
def test_a_lost_step_loses_no_prompt_logprobs(step: int) -> None:
    engine = make_engine(family("llama"), max_batch_tokens=16)
    sabotage(engine, lambda _: engine.num_steps == step, ValueError("once"))
    requests = [asking(greedy(prompt(40, stem), 4), 1 + stem) for stem in range(2)]
    answers = run(engine, [(0, greedy([1], 20)), *((0, r) for r in requests)])
    for request in requests:
        check_prompt("llama", answers, request)


def test_a_request_with_forks_gives_prompt_logprobs() -> None:
    leader = asking(greedy(prompt(40), 6))
    forks = [greedy(prompt(40), 6), asking(greedy(prompt(40), 6))]
    answers = run(make_engine(family("llama")), [(0, [leader, *forks])])
    check_prompt("llama", answers, leader)
    check_prompt("llama", answers, forks[1])
    check_greedy(reference("llama"), answers, forks[0])


@pytest.mark.parametrize(
    "make",
    [
        SamplingParams,
        lambda **k: SamplingParams(watermark=True, **k),
        lambda **k: SamplingParams(logit_bias=((3, 50.0),), top_n_tokens=1, **k),
    ],
)
def test_sampling_parameters_do_not_change_prompt_logprobs(
    make: Callable[..., SamplingParams],
) -> None:
    sampling = make(do_sample=True, seed=3, temperature=0.3, repetition_penalty=2.0)
    request = replace(asking(greedy(prompt(30), 4)), sampling=sampling)
    check_logprobs("llama", run(make_engine(family("llama")), [(0, request)]), request)
