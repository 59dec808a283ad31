"""The path of a request through permits, validation and the engine, shared by all routes.

A route translates its body to a `GenerateRequest`, and the answer or the stream that it gets
here to its own JSON. The order is TGI's: a permit is taken before the request is validated.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from api.generation.merged import merged
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
    """A finished request: its completions, those of a `best_of` with the winner first.

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


class Run:
    """The generations of one request while they run.

    `request` is that of the first one. `timings` are set when all of them have ended.
    """

    timings: Timings

    def __init__(
        self,
        request: Request,
        generations: Sequence[Generation],
        observation: Observation,
        started: float,
    ) -> None:
        self.request = request
        self._generations = generations
        self._observation = observation
        self._started = started
        self._validated = time.perf_counter()
        self._ends: list[Finished] = []

    def deliveries(self) -> AsyncGenerator[list[tuple[int, Delivery]], None]:
        """Yield the deliveries that are pending together, each with its generation's number.

        The last delivery of a generation has its `Finished`. Raises GenerationFailed if one fails,
        after the tokens that came with the failure; so no delivery has a `Failed`.
        """
        return merged([self._of(generation) for generation in self._generations])

    def first_deliveries(self) -> AsyncGenerator[Delivery, None]:
        """Yield the deliveries of the first generation alone."""
        return self._of(self._generations[0])

    async def _of(self, generation: Generation) -> AsyncGenerator[Delivery, None]:
        async for delivery in generation.deliveries():
            tokens, end = delivery
            self._observation.tokens_generated(len(tokens))
            if isinstance(end, Failed):
                if tokens:
                    yield Delivery(tokens, None)
                raise GenerationFailed(end.message)
            if end is not None:
                self._ended(end)
            yield delivery
            if end is not None:
                return
        raise IncompleteStream

    def _ended(self, end: Finished) -> None:
        self._ends.append(end)
        if len(self._ends) == len(self._generations):
            self.timings = _timings(self._ends, self._started, self._validated)
            self._observation.finished(self._ends[0], self.timings)


class Inference:
    """Runs requests. Every method raises `REQUEST_ERRORS`, and however it ends, the permits are
    given back and the engine's sequences are freed.
    """

    def __init__(self, engine: AsyncEngine, validator: Validator, observer: Observer) -> None:
        self._engine = engine
        self._validator = validator
        self._observer = observer

    async def complete(
        self,
        body: GenerateRequest,
        caller: Caller,
        extras: Extras = NO_EXTRAS,
        *,
        logprobs: bool,
        n: int = 1,
    ) -> Answer:
        """Generate and return the completions when all are finished.

        There are `best_of` completions, or else `n`, which keep their order and have the seeds that
        follow one another. `logprobs` tells whether the answer shows logprobs or top tokens.
        """
        started = time.perf_counter()
        best_of = body.parameters.best_of or 1
        count = max(best_of, n)
        with self._observer.request(caller) as observation:
            self._validator.check_best_of(best_of)
            with self._engine.admit(count):
                request = await self._validator.validate(
                    body, extras, logprobs=logprobs or best_of > 1
                )
                observation.validated(request, count)
                validated = time.perf_counter()
                requests = _candidates(request, best_of) if best_of > 1 else _siblings(request, n)
                completions = await self._complete(requests, observation)
            prompt = completions[0].end.prompt
            if best_of > 1:
                completions = _ranked(completions)
            counted = completions[:1] if best_of > 1 else completions
            timings = _timings([output.end for output in counted], started, validated)
            observation.finished(completions[0].end, timings)
        return Answer(request, completions, prompt, timings)

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
        async with self.begin(body, caller, extras, logprobs=logprobs) as run:
            if on_validated is not None:
                on_validated(run.request)
            async with aclosing(run.first_deliveries()) as deliveries:
                async for delivery in deliveries:
                    yield delivery

    @asynccontextmanager
    async def begin(
        self,
        body: GenerateRequest,
        caller: Caller,
        extras: Extras = NO_EXTRAS,
        *,
        logprobs: bool,
        n: int = 1,
    ) -> AsyncIterator[Run]:
        """Check the request and start `n` generations of it, which share its prompt.

        With a seed, each of them has the one after that of the generation before it. Leaving the
        context ends those that still run.
        """
        started = time.perf_counter()
        with self._observer.request(caller) as observation, ExitStack() as running:
            self._validator.check_streamable(body.parameters)
            running.enter_context(self._engine.admit(n))
            request = await self._validator.validate(body, extras, logprobs=logprobs)
            observation.validated(request, n)
            generations = [
                running.enter_context(generation)
                for generation in self._engine.submit_all(_siblings(request, n))
            ]
            yield Run(request, generations, observation, started)

    async def _complete(
        self, requests: list[Request], observation: Observation
    ) -> list[CompletionOutput]:
        """Run all `requests` at the same time and collect one after the other."""
        with ExitStack() as running:
            generations = [
                running.enter_context(generation)
                for generation in self._engine.submit_all(requests)
            ]
            return [await _collect(generation, observation) for generation in generations]


def _ranked(completions: list[CompletionOutput]) -> list[CompletionOutput]:
    """Return the completions with the one that has the highest mean logprob first."""
    winner = max(range(len(completions)), key=lambda n: completions[n].mean_logprob)
    return [completions.pop(winner), *completions]


def _siblings(request: Request, n: int) -> list[Request]:
    """Return `request` and more like it, with the seeds that follow its own."""
    seed = request.sampling.seed
    return _forks(request, [(seed + k) % 2**64 for k in range(1, n)])


def _candidates(request: Request, best_of: int) -> list[Request]:
    """Return `request` and more like it, with random seeds."""
    return _forks(request, [random_seed() for _ in range(1, best_of)])


def _forks(request: Request, seeds: Sequence[int]) -> list[Request]:
    """Return `request` and one more like it for each of `seeds`."""
    others = (
        replace(
            request,
            request_id=f"{request.request_id}-{k}",
            sampling=replace(request.sampling, seed=seed),
            prompt_logprobs=False,  # the first one has them
        )
        for k, seed in enumerate(seeds, 1)
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


def _timings(ends: Sequence[Finished], started: float, validated: float) -> Timings:
    """Return the timings of the first of `ends`, with the tokens of all of them."""
    return Timings(
        total_s=time.perf_counter() - started,
        validation_s=validated - started,
        queue_s=ends[0].queue_s,
        inference_s=ends[0].inference_s,
        num_generated_tokens=sum(end.num_generated_tokens for end in ends),
    )
