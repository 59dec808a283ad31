"""The routes that return the tokens of a text or a chat."""

import asyncio
from typing import Protocol

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.chat.prompt import prepare
from api.generation.contract import ERRORS
from api.generation.request import GenerateRequest
from api.generation.state import state_of
from api.http.body import read_body
from api.http.errors import ValidationError
from api.http.responses import json_response
from api.openai.chat_translation import chat_of
from api.openai.requests import ChatRequest
from api.openai.responses import ChatTokenizeResponse, SimpleToken

BODIES: dict[str, type[BaseModel]] = {"/tokenize": GenerateRequest, "/chat_tokenize": ChatRequest}

router = APIRouter()


class SpanTokenizer(Protocol):
    """The part of the engine's tokenizer that returns each token as its id and its span."""

    def tokenize(
        self, text: str, add_special_tokens: bool = True
    ) -> list[tuple[int, int, int]]: ...


@router.post("/tokenize", response_model=list[SimpleToken], responses=ERRORS)
async def tokenize(http: HttpRequest) -> Response:
    """Return the tokens of `inputs` with the special ones. Only the size of the body is limited."""
    state = state_of(http)
    body = await read_body(http, GenerateRequest, state.settings.payload_limit)
    return json_response(await _tokens(state.engine.tokenizer, body.inputs, True))


@router.post("/chat_tokenize", response_model=ChatTokenizeResponse, responses=ERRORS)
async def chat_tokenize(http: HttpRequest) -> Response:
    """Return the prompt of a chat and its tokens."""
    state = state_of(http)
    chat = await read_body(http, ChatRequest, state.settings.payload_limit)
    state.observer.arrived()
    text = (await prepare(state.engine.tokenizer, chat_of(chat))).request.inputs
    tokens = await _tokens(state.engine.tokenizer, text, False)
    return json_response({"tokenize_response": tokens, "templated_text": text})


async def _tokens(tokenizer: SpanTokenizer, text: str, special: bool) -> list[SimpleToken]:
    try:
        return await asyncio.to_thread(_simple_tokens, tokenizer, text, special)
    except Exception as error:
        raise ValidationError(f"tokenizer error {error}") from error


def _simple_tokens(tokenizer: SpanTokenizer, text: str, special: bool) -> list[SimpleToken]:
    """Return the tokens of `text`, each with the part of the text that it stands for."""
    raw = text.encode()
    return [
        {
            "id": token_id,
            "text": raw[start:stop].decode(errors="replace"),
            "start": start,
            "stop": stop,
        }
        for token_id, start, stop in tokenizer.tokenize(text, special)
    ]
