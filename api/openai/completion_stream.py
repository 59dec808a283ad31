"""Completions as one stream: the prompts' chunks between each other, as they come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import orjson

from api.generation.inference import split_end
from api.generation.request import GenerateRequest
from api.generation.state import AppState
from api.http import sse
from api.http.disconnect import cancel
from api.http.errors import REQUEST_ERRORS
from api.openai.parameters import extras
from api.openai.payloads import (
    SYSTEM_FINGERPRINT,
    envelope,
    error_event,
    usage,
)
from api.openai.requests import CompletionRequest
from api.openai.responses import CompletionChoice, Usage
from api.openai.running_usage import RunningUsage, running_usage
from api.telemetry.observation import Caller
from engine.core.request import Finished, TokenOutput

Frames = AsyncGenerator[bytes, None]


async def completion_frames(
    state: AppState, body: CompletionRequest, requests: Sequence[GenerateRequest], caller: Caller
) -> Frames:
    """An error ends its own prompt's part alone; [DONE] ends all."""
    wire = Wire(state)
    ends: list[Finished] = []
    parts = [
        _frames(state, body, request, caller, Chunks(wire, index), ends)
        for index, request in enumerate(requests)
    ]
    async with aclosing(_merged(parts)) as frames:
        async for frame in frames:
            yield frame
    if body.includes_usage and len(ends) == len(requests):
        yield wire.final([], usage(*ends))
    yield sse.DONE


async def _frames(
    state: AppState,
    body: CompletionRequest,
    request: GenerateRequest,
    caller: Caller,
    chunks: "Chunks",
    ends: list[Finished],
) -> Frames:
    """Adds to `ends` when it has ended well."""
    special = extras(body, add_special_tokens=True)
    running = running_usage(state.engine.tokenizer, body, request, special)
    try:
        stream = state.inference.stream(request, caller, special, logprobs=False)
        async with aclosing(stream):
            async for events in stream:
                if running is not None:
                    await running.begin()
                outputs, end = split_end(events)
                tokens = outputs if end is None else outputs[:-1]
                frames = [chunks.token(output, running) for output in tokens]
                if end is not None:
                    frames.append(chunks.last(outputs[-1], end))
                    ends.append(end)
                yield b"".join(frames)
    except REQUEST_ERRORS as problem:
        yield error_event(problem)


async def _merged(parts: Sequence[Frames]) -> Frames:
    """What any of `parts` yields; what waits together is yielded together."""
    if len(parts) == 1:
        async with aclosing(parts[0]) as frames:
            async for frame in frames:
                yield frame
        return
    arrived: asyncio.Queue[bytes | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(part, arrived)) for part in parts]
    try:
        num_open = len(tasks)
        while num_open:
            pending = [await arrived.get()]
            while not arrived.empty():
                pending.append(arrived.get_nowait())
            num_open -= pending.count(None)
            if frame := b"".join(filter(None, pending)):
                yield frame
        for task in tasks:
            task.result()
    finally:
        await cancel(*tasks)


async def _pump(part: Frames, arrived: "asyncio.Queue[bytes | None]") -> None:
    """None is put behind the last."""
    try:
        async with aclosing(part) as frames:
            async for frame in frames:
                arrived.put_nowait(frame)
    finally:
        arrived.put_nowait(None)


class Wire:
    """What every chunk of the stream repeats, made once, in TGI's two orders of keys."""

    def __init__(self, state: AppState) -> None:
        created, model = envelope(state)
        first = {"object": "text_completion", "id": "", "created": created}
        second = {"model": model, "system_fingerprint": SYSTEM_FINGERPRINT}
        self._head = b"data: " + orjson.dumps(first)[:-1]
        self._model = b"," + orjson.dumps(second)[1:-1]

    def chunk(self, choice: CompletionChoice, usage: Usage | None) -> bytes:
        counted = b"" if usage is None else b',"usage":' + orjson.dumps(usage)
        choices = b',"choices":' + orjson.dumps([choice])
        return self._head + choices + self._model + counted + b"}\n\n"

    def final(self, choices: list[CompletionChoice], usage: Usage) -> bytes:
        told = {"choices": choices, "usage": usage}
        return self._head + self._model + b"," + orjson.dumps(told)[1:] + b"\n\n"


class Chunks:
    """Makes the frames of one prompt."""

    def __init__(self, wire: Wire, index: int) -> None:
        self._wire = wire
        self._index = index

    def token(self, output: TokenOutput, running: RunningUsage | None) -> bytes:
        usage = None if running is None else running.push()
        return self._wire.chunk(self._choice(output, ""), usage)

    def last(self, output: TokenOutput, end: Finished) -> bytes:
        """The reason in TGI's own words here, not in OpenAI's."""
        return self._wire.final([self._choice(output, end.reason.value)], usage(end))

    def _choice(self, output: TokenOutput, reason: str) -> CompletionChoice:
        return {
            "index": self._index,
            "text": output.token.text,
            "logprobs": None,
            "finish_reason": reason,
        }
