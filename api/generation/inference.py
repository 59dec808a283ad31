"""The path of a request through permits, validation and the engine, shared by all routes.

A route translates its body to a `GenerateRequest`, and the answer or the stream that it gets
here to its own JSON. The order is TGI's: a permit is taken before the request is validated.
"""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

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
    Delivery,
    Failed,
    Finished,
    Request,
    Token,
    TokenOutput,
)


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """All tokens of one finished generation, and its end."""

    tokens: list[TokenOutput]
    end: Finished

    @property
    def mean_logprob(self) -> float:
        logprobs = (output.token.logprob for output in self.tokens)
        return sum(float("-inf") if p is None else p for p in logprobs) / len(self.tokens)


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished request: its completions, the one with the highest mean logprob first.

    `request` is the request that the engine got. `prompt` are its tokens if their logprobs were
    asked for, else it is empty.
    """

    request: Request
    completions: list[CompletionOutput]
    prompt: tuple[Token, ...]
    timings: Timings

    @property
    def best(self) -> CompletionOutput:
        return self.completions[0]


class Inference:
    """Runs requests. Every method raises `REQUEST_ERRORS`, and however it ends, the permits are
    given back and the engine's sequences are freed.
    """

    def __init__(self, engine: AsyncEngine, validator: Validator, observer: Observer) -> None:
        self._engine = engine
        self._validator = validator
        self._observer = observer

    async def complete(
        self, body: GenerateRequest, caller: Caller, extras: Extras = NO_EXTRAS, *, logprobs: bool
    ) -> Answer:
        """Generate `best_of` completions and return them when all are finished.

        `logprobs` tells whether the answer shows logprobs or top tokens.
        """
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
        self,
        body: GenerateRequest,
        caller: Caller,
        extras: Extras = NO_EXTRAS,
        *,
        logprobs: bool,
        on_validated: Callable[[Request], None] | None = None,
    ) -> AsyncGenerator[Delivery, None]:
        """Generate, and yield the tokens as they arrive; the last delivery has the `Finished`.

        A generation that fails raises GenerationFailed after its tokens, so no delivery has a
        `Failed`. Closing the generator ends the request. `on_validated` is called with the
        engine's request once that has passed its checks.
        """
        started = time.perf_counter()
        with self._observer.request(caller) as observation:
            self._validator.check_streamable(body.parameters)
            with self._engine.admit():
                request = await self._validator.validate(body, extras, logprobs=logprobs)
                observation.validated(request)
                if on_validated is not None:
                    on_validated(request)
                validated = time.perf_counter()
                with self._engine.submit(request) as generation:
                    async for delivery in generation.deliveries():
                        tokens, end = delivery
                        observation.tokens_generated(len(tokens))
                        if isinstance(end, Failed):
                            if tokens:
                                yield Delivery(tokens, None)
                            raise GenerationFailed(end.message)
                        if end is not None:
                            observation.finished(end, _timings(end, started, validated))
                        yield delivery
                        if end is not None:
                            return
            raise IncompleteStream

    async def _complete(
        self, request: Request, best_of: int, observation: Observation
    ) -> list[CompletionOutput]:
        """Run all `best_of` completions at the same time and collect one after the other."""
        with ExitStack() as running:
            generations = [
                running.enter_context(generation)
                for generation in self._engine.submit_all(_candidates(request, best_of))
            ]
            return [await _collect(generation, observation) for generation in generations]


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


async def _collect(generation: Generation, observation: Observation) -> CompletionOutput:
    outputs: list[TokenOutput] = []
    async for tokens, end in generation.deliveries():
        observation.tokens_generated(len(tokens))
        outputs += tokens
        match end:
            case Finished():
                return CompletionOutput(outputs, end)
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
