"""A message as a stream of typed events: its begin, one block of content, its end."""

from collections.abc import Sequence
from typing import Any

from api.anthropic.errors import error_event
from api.anthropic.payloads import begun_message, stop_of, usage
from api.anthropic.requests import MessagesRequest
from api.chat.events import (
    ArgumentsDelta,
    CallStarted,
    ChatEvent,
    Ended,
    Started,
    TextDelta,
)
from api.http import sse

_PING = sse.typed_event({"type": "ping"})
_BLOCK_STOP = sse.typed_event({"type": "content_block_stop", "index": 0})
_MESSAGE_STOP = sse.typed_event({"type": "message_stop"})


class MessageWriter:
    """Writes the events of one message. An answer without text has no block."""

    def __init__(self, body: MessagesRequest) -> None:
        self._body = body
        self._has_block = False

    def frames(self, events: Sequence[ChatEvent]) -> bytes:
        return b"".join([self._frame(event) for event in events])

    def error(self, problem: Exception) -> bytes:
        return error_event(problem)

    def end(self) -> bytes:
        return b""

    def _frame(self, event: ChatEvent) -> bytes:
        match event:
            case Started(_, num_prompt_tokens):
                message = begun_message(self._body, num_prompt_tokens)
                return sse.typed_event({"type": "message_start", "message": message})
            case TextDelta(_, text, _):
                begin = b"" if self._has_block or not text else self._text_block()
                return begin + _delta({"type": "text_delta", "text": text}) if text else b""
            case CallStarted(_, id, name, _):
                return self._block({"type": "tool_use", "id": id, "name": name, "input": {}})
            case ArgumentsDelta(_, text, _):
                return _delta({"type": "input_json_delta", "partial_json": text}) if text else b""
            case Ended():
                return self._ended(event)

    def _text_block(self) -> bytes:
        return self._block({"type": "text", "text": ""})

    def _block(self, block: dict[str, Any]) -> bytes:
        self._has_block = True
        start = {"type": "content_block_start", "index": 0, "content_block": block}
        return sse.typed_event(start) + _PING

    def _ended(self, end: Ended) -> bytes:
        finished = end.finished
        delta = {
            "type": "message_delta",
            "delta": stop_of(end, self._body.max_tokens),
            "usage": usage(finished.num_prompt_tokens, finished.num_generated_tokens),
        }
        stop = _BLOCK_STOP if self._has_block else b""
        return stop + sse.typed_event(delta) + _MESSAGE_STOP


def _delta(delta: dict[str, str]) -> bytes:
    return sse.typed_event({"type": "content_block_delta", "index": 0, "delta": delta})
