"""The way of a chat from a dialect's translation of its body to the response."""

from collections.abc import Callable

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.chat.answer import ChatAnswer, collect
from api.chat.generation import ChatGeneration
from api.chat.prompt import prepare
from api.chat.request import Chat
from api.chat.streaming import ChatWriter, chat_stream
from api.generation.headers import answer_headers, caller_of, stream_headers
from api.generation.state import state_of
from api.http.disconnect import until_disconnect
from api.http.errors import REQUEST_ERRORS
from api.http.responses import json_response


async def serve_chat(
    http: HttpRequest,
    route: str,
    translate: Callable[[], Chat],
    encode: Callable[[list[ChatAnswer]], object],
    writer: ChatWriter | None,
) -> Response:
    """Return the response to the chat that `translate` makes of a body.

    It is the stream of `writer`, or if that is None the JSON that `encode` makes of the answers.
    `route` names the route in logs. Raises `REQUEST_ERRORS` before the first token.
    """
    state = state_of(http)
    caller = caller_of(http, route)
    state.observer.arrived()
    try:
        chat = translate()
        prompt = await prepare(state.engine.tokenizer, chat)
    except REQUEST_ERRORS as problem:
        state.observer.refused(caller, problem)
        raise
    generation = ChatGeneration(state, chat, prompt, caller)
    if writer is not None:
        headers = stream_headers(state, prompt.request)
        return await chat_stream(http, generation.events(), writer, headers)
    answers = await until_disconnect(http.receive, collect(generation.events(), chat.n))
    headers = answer_headers(state, generation.prompt.request, generation.run)
    return json_response(encode(answers), headers)
