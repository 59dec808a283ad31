"""Anthropic's Messages API: the routes that answer a chat and count the tokens of its prompt."""

from functools import partial

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.anthropic.errors import RESPONSES
from api.anthropic.payloads import MessageObject, TokenCount, complete_message
from api.anthropic.requests import MessagesRequest, PromptRequest
from api.anthropic.stream import MessageWriter
from api.anthropic.translation import chat_of, prompt_of
from api.chat.answer import ChatAnswer
from api.chat.prompt import prepare
from api.chat.serving import serve_chat
from api.generation.state import state_of
from api.http.body import read_body
from api.http.responses import json_response

BODIES: dict[str, type[BaseModel]] = {
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": PromptRequest,
}

router = APIRouter()


@router.post("/v1/messages", response_model=MessageObject, responses=RESPONSES)
async def messages(http: HttpRequest) -> Response:
    """Answer as a message, with typed server-sent events if `stream` is true."""
    body = await read_body(http, MessagesRequest, state_of(http).settings.payload_limit)

    def encode(answers: list[ChatAnswer]) -> MessageObject:
        (answer,) = answers
        return complete_message(body, answer)

    writer = MessageWriter(body) if body.stream else None
    return await serve_chat(http, "messages", partial(chat_of, body), encode, writer)


@router.post("/v1/messages/count_tokens", response_model=TokenCount, responses=RESPONSES)
async def count_tokens(http: HttpRequest) -> Response:
    """Return the number of tokens of the prompt that a message would answer."""
    state = state_of(http)
    body = await read_body(http, PromptRequest, state.settings.payload_limit)
    state.observer.arrived()
    prompt = await prepare(state.engine.tokenizer, prompt_of(body))
    count = await state.validator.count_tokens(prompt.request, prompt.extras)
    return json_response({"input_tokens": count})
