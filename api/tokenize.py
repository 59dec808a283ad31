"""The routes that return the tokens of a text or a chat."""

from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import chain
from typing import Protocol

import orjson
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from api.chat.prompt import prepare
from api.generation.contract import ERRORS
from api.generation.request import GenerateRequest
from api.generation.state import state_of
from api.http.body import read_body
from api.http.errors import ValidationError
from api.http.off_loop import Threads
from api.openai.chat_translation import chat_of
from api.openai.requests import ChatRequest
from api.openai.responses import ChatTokenizeResponse, SimpleToken

BODIES: dict[str, type[BaseModel]] = {"/tokenize": GenerateRequest, "/chat_tokenize": ChatRequest}

router = APIRouter()


_TOKENS_AT_ONCE = 1024
_STREAMED_TOKENS = 1 << 14
"""Answers with more tokens are streamed, and have no content-length."""

_tokenising = Threads(2, "tokenize")
_writing = Threads(1, "write-tokens")


class Spans(Protocol):
    """Tokens with the start and the end of their bytes in a text."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def starts(self) -> Sequence[int]: ...
    @property
    def stops(self) -> Sequence[int]: ...


class SpanTokenizer(Protocol):
    """The part of the engine's tokenizer that returns the spans of tokens."""

    def tokenize(self, text: str, add_special_tokens: bool = True) -> Spans: ...


@router.post("/tokenize", response_model=list[SimpleToken], responses=ERRORS)
async def tokenize(http: HttpRequest) -> Response:
    """Return the tokens of `inputs` with the special ones. Only the size of the body is limited."""
    state = state_of(http)
    body = await read_body(http, GenerateRequest, state.settings.payload_limit)
    spans = await _spans(state.engine.tokenizer, body.inputs, True)
    return await _answer(b"", spans, body.inputs, b"")


@router.post("/chat_tokenize", response_model=ChatTokenizeResponse, responses=ERRORS)
async def chat_tokenize(http: HttpRequest) -> Response:
    """Return the prompt of a chat and its tokens."""
    state = state_of(http)
    chat = await read_body(http, ChatRequest, state.settings.payload_limit)
    state.observer.arrived()
    text = (await prepare(state.engine.tokenizer, chat_of(chat))).request.inputs
    spans = await _spans(state.engine.tokenizer, text, False)
    end = b',"templated_text":' + orjson.dumps(text) + b"}"
    return await _answer(b'{"tokenize_response":', spans, text, end)


async def _spans(tokenizer: SpanTokenizer, text: str, special: bool) -> Spans:
    try:
        return await _tokenising.run(tokenizer.tokenize, text, special)
    except Exception as error:
        raise ValidationError(f"tokenizer error {error}") from error


async def _answer(head: bytes, spans: Spans, text: str, end: bytes) -> Response:
    """Return the tokens of `text` as a JSON list between `head` and `end`."""
    pieces = _written_elsewhere(chain([head + b"["], _json_items(spans, text), [b"]" + end]))
    if len(spans.ids) > _STREAMED_TOKENS:
        return StreamingResponse(pieces, media_type="application/json")
    content = b"".join([piece async for piece in pieces])
    return Response(content, media_type="application/json")


async def _written_elsewhere(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the pieces, each of which a thread makes when the client has taken the one before."""
    while piece := await _writing.run(lambda: next(pieces, b"")):
        yield piece


def _json_items(spans: Spans, text: str) -> Iterator[bytes]:
    """Yield the items of a list of the tokens, each with the part of `text` that it stands for."""
    raw = text.encode()
    for first in range(0, len(spans.ids), _TOKENS_AT_ONCE):
        part = slice(first, first + _TOKENS_AT_ONCE)
        columns = zip(spans.ids[part], spans.starts[part], spans.stops[part], strict=True)
        tokens: list[SimpleToken] = [
            {
                "id": token_id,
                "text": raw[start:stop].decode(errors="replace"),
                "start": start,
                "stop": stop,
            }
            for token_id, start, stop in columns
        ]
        yield (b"," if first else b"") + orjson.dumps(tokens)[1:-1]
