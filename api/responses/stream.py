"""A response as a stream of typed events, each with the number that it has in the stream."""

from collections.abc import Sequence
from typing import Any

from api.chat.answer import Call
from api.chat.events import (
    ArgumentsDelta,
    CallStarted,
    ChatEvent,
    Ended,
    Started,
    TextDelta,
)
from api.http import sse
from api.http.errors import wire_error
from api.openai.responses import TokenLogprob
from api.responses.payloads import (
    ItemStatus,
    OutputItem,
    Response,
    call_item,
    item_status,
    message_item,
    new_item_id,
    output_text,
    token_logprobs,
)
from engine.async_engine import Overloaded

Event = dict[str, Any]
"""An event without its number."""


class EventWriter:
    """Writes the events of one response, whose output is one item: a message or a call."""

    def __init__(self, response: Response, has_logprobs: bool) -> None:
        self._response = response
        self._has_logprobs = has_logprobs
        self._num_events = 0
        self._item: _MessageItem | _CallItem | None = None

    def frames(self, events: Sequence[ChatEvent]) -> bytes:
        begin = [] if self._num_events else self._begin()
        written = [self._numbered(begin)]
        written += [self._numbered(self._events(event)) for event in events]
        return b"".join(written)

    def error(self, problem: Exception) -> bytes:
        """Return the event of a response that failed, with what there is of its output."""
        output = [] if self._item is None else [self._item.json("incomplete")]
        code = "rate_limit_exceeded" if isinstance(problem, Overloaded) else "server_error"
        failed = self._response.failed(output, {"code": code, "message": wire_error(problem).error})
        return self._numbered([{"type": "response.failed", "response": failed}])

    def end(self) -> bytes:
        return b""

    def _begin(self) -> list[Event]:
        begun = self._response.begun()
        return [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
        ]

    def _numbered(self, events: Sequence[Event]) -> bytes:
        first = self._num_events
        self._num_events += len(events)
        return b"".join(
            sse.typed_event({"type": event["type"], "sequence_number": first + n, **event})
            for n, event in enumerate(events)
        )

    def _events(self, event: ChatEvent) -> list[Event]:
        match event:
            case Started():
                return []
            case TextDelta(_, text, tokens):
                logprobs = token_logprobs(tokens) if self._has_logprobs else []
                return self._text(text, logprobs) if text or logprobs else []
            case CallStarted(_, id, name, _):
                self._item = _CallItem(Call(id, name))
                return self._item.open()
            case ArgumentsDelta(_, text, _):
                assert isinstance(self._item, _CallItem)
                return self._item.delta(text) if text else []
            case Ended():
                return self._ended(event)

    def _text(self, text: str, logprobs: list[TokenLogprob]) -> list[Event]:
        opened = self._opened()
        assert isinstance(self._item, _MessageItem)
        return [*opened, self._item.delta(text, logprobs)]

    def _opened(self) -> list[Event]:
        """Begin a message unless there is an item, and return the events of that."""
        if self._item is not None:
            return []
        self._item = _MessageItem()
        return self._item.open()

    def _ended(self, end: Ended) -> list[Event]:
        opened = self._opened()
        assert self._item is not None
        status = item_status(end)
        ended = self._response.ended(self._item.json(status), end)
        type = f"response.{ended['status']}"
        return [*opened, *self._item.close(status), {"type": type, "response": ended}]


class _MessageItem:
    """A message that is the output, with its one part."""

    def __init__(self) -> None:
        self._id = new_item_id("msg")
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._part: Event = {"item_id": self._id, "output_index": 0, "content_index": 0}

    def json(self, status: ItemStatus) -> OutputItem:
        return message_item(self._id, "".join(self._texts), self._logprobs, status)

    def open(self) -> list[Event]:
        item = {**self.json("in_progress"), "content": []}
        part = output_text("", [])
        return [
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.content_part.added", **self._part, "part": part},
        ]

    def delta(self, text: str, logprobs: list[TokenLogprob]) -> Event:
        self._texts.append(text)
        self._logprobs += logprobs
        return {
            "type": "response.output_text.delta",
            **self._part,
            "delta": text,
            "logprobs": logprobs,
        }

    def close(self, status: ItemStatus) -> list[Event]:
        text, logprobs = "".join(self._texts), self._logprobs
        part = output_text(text, logprobs)
        item = self.json(status)
        return [
            {
                "type": "response.output_text.done",
                **self._part,
                "text": text,
                "logprobs": logprobs,
            },
            {"type": "response.content_part.done", **self._part, "part": part},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
        ]


class _CallItem:
    """A call that is the output."""

    def __init__(self, call: Call) -> None:
        self._id = new_item_id("fc")
        self._call = call
        self._place: Event = {"item_id": self._id, "output_index": 0}

    def json(self, status: ItemStatus) -> OutputItem:
        return call_item(self._id, self._call, status)

    def open(self) -> list[Event]:
        item = self.json("in_progress")
        return [{"type": "response.output_item.added", "output_index": 0, "item": item}]

    def delta(self, text: str) -> list[Event]:
        self._call.arguments += text
        return [{"type": "response.function_call_arguments.delta", **self._place, "delta": text}]

    def close(self, status: ItemStatus) -> list[Event]:
        return [
            {
                "type": "response.function_call_arguments.done",
                **self._place,
                "name": self._call.name,
                "arguments": self._call.arguments,
            },
            {
                "type": "response.output_item.done",
                "output_index": 0,
                "item": self.json(status),
            },
        ]
