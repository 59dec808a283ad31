"""The answer to a chat as a stream of chunks, one for each token."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import orjson

from api.generation.state import AppState
from api.generation.streaming import stream_frames
from api.http import sse
from api.http.errors import REQUEST_ERRORS
from api.openai.chat_prompt import ChatPrompt, prepare_without_tools
from api.openai.errors import CHAT_ERRORS
from api.openai.payloads import (
    SYSTEM_FINGERPRINT,
    RunningUsage,
    created_and_model,
    finish_reason,
    logprobs,
    total_usage,
)
from api.openai.requests import ChatRequest
from api.openai.responses import (
    ChunkChoice,
    FunctionDelta,
    TextMessage,
    ToolDelta,
    Usage,
)
from api.openai.tools import NO_TOOL, CallReader, next_call_id
from api.telemetry.observation import Caller
from engine.core.request import Finished, TokenOutput


async def chat_frames(
    state: AppState, chat: ChatRequest, prompt: ChatPrompt, caller: Caller
) -> AsyncGenerator[bytes, None]:
    """Yield the frames of the answer. An error is the last one before [DONE].

    If the model chooses none of the tools, the chat is generated again without tools.
    """
    call = CallReader() if prompt.uses_tools else None
    async with aclosing(_frames(state, chat, prompt, caller, call)) as frames:
        async for frame in frames:
            if call is not None and call.name == NO_TOOL:
                break
            if frame:
                yield frame
    if call is not None and call.name == NO_TOOL:
        async with aclosing(_frames_without_tools(state, chat, caller)) as frames:
            async for frame in frames:
                yield frame
    yield sse.DONE


async def _frames_without_tools(
    state: AppState, chat: ChatRequest, caller: Caller
) -> AsyncGenerator[bytes, None]:
    try:
        prompt = await prepare_without_tools(state.engine.tokenizer, chat)
    except REQUEST_ERRORS as problem:
        yield CHAT_ERRORS.event(problem)
        return
    async with aclosing(_frames(state, chat, prompt, caller, None)) as frames:
        async for frame in frames:
            yield frame


def _frames(
    state: AppState, chat: ChatRequest, prompt: ChatPrompt, caller: Caller, call: CallReader | None
) -> AsyncGenerator[bytes, None]:
    """Generate. With `call` the chunks are those of a tool's call, else those of a text."""
    running = RunningUsage() if chat.has_usage_in_every_chunk else None
    stream = state.inference.stream(
        prompt.request,
        caller,
        prompt.extras,
        logprobs=bool(chat.logprobs),
        on_validated=None if running is None else running.begin,
    )
    return stream_frames(stream, ChatFrameWriter(state, chat, call, running))


class ChatFrameWriter:
    """Writes the chunks of one stream. The part that all of them repeat is encoded once."""

    def __init__(
        self,
        state: AppState,
        chat: ChatRequest,
        call: CallReader | None,
        running: RunningUsage | None,
    ) -> None:
        created, model = created_and_model(state, chat.model)
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
        """Return the chunk of a token, or nothing if it is no part of a call's arguments."""
        usage = self._add_to_usage()
        delta = self._delta(output)
        return b"" if delta is None else self._frame(output, delta, None, usage)

    def last(self, output: TokenOutput, end: Finished) -> bytes:
        """Return the chunk with the finish reason, and the chunk of the usage if it was asked for.

        TGI leaves the reason out of the calls of tools.
        """
        usage = self._add_to_usage()
        delta = self._delta(output) or _text_delta("")
        frame = self._frame(output, delta, finish_reason(end), usage)
        if self._includes_usage:
            frame += self._chunk([], total_usage(end))
        return frame

    def error(self, problem: Exception) -> bytes:
        return CHAT_ERRORS.event(problem)

    def _add_to_usage(self) -> Usage | None:
        return None if self._running is None else self._running.add_token()

    def _delta(self, output: TokenOutput) -> TextMessage | ToolDelta | None:
        text = "" if output.token.special else output.token.text
        if self._call is None:
            return _text_delta(text)
        is_first = self._call.name is None
        arguments = self._call.read(text)
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


def _text_delta(text: str) -> TextMessage:
    return {"role": "assistant", "content": text}


def _tool_delta(id: str, name: str | None, arguments: str) -> ToolDelta:
    function: FunctionDelta = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"index": 0, "id": id, "type": "function", "function": function}],
    }
