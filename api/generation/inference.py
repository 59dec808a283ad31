"""A request's way through permits, checks and the engine, the same for every route.

A route translates its body to a `GenerateRequest`, and what comes out of here to its
own JSON. The order is TGI's: a permit is taken before anything is validated.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import cast

from api.generation.request import GenerateRequest
from api.generation.validation import (
    NO_EXTRAS,
    Extras,
    Validator,
    random_seed,
)
from api.http.errors import GenerationFailed, IncompleteGeneration, IncompleteStream
from api.telemetry.observation import (
    Caller,
    Observation,
    Observer,
    Timings,
)
from engine.async_engine import AsyncEngine, Generation
from engine.core.request import (
    Event,
    Failed,
    Finished,
    Request,
    Token,
    TokenOutput,
)


@dataclass(frozen=True, slots=True)
class Completion:
    outputs: list[TokenOutput]
    end: Finished

    @property
    def mean_logprob(self) -> float:
        logprobs = (output.token.logprob for output in self.outputs)
        return sum(float("-inf") if p is None else p for p in logprobs) / len(self.outputs)


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished request: its completions, the one of the highest mean logprob first.

    `request` is what the engine was asked, `prompt` its tokens if their logprobs were asked for.
    """

    request: Request
    completions: list[Completion]
    prompt: tuple[Token, ...]
    timings: Timings

    @property
    def best(self) -> Completion:
        return self.completions[0]


class Inference:
    """Every method raises the errors of `REQUEST_ERRORS`, and leaves nothing behind."""

    def __init__(self, engine: AsyncEngine, validator: Validator, observer: Observer) -> None:
        self._engine = engine
        self._validator = validator
        self._observer = observer

    async def complete(
        self, body: GenerateRequest, caller: Caller, extras: Extras = NO_EXTRAS, *, logprobs: bool
    ) -> Answer:
        """`logprobs`: whether the answer shows them, or top tokens."""
        started = time.perf_counter()
        best_of = body.parameters.best_of or 1
        with self._observer.request(caller) as observation:
            self._validator.check_best_of(best_of)
            with self._engine.admit(best_of):
                request = await self._validator.validate(
                    body, extras, logprobs=logprobs or best_of > 1
                )
                observation.validated(request, best_of)
                validated = time.perf_counter()
                completions = await self._complete(request, best_of, observation)
            prompt = completions[0].end.prompt
            winner = max(range(best_of), key=lambda n: completions[n].mean_logprob)
            ranked = [completions.pop(winner), *completions]
            timings = _timings(ranked[0].end, started, validated)
            observation.finished(ranked[0].end, timings)
        return Answer(request, ranked, prompt, timings)

    async def stream(
        self, body: GenerateRequest, caller: Caller, extras: Extras = NO_EXTRAS, *, logprobs: bool
    ) -> AsyncGenerator[list[Event], None]:
        """What is pending at a time, never nothing: tokens, and the last list ends with the
        `Finished`. Closing the generator ends the request.
        """
        started = time.perf_counter()
        with self._observer.request(caller) as observation:
            self._validator.check_streamable(body.parameters)
            with self._engine.admit():
                request = await self._validator.validate(body, extras, logprobs=logprobs)
                observation.validated(request)
                validated = time.perf_counter()
                with self._engine.submit(request) as generation:
                    async for events in generation.events():
                        end = events[-1]
                        observation.tokens_generated(_num_tokens(events))
                        if isinstance(end, Finished):
                            observation.finished(end, _timings(end, started, validated))
                        if isinstance(end, Failed):
                            if len(events) > 1:
                                yield events[:-1]
                            raise GenerationFailed(end.message)
                        yield events
                        if isinstance(end, Finished):
                            return
            raise IncompleteStream

    async def _complete(
        self, request: Request, best_of: int, observation: Observation
    ) -> list[Completion]:
        """They run at the same time; they are only collected one after the other."""
        with ExitStack() as running:
            generations = [
                running.enter_context(generation)
                for generation in self._engine.submit_all(_candidates(request, best_of))
            ]
            return [await _collect(generation, observation) for generation in generations]


def split_end(events: list[Event]) -> tuple[list[TokenOutput], Finished | None]:
    """The tokens of a stream's list, and its end if it has one."""
    end = events[-1]
    if isinstance(end, Finished):
        return cast(list[TokenOutput], events[:-1]), end
    return cast(list[TokenOutput], events), None


def _num_tokens(events: list[Event]) -> int:
    """All but the last one are tokens."""
    return len(events) - (not isinstance(events[-1], TokenOutput))


def _candidates(request: Request, best_of: int) -> list[Request]:
    others = (
        replace(
            request,
            request_id=f"{request.request_id}-{n}",
            sampling=replace(request.sampling, seed=random_seed()),
            prompt_logprobs=False,  # the first one has them
        )
        for n in range(1, best_of)
    )
    return [request, *others]


async def _collect(generation: Generation, observation: Observation) -> Completion:
    outputs: list[TokenOutput] = []
    async for events in generation.events():
        observation.tokens_generated(_num_tokens(events))
        for event in events:
            match event:
                case TokenOutput():
                    outputs.append(event)
                case Finished():
                    return Completion(outputs, event)
                case Failed(message):
                    raise GenerationFailed(message)
    raise IncompleteGeneration


def _timings(end: Finished, started: float, validated: float) -> Timings:
    return Timings(
        total_s=time.perf_counter() - started,
        validation_s=validated - started,
        queue_s=end.queue_s,
        inference_s=end.inference_s,
        num_generated_tokens=end.num_generated_tokens,
    )
