"""The completions of all prompts as one stream: their chunks alternate as they are generated."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import orjson

from api.generation.merged import merged
from api.generation.request import GenerateRequest
from api.generation.state import AppState
from api.generation.streaming import stream_frames
from api.http import sse
<<<<<<< HEAD
from api.http.disconnect import cancel
from api.openai.errors import COMPLETION_ERRORS
=======
>>>>>>> chat
from api.openai.parameters import extras
from api.openai.payloads import (
    SYSTEM_FINGERPRINT,
    RunningUsage,
    created_and_model,
    total_usage,
)
from api.openai.requests import CompletionRequest
from api.openai.responses import CompletionChoice, Usage
from api.telemetry.observation import Caller
from engine.core.request import Finished, TokenOutput

Frames = AsyncGenerator[bytes, None]


async def completion_frames(
    state: AppState, body: CompletionRequest, requests: Sequence[GenerateRequest], caller: Caller
) -> Frames:
    """Yield the frames of all prompts. An error ends the part of its own prompt only."""
    encoder = ChunkEncoder(state)
    ends: list[Finished] = []
    parts = [
        _frames(state, body, request, caller, encoder, index, ends)
        for index, request in enumerate(requests)
    ]
    async with aclosing(merged(parts)) as pending:
        async for frames in pending:
            yield b"".join(frame for _, frame in frames)
    if body.includes_usage and len(ends) == len(requests):
        yield encoder.last_chunk([], total_usage(*ends))
    yield sse.DONE


def _frames(
    state: AppState,
    body: CompletionRequest,
    request: GenerateRequest,
    caller: Caller,
    encoder: "ChunkEncoder",
    index: int,
    ends: list[Finished],
) -> Frames:
    """Generate the completion of one prompt. Its end is added to `ends`, unless it fails."""
    running = RunningUsage() if body.has_usage_in_every_chunk else None
    stream = state.inference.stream(
        request,
        caller,
        extras(body, add_special_tokens=True),
        logprobs=False,
        on_validated=None if running is None else running.begin,
    )
    return stream_frames(stream, CompletionFrameWriter(encoder, index, running, ends))


class ChunkEncoder:
    """Encodes the chunks of all prompts. The parts that all of them repeat are encoded once.

    TGI has the keys of the last chunk in another order than those of the others.
    """

    def __init__(self, state: AppState) -> None:
        created, model = created_and_model(state)
        first = {"object": "text_completion", "id": "", "created": created}
        second = {"model": model, "system_fingerprint": SYSTEM_FINGERPRINT}
        self._head = b"data: " + orjson.dumps(first)[:-1]
        self._model = b"," + orjson.dumps(second)[1:-1]

    def chunk(self, choice: CompletionChoice, usage: Usage | None) -> bytes:
        usage_json = b"" if usage is None else b',"usage":' + orjson.dumps(usage)
        choices = b',"choices":' + orjson.dumps([choice])
        return self._head + choices + self._model + usage_json + b"}\n\n"

    def last_chunk(self, choices: list[CompletionChoice], usage: Usage) -> bytes:
        rest = {"choices": choices, "usage": usage}
        return self._head + self._model + b"," + orjson.dumps(rest)[1:] + b"\n\n"


class CompletionFrameWriter:
    """Writes the chunks of one prompt, and adds its end to `ends`."""

    def __init__(
        self,
        encoder: ChunkEncoder,
        index: int,
        running: RunningUsage | None,
        ends: list[Finished],
    ) -> None:
        self._encoder = encoder
        self._index = index
        self._running = running
        self._ends = ends

    def token(self, output: TokenOutput) -> bytes:
        usage = None if self._running is None else self._running.add_token()
        return self._encoder.chunk(self._choice(output, ""), usage)

    def last(self, output: TokenOutput, end: Finished) -> bytes:
        """Return the chunk with the finish reason, which TGI gives in its own words here."""
        self._ends.append(end)
        choice = self._choice(output, end.reason.value)
        return self._encoder.last_chunk([choice], total_usage(end))

    def error(self, problem: Exception) -> bytes:
        return COMPLETION_ERRORS.event(problem)

    def _choice(self, output: TokenOutput, reason: str) -> CompletionChoice:
        return {
            "index": self._index,
            "text": output.token.text,
            "logprobs": None,
            "finish_reason": reason,
        }
