"""A chat's answer as a stream of chunks, one for each token."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import orjson

from api.generation.inference import split_end
from api.generation.state import AppState
from api.http import sse
from api.http.errors import REQUEST_ERRORS
from api.openai.chat_prompt import ChatPrompt, prepare_without_tools
from api.openai.messages import next_call_id
from api.openai.payloads import (
    FINISH_REASONS,
    SYSTEM_FINGERPRINT,
    envelope,
    error_event,
    logprobs,
    usage,
)
from api.openai.requests import ChatRequest
from api.openai.responses import (
    ChunkChoice,
    FunctionDelta,
    TextMessage,
    ToolDelta,
    Usage,
)
from api.openai.running_usage import RunningUsage, running_usage
from api.openai.tool_stream import CallReader
from api.openai.tools import NO_TOOL
from api.telemetry.observation import Caller
from engine.core.request import Finished, TokenOutput


async def chat_frames(
    state: AppState, chat: ChatRequest, prompt: ChatPrompt, caller: Caller
) -> AsyncGenerator[bytes, None]:
    """Whatever is pending becomes one write; an error is the last event but for [DONE].

    Where the model wants none of the tools, it is asked again without.
    """
    try:
        call = CallReader() if prompt.uses_tools else None
        async with aclosing(_frames(state, chat, prompt, caller, call)) as frames:
            async for frame in frames:
                yield frame
        if call is not None and call.name == NO_TOOL:
            prompt = await prepare_without_tools(state.engine.tokenizer, chat)
            async with aclosing(_frames(state, chat, prompt, caller, None)) as frames:
                async for frame in frames:
                    yield frame
    except REQUEST_ERRORS as problem:
        yield error_event(problem)
    yield sse.DONE


async def _frames(
    state: AppState, chat: ChatRequest, prompt: ChatPrompt, caller: Caller, call: CallReader | None
) -> AsyncGenerator[bytes, None]:
    """With `call`, that of a tool, unless it turns out to be of none: then nothing."""
    running = running_usage(state.engine.tokenizer, chat, prompt.request, prompt.extras)
    chunks = Chunks(state, chat, call, running)
    stream = state.inference.stream(
        prompt.request, caller, prompt.extras, logprobs=bool(chat.logprobs)
    )
    async with aclosing(stream):
        async for events in stream:
            if running is not None:
                await running.begin()
            outputs, end = split_end(events)
            frames = [chunks.token(output) for output in (outputs if end is None else outputs[:-1])]
            if end is not None:
                frames.append(chunks.last(outputs[-1], end))
            if call is not None and call.name == NO_TOOL:
                return
            if frame := b"".join(frames):
                yield frame


class Chunks:
    """Makes the frames of one stream. What they all repeat is made once."""

    def __init__(
        self,
        state: AppState,
        chat: ChatRequest,
        call: CallReader | None,
        running: RunningUsage | None,
    ) -> None:
        created, model = envelope(state, chat.model)
        head = {
            "object": "chat.completion.chunk",
            "id": "",
            "created": created,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":'
        self._has_logprobs = bool(chat.logprobs)
        self._includes_usage = chat.includes_usage
        self._call = call
        self._call_id = next_call_id(chat.messages)
        self._running = running

    def token(self, output: TokenOutput) -> bytes:
        """Nothing, where a token is no part of a call's arguments."""
        usage = self._usage()
        delta = self._delta(output)
        return b"" if delta is None else self._frame(output, delta, None, usage)

    def last(self, output: TokenOutput, end: Finished) -> bytes:
        """With the reason, in TGI missing from calls, and the usage's own chunk if wanted."""
        running = self._usage()
        delta = self._delta(output) or _text_delta("")
        frame = self._frame(output, delta, FINISH_REASONS[end.reason], running)
        if self._includes_usage:
            frame += self._chunk([], usage(end))
        return frame

    def _delta(self, output: TokenOutput) -> TextMessage | ToolDelta | None:
        text = "" if output.token.special else output.token.text
        if self._call is None:
            return _text_delta(text)
        is_first = self._call.name is None
        arguments = self._call.push(text)
        if arguments is None:
            return None
        return _tool_delta(self._call_id, self._call.name if is_first else None, arguments)

    def _frame(
        self,
        output: TokenOutput,
        delta: TextMessage | ToolDelta,
        finish_reason: str | None,
        usage: Usage | None,
    ) -> bytes:
        choice: ChunkChoice = {
            "index": 0,
            "delta": delta,
            "logprobs": logprobs([output]) if self._has_logprobs else None,
            "finish_reason": finish_reason,
        }
        return self._chunk([choice], usage)

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> bytes:
        rest = orjson.dumps(choices, option=orjson.OPT_SERIALIZE_NUMPY)
        return self._head + rest + b',"usage":' + orjson.dumps(usage) + b"}\n\n"

    def _usage(self) -> Usage | None:
        return None if self._running is None else self._running.push()


def _text_delta(text: str) -> TextMessage:
    return {"role": "assistant", "content": text}


def _tool_delta(id: str, name: str | None, arguments: str) -> ToolDelta:
    function: FunctionDelta = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"index": 0, "id": id, "type": "function", "function": function}],
    }
