"""The completions of all prompts as one stream: their chunks alternate as they are generated."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing

import orjson

from api.generation.inference import Run
from api.generation.merged import merged
from api.generation.state import AppState
from api.http import sse
from api.http.errors import REQUEST_ERRORS
from api.openai.completion_choice import LogprobsWriter
from api.openai.completion_prompt import CompletionPrompt
from api.openai.errors import COMPLETION_ERRORS
from api.openai.payloads import completion_head, finish_reason, usage
from api.openai.requests import CompletionRequest
from api.openai.responses import Completion, CompletionChoice, Usage
from api.telemetry.observation import Caller
from engine.core.request import Delivery, Finished, TokenOutput
from engine.core.stop_text import StopText

Frames = AsyncGenerator[bytes, None]


async def completion_frames(
    state: AppState, body: CompletionRequest, prompts: Sequence[CompletionPrompt], caller: Caller
) -> Frames:
    """Yield an empty frame when all prompts are admitted, then the chunks of all choices.

    An error ends the stream: it is the last event before `[DONE]`. Raises `REQUEST_ERRORS` before
    the first frame.
    """
    async with AsyncExitStack() as running:
        runs = [
            await running.enter_async_context(
                state.inference.begin(
                    prompt.request,
                    caller,
                    prompt.extras,
                    logprobs=body.logprobs is not None,
                    n=body.n or 1,
                )
            )
            for prompt in prompts
        ]
        yield b""
        writer = CompletionWriter(state, body, prompts, runs)
        try:
            async with aclosing(merged([run.deliveries() for run in runs])) as pending:
                async for deliveries in pending:
                    yield b"".join(
                        writer.chunks(prompt, number, delivery)
                        for prompt, numbered in deliveries
                        for number, delivery in numbered
                    )
            if body.includes_usage:
                yield writer.usage_chunk()
        except REQUEST_ERRORS as problem:
            yield COMPLETION_ERRORS.event(problem)
    yield sse.DONE


async def whole_frames(body: CompletionRequest, completion: Completion) -> Frames:
    """Yield an answer that is complete as a stream: a chunk for each choice."""
    usage_key = {"usage": None} if body.includes_usage else {}
    head = {key: value for key, value in completion.items() if key not in ("choices", "usage")}
    for choice in completion["choices"]:
        yield sse.event(head | {"choices": [choice]} | usage_key)
    if body.includes_usage:
        yield sse.event(head | {"choices": [], "usage": completion["usage"]})
    yield sse.DONE


class CompletionWriter:
    """Writes the chunks of all choices, and counts the usage. The part that all chunks repeat is
    encoded once.
    """

    def __init__(
        self,
        state: AppState,
        body: CompletionRequest,
        prompts: Sequence[CompletionPrompt],
        runs: Sequence[Run],
    ) -> None:
        self._head = b"data: " + orjson.dumps(completion_head(state))[:-1]
        self._body = body
        self._n = body.n or 1
        self._choices = [
            ChoiceWriter(body, prompt, prompt_index * self._n + number)
            for prompt_index, prompt in enumerate(prompts)
            for number in range(self._n)
        ]
        self._num_prompt_tokens = sum(len(run.request.prompt_ids) for run in runs)
        self._num_generated_tokens = 0

    def chunks(self, prompt: int, number: int, delivery: Delivery) -> bytes:
        """Return the chunks of a delivery to choice `number` of the prompt with that index."""
        choices = self._choices[prompt * self._n + number].parts(delivery)
        return b"".join(self._counted(choice) for choice in choices)

    def usage_chunk(self) -> bytes:
        """Return the last chunk, which has no choices."""
        return self._chunk([], self._usage())

    def _counted(self, choice: CompletionChoice) -> bytes:
        self._num_generated_tokens += 1
        return self._chunk([choice], self._running_usage())

    def _usage(self) -> Usage:
        return usage(self._num_prompt_tokens, self._num_generated_tokens)

    def _running_usage(self) -> Usage | None:
        return self._usage() if self._body.has_usage_in_every_chunk else None

    def _chunk(self, choices: list[CompletionChoice], counted: Usage | None) -> bytes:
        """Return a chunk. Its usage is null if there will be one, and absent if there will not."""
        rest: dict[str, object] = {"choices": choices}
        if counted is not None or self._body.includes_usage:
            rest["usage"] = counted
        encoded = orjson.dumps(rest, option=orjson.OPT_SERIALIZE_NUMPY)
        return self._head + b"," + encoded[1:] + b"\n\n"


class ChoiceWriter:
    """Writes the parts of one choice, one for each token. Text that could become a stop string is
    held back.
    """

    def __init__(self, body: CompletionRequest, prompt: CompletionPrompt, index: int) -> None:
        self._index = index
        self._stop = StopText(body.stop)
        self._text = prompt.echo  # not yet written
        self._logprobs = (
            None if body.logprobs is None else LogprobsWriter(body.logprobs, prompt.echo)
        )

    def parts(self, delivery: Delivery) -> list[CompletionChoice]:
        parts = [self._part(output) for output in delivery.tokens]
        if isinstance(delivery.end, Finished):
            parts[-1]["text"] += self._stop.flush()
            parts[-1]["finish_reason"] = finish_reason(delivery.end)
        return parts

    def _part(self, output: TokenOutput) -> CompletionChoice:
        text = self._text + self._stop.push(output.token.text, output.token.special)
        self._text = ""
        logprobs = None if self._logprobs is None else self._logprobs.generated([output])
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": None,
        }
