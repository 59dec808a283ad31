"""The answer to a chat, which is a text or the call of a tool."""

from typing import NamedTuple

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.generation.headers import answer_headers, caller_of, stream_headers
from api.generation.inference import Answer
from api.generation.state import AppState, state_of
from api.http import sse
from api.http.disconnect import until_disconnect
from api.http.errors import REQUEST_ERRORS
from api.http.responses import json_response
from api.openai.chat_prompt import ChatPrompt, prepare, prepare_without_tools
from api.openai.chat_stream import chat_frames
from api.openai.payloads import (
    SYSTEM_FINGERPRINT,
    created_and_model,
    finish_reason,
    logprobs,
    total_usage,
)
from api.openai.requests import ChatRequest
from api.openai.responses import ChatCompletion, TextMessage, ToolMessage
from api.openai.tools import NO_TOOL, Call, parse_call
from api.telemetry.observation import Caller


class ChatAnswer(NamedTuple):
    """The answer to a chat, with the prompt that led to it and the call that it was read as."""

    prompt: ChatPrompt
    answer: Answer
    call: Call | None


async def answer_chat(http: HttpRequest, chat: ChatRequest) -> Response:
    """Answer a chat that came by any route.

    An error of the template or the tools is reported by the status, even if a stream was asked
    for.
    """
    state = state_of(http)
    caller = caller_of(http, "chat_completions")
    state.observer.arrived()
    try:
        prompt = await prepare(state.engine.tokenizer, chat)
    except REQUEST_ERRORS as problem:
        state.observer.refused(caller, problem)
        raise
    if chat.stream:
        frames = chat_frames(state, chat, prompt, caller)
        return sse.EventStream(frames, stream_headers(state, prompt.request))
    work = _answer(state, chat, prompt, caller)
    answered = await until_disconnect(http.receive, work)
    headers = answer_headers(state, answered.prompt.request, answered.answer)
    return json_response(_chat_completion(state, chat, answered), headers)


async def _answer(
    state: AppState, chat: ChatRequest, prompt: ChatPrompt, caller: Caller
) -> ChatAnswer:
    """Generate the answer. If the model chooses none of the tools, generate it again without
    tools; the headers and the usage are then those of the second generation.
    """
    answer = await _complete(state, chat, prompt, caller)
    if not prompt.uses_tools:
        return ChatAnswer(prompt, answer, None)
    call = parse_call(answer.best.end.generated_text)
    if call.name != NO_TOOL:
        return ChatAnswer(prompt, answer, call)
    prompt = await prepare_without_tools(state.engine.tokenizer, chat)
    return ChatAnswer(prompt, await _complete(state, chat, prompt, caller), None)


async def _complete(
    state: AppState, chat: ChatRequest, prompt: ChatPrompt, caller: Caller
) -> Answer:
    return await state.inference.complete(
        prompt.request, caller, prompt.extras, logprobs=bool(chat.logprobs)
    )


def _chat_completion(state: AppState, chat: ChatRequest, answered: ChatAnswer) -> ChatCompletion:
    created, model = created_and_model(state, chat.model)
    best = answered.answer.best
    return {
        "object": "chat.completion",
        "id": "",
        "created": created,
        "model": model,
        "system_fingerprint": SYSTEM_FINGERPRINT,
        "choices": [
            {
                "index": 0,
                "message": _message(best.end.generated_text, answered.call),
                "logprobs": logprobs(best.tokens) if chat.logprobs else None,
                "finish_reason": finish_reason(best.end),
            }
        ],
        "usage": total_usage(best.end),
    }


def _message(text: str, call: Call | None) -> TextMessage | ToolMessage:
    if call is None:
        return {"role": "assistant", "content": text}
    return {
        "role": "assistant",
        "tool_calls": [
            {
                "id": "0",
                "type": "function",
                "function": {"description": None, "name": call.name, "arguments": call.arguments},
            }
        ],
    }
