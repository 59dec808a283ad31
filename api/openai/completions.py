"""The answer to a completion of one or several prompts, each a generation of its own."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.generation.headers import caller_of, stream_headers, summed_headers
from api.generation.inference import Answer
from api.generation.request import GenerateRequest
from api.generation.state import AppState, state_of
from api.http import sse
from api.http.disconnect import all_together, until_disconnect
from api.http.errors import Refused
from api.http.responses import json_response
from api.openai.completion_stream import completion_frames
from api.openai.parameters import check, extras, generate_parameters
from api.openai.payloads import (
    FINISH_REASONS,
    SYSTEM_FINGERPRINT,
    created_and_model,
    total_usage,
)
from api.openai.requests import CompletionRequest
from api.openai.responses import Completion
from api.settings.config import Settings
from api.telemetry.observation import Caller


async def answer_completion(http: HttpRequest, body: CompletionRequest) -> Response:
    """Answer a completion that came by any route.

    Raises Refused for a body that is refused before any generation begins.
    """
    state = state_of(http)
    state.observer.arrived()
    _check(body, state.settings)
    requests = _requests(body)
    caller = caller_of(http, "completions")
    if body.stream:
        frames = completion_frames(state, body, requests, caller)
        return sse.EventStream(frames, stream_headers(state, *requests))
    answers = await until_disconnect(http.receive, _answers(state, body, requests, caller))
    headers = summed_headers(state, requests, answers)
    return json_response(_completion(state, answers), headers)


def _check(body: CompletionRequest, settings: Settings) -> None:
    check(body, settings.max_concurrent_requests)
    if len(body.prompt) > settings.max_client_batch_size:
        raise Refused(
            422,
            "Number of prompts exceeds the maximum allowed batch size of "
            f"{settings.max_client_batch_size}",
            "batch size exceeded",
            field="prompt",
        )


def _requests(body: CompletionRequest) -> list[GenerateRequest]:
    parameters = generate_parameters(body, repetition_penalty=body.repetition_penalty)
    return [GenerateRequest(inputs=str(prompt), parameters=parameters) for prompt in body.prompt]


async def _answers(
    state: AppState, body: CompletionRequest, requests: list[GenerateRequest], caller: Caller
) -> list[Answer]:
    """Return the answers in the order of the prompts. TGI has them in the order of their ends."""
    special = extras(body, add_special_tokens=True)
    return await all_together(
        state.inference.complete(request, caller, special, logprobs=False) for request in requests
    )


def _completion(state: AppState, answers: list[Answer]) -> Completion:
    created, model = created_and_model(state)
    ends = [answer.best.end for answer in answers]
    return {
        "object": "text_completion",
        "id": "",
        "created": created,
        "model": model,
        "system_fingerprint": SYSTEM_FINGERPRINT,
        "choices": [
            {
                "index": index,
                "text": end.generated_text,
                "logprobs": None,
                "finish_reason": FINISH_REASONS[end.reason],
            }
            for index, end in enumerate(ends)
        ],
        "usage": total_usage(*ends),
    }
