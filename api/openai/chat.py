"""The answer to a chat as a `chat.completion`, or as a stream of its chunks."""

from functools import partial

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.chat.answer import ChatAnswer
from api.chat.request import Chat
from api.chat.serving import serve_chat
from api.generation.state import AppState, state_of
from api.openai.chat_payloads import ChatUsage, chat_logprobs
from api.openai.chat_stream import ChunkWriter
from api.openai.chat_translation import chat_of, check_chat
from api.openai.payloads import SYSTEM_FINGERPRINT, created_and_model, new_id
from api.openai.requests import ChatRequest
from api.openai.responses import ChatChoice, ChatCompletion, ChatMessage


async def answer_chat(http: HttpRequest, body: ChatRequest) -> Response:
    """Answer a chat that came by any route. An error before the first token is told by status."""
    state = state_of(http)

    def translate() -> Chat:
        check_chat(body, state.settings.max_concurrent_requests)
        return chat_of(body)

    encode = partial(_chat_completion, state, body)
    writer = ChunkWriter(state, body) if body.stream else None
    return await serve_chat(http, "chat_completions", translate, encode, writer)


def _chat_completion(
    state: AppState, body: ChatRequest, answers: list[ChatAnswer]
) -> ChatCompletion:
    created, model = created_and_model(state, body.model)
    return {
        "object": "chat.completion",
        "id": new_id("chatcmpl"),
        "created": created,
        "model": model,
        "system_fingerprint": SYSTEM_FINGERPRINT,
        "choices": [_choice(n, answer, bool(body.logprobs)) for n, answer in enumerate(answers)],
        "usage": ChatUsage.of(answer.end.finished for answer in answers if answer.end).json(),
    }


def _choice(index: int, answer: ChatAnswer, has_logprobs: bool) -> ChatChoice:
    assert answer.end is not None
    return {
        "index": index,
        "message": _message(answer),
        "logprobs": chat_logprobs(answer.tokens) if has_logprobs else None,
        "finish_reason": answer.end.reason,
    }


def _message(answer: ChatAnswer) -> ChatMessage:
    call = answer.call
    if call is None:
        return {"role": "assistant", "content": answer.text, "refusal": None}
    return {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
        ],
    }
