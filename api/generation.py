"""From an engine request to its finished generations, for routes that answer at once."""

from contextlib import ExitStack
from dataclasses import dataclass, replace

from api.errors import GenerationFailed, IncompleteGeneration
from api.validation import random_seed
from engine.async_engine import AsyncEngine, Generation
from engine.request import Failed, Finished, Request, TokenOutput


@dataclass(frozen=True, slots=True)
class Completion:
    outputs: list[TokenOutput]
    end: Finished

    @property
    def mean_logprob(self) -> float:
        logprobs = (output.token.logprob for output in self.outputs)
        return sum(float("-inf") if p is None else p for p in logprobs) / len(self.outputs)


async def complete(engine: AsyncEngine, request: Request, best_of: int) -> list[Completion]:
    """`best_of` independent completions, the one of the highest mean logprob first.

    They run at the same time; they are only collected one after the other.
    """
    with ExitStack() as running:
        generations = [
            running.enter_context(engine.submit(candidate))
            for candidate in _candidates(request, best_of)
        ]
        completions = [await _collect(generation) for generation in generations]
    winner = max(range(best_of), key=lambda n: completions[n].mean_logprob)
    return [completions.pop(winner), *completions]


def _candidates(request: Request, best_of: int) -> list[Request]:
    others = (
        replace(
            request,
            request_id=f"{request.request_id}-{n}",
            sampling=replace(request.sampling, seed=random_seed()),
        )
        for n in range(1, best_of)
    )
    return [request, *others]


async def _collect(generation: Generation) -> Completion:
    outputs: list[TokenOutput] = []
    end: Finished | None = None
    async for events in generation.events():
        for event in events:
            match event:
                case TokenOutput():
                    outputs.append(event)
                case Finished():
                    end = event
                case Failed(message):
                    raise GenerationFailed(message)
    if end is None:
        raise IncompleteGeneration
    return Completion(outputs, end)
