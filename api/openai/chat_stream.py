"""The answers to a chat as `chat.completion.chunk`s."""

from collections.abc import Sequence

import orjson

from api.chat.events import (
    ArgumentsDelta,
    CallStarted,
    ChatEvent,
    Ended,
    Started,
    TextDelta,
)
from api.generation.state import AppState
from api.http import sse
from api.openai.chat_payloads import ChatUsage, chat_logprobs
from api.openai.errors import CHAT_ERRORS
from api.openai.payloads import SYSTEM_FINGERPRINT, created_and_model, new_id
from api.openai.requests import ChatRequest
from api.openai.responses import ChunkChoice, Delta, ToolCallDelta
from engine.core.request import TokenOutput


class ChunkWriter:
    """Writes the chunks of one stream. The part that all of them repeat is encoded once.

    A token that shows no text has a chunk only if the chunk has something else to tell.
    """

    def __init__(self, state: AppState, body: ChatRequest) -> None:
        created, model = created_and_model(state, body.model)
        head = {
            "object": "chat.completion.chunk",
            "id": new_id("chatcmpl"),
            "created": created,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._usage_at_end = body.includes_usage
        self._usage_in_all = body.has_usage_in_every_chunk
        self._logprobs_in_all = bool(body.logprobs)
        self._usage = ChatUsage()
        self._with_role: set[int] = set()
        self._calling: set[int] = set()
        self._failed = False
        # Most chunks tell nothing but a text, and differ in the text only.
        self._plain = not (self._usage_in_all or self._logprobs_in_all)
        self._after_text = b'},"logprobs":null,"finish_reason":null}' + self._chunk_end()

    def frames(self, events: Sequence[ChatEvent]) -> bytes:
        return b"".join([self._frame(event) for event in events])

    def error(self, problem: Exception) -> bytes:
        self._failed = True
        return CHAT_ERRORS.event(problem)

    def end(self) -> bytes:
        """Return the chunk of the usage, if that was asked for, and the mark of the end."""
        if not self._usage_at_end or self._failed:
            return sse.DONE
        usage = orjson.dumps(self._usage.json())
        return self._head + b'],"usage":' + usage + b"}\n\n" + sse.DONE

    def _frame(self, event: ChatEvent) -> bytes:
        if type(event) is TextDelta:  # the most frequent by far
            return self._text(event)
        match event:
            case ArgumentsDelta(choice, text, tokens):
                call: ToolCallDelta = {"index": 0, "function": {"arguments": text}}
                return self._delta(choice, {"tool_calls": [call]}, tokens, bool(text))
            case CallStarted(choice, id, name, tokens):
                return self._call(choice, id, name, tokens)
            case Ended(choice, reason, _):
                delta: Delta = {} if choice in self._calling else {"content": ""}
                return self._choice(choice, delta, (), reason)
            case Started(_, num_prompt_tokens):
                self._usage.start(num_prompt_tokens)
        return b""

    def _text(self, event: TextDelta) -> bytes:
        choice, text, tokens = event
        if not self._plain or choice not in self._with_role:
            return self._delta(choice, {"content": text}, tokens, bool(text))
        self._usage.num_generated_tokens += len(tokens)
        if not text:
            return b""
        before = b'%b{"index":%d,"delta":{"content":' % (self._head, choice)
        return before + orjson.dumps(text) + self._after_text

    def _call(self, choice: int, id: str, name: str, tokens: Sequence[TokenOutput]) -> bytes:
        self._calling.add(choice)
        call: ToolCallDelta = {
            "index": 0,
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        return self._delta(choice, {"content": None, "tool_calls": [call]}, tokens, True)

    def _delta(
        self, choice: int, delta: Delta, tokens: Sequence[TokenOutput], has_text: bool
    ) -> bytes:
        self._usage.num_generated_tokens += len(tokens)
        if has_text or (tokens and not self._plain):
            return self._choice(choice, delta, tokens, None)
        return b""

    def _choice(
        self, choice: int, delta: Delta, tokens: Sequence[TokenOutput], reason: str | None
    ) -> bytes:
        if choice not in self._with_role:
            self._with_role.add(choice)
            delta = {"role": "assistant", **delta}
        content: ChunkChoice = {
            "index": choice,
            "delta": delta,
            "logprobs": chat_logprobs(tokens) if self._logprobs_in_all and tokens else None,
            "finish_reason": reason,
        }
        encoded = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        return self._head + encoded + self._chunk_end()

    def _chunk_end(self) -> bytes:
        if self._usage_in_all:
            return b'],"usage":' + orjson.dumps(self._usage.json()) + b"}\n\n"
        return b'],"usage":null}\n\n' if self._usage_at_end else b"]}\n\n"
