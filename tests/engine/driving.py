"""Runs an engine step by step, and compares it with transformers as the reference."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from engine.core.config import EngineConfig
from engine.core.request import (
    Event,
    Failed,
    Finished,
    Request,
    SamplingParams,
    StoppingParams,
    TokenOutput,
)
from engine.engine import Engine
from engine.loading.loader import LoadedModel
from engine.loading.probe import use_attention

LOGPROB_TOLERANCE = 1e-4

_numbers = count()


def make_engine(loaded: LoadedModel, **config: object) -> Engine:
    settings = {"max_sequences": 8, "max_batch_tokens": 64, "num_blocks": 128} | config
    return Engine(loaded, EngineConfig(**settings))  # type: ignore[arg-type]


def greedy(prompt: Iterable[int], num_tokens: int, **sampling: object) -> Request:
    return Request(
        request_id=f"request-{next(_numbers)}",
        prompt_ids=list(prompt),
        sampling=SamplingParams(logprobs=True, **sampling),  # type: ignore[arg-type]
        stopping=StoppingParams(num_tokens, ignore_eos=True),
    )


@dataclass
class Answers:
    """Every event of every request, by request id."""

    events: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))

    def tokens(self, request: Request) -> list[TokenOutput]:
        return [e for e in self.events[request.request_id] if isinstance(e, TokenOutput)]

    def ids(self, request: Request) -> list[int]:
        return [output.token.id for output in self.tokens(request)]

    def logprobs(self, request: Request) -> list[float | None]:
        return [output.token.logprob for output in self.tokens(request)]

    def last(self, request: Request) -> Event:
        return self.events[request.request_id][-1]

    def check_endings(self, requests: Iterable[Request]) -> None:
        """Check that each request ends with exactly one Finished or Failed."""
        for request in requests:
            events = self.events[request.request_id]
            endings = [e for e in events if isinstance(e, Finished | Failed)]
            assert endings == events[-1:], request.request_id


def run(
    engine: Engine,
    arrivals: Iterable[tuple[int, Request | list[Request]]],
    aborts: dict[int, Request] | None = None,
) -> Answers:
    """Step until no request is left. Requests arrive and are aborted at given step numbers.

    A list of requests is a request and its forks.
    """
    answers, pending, aborts = Answers(), sorted(arrivals, key=lambda a: a[0]), aborts or {}
    for step in count():
        while pending and pending[0][0] <= step:
            arrived = pending.pop(0)[1]
            first, *forks = arrived if isinstance(arrived, list) else [arrived]
            engine.add(first, forks)
        if step in aborts:
            engine.abort(aborts[step].request_id)
        if not engine.has_work and not pending:
            return answers
        for request_id, event in engine.step():
            answers.events[request_id].append(event)
        engine.scheduler.check_integrity()
        if step == 10_000:
            break
    raise AssertionError("no progress")


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    previous = model.config._attn_implementation
    use_attention(model, "eager")
    try:
        yield
    finally:
        use_attention(model, previous)


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Return what transformers' own greedy `generate` adds, with the model's eager attention."""
    untyped: Any = model  # PreTrainedModel does not declare `generate`, each model's class has it
    with own_attention(model):
        result = untyped.generate(
            torch.tensor([prompt], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=model.device),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    output_ids: list[int] = result[0, len(prompt) :].tolist()
    return output_ids


@torch.inference_mode()
def own_logprobs(model: PreTrainedModel, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Return the model's own log-probabilities at each token of `output`, [tokens, vocab]."""
    with own_attention(model):
        ids = torch.tensor([prompt + output], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


def check_greedy(
    model: PreTrainedModel,
    answers: Answers,
    request: Request,
    tolerance: float = LOGPROB_TOLERANCE,
) -> None:
    """Check that each token is the model's own most likely one, with its own logprob.

    If the model's two most likely tokens are closer than the tolerance, either is accepted.
    """
    ids, logprobs = answers.ids(request), answers.logprobs(request)
    assert len(ids) == request.stopping.max_new_tokens
    own = own_logprobs(model, request.prompt_ids, ids)
    chosen = own[torch.arange(len(ids)), ids]
    assert (own.max(-1).values - chosen).max() < tolerance
    assert logprobs == pytest.approx(chosen.tolist(), abs=tolerance)
