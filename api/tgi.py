"""TGI's own routes: /generate, /generate_stream, / (either), /health, /ping and /info.

Follows the router of Text Generation Inference 3 to the byte. A plain route tells
errors by status; a stream has answered 200 before it looks at its request, and tells
them as its last event.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from itertools import zip_longest
from typing import Any

import orjson
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api import sse
from api.body import read_body
from api.disconnect import until_disconnect
from api.errors import REQUEST_ERRORS, GenerationFailed, IncompleteStream, wire_error
from api.generation import complete
from api.payloads import generate_response, last_stream_response, stream_response, wants_details
from api.schemas import (
    CompatGenerateRequest,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    Info,
    StreamResponse,
)
from api.state import AppState, state_of
from engine.async_engine import Generation
from engine.request import Failed, Finished, TokenOutput

TGI_VERSION = "3.3.6-dev0"
"""The release whose wire this is; clients read it from /info."""

BODIES: dict[str, type[BaseModel]] = {
    "/generate": GenerateRequest,
    "/generate_stream": GenerateRequest,
    "/": CompatGenerateRequest,
}
"""What each POST route takes, for the OpenAPI document."""

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (422, 424, 429, 500)
}

router = APIRouter()


@router.post("/generate", response_model=GenerateResponse, responses=ERRORS)
async def generate(http: HttpRequest) -> Response:
    """Generate, and answer when it is done."""
    state = state_of(http)
    body = await read_body(http, GenerateRequest, state.settings.payload_limit)
    response, headers = await until_disconnect(http.receive, _generate(state, body))
    return _json(response, headers)


@router.post("/generate_stream", response_model=StreamResponse)
async def generate_stream(http: HttpRequest) -> Response:
    """Generate, with a server-sent event for each token."""
    state = state_of(http)
    body = await read_body(http, GenerateRequest, state.settings.payload_limit)
    return _event_stream(state, body)


@router.post("/", response_model=list[GenerateResponse], responses=ERRORS)
async def compat_generate(http: HttpRequest) -> Response:
    """As /generate_stream if `stream` is true, else as /generate with the answer in a list."""
    state = state_of(http)
    body = await read_body(http, CompatGenerateRequest, state.settings.payload_limit)
    body = _with_default_full_text(body, state.engine.model.pipeline_tag)
    if body.stream:
        return _event_stream(state, body)
    response, headers = await until_disconnect(http.receive, _generate(state, body))
    return _json([response], headers)


async def health(http: HttpRequest) -> Response:
    """200 while tokens can be made; else 503, and why. `reason` is ours, the rest is TGI's."""
    status = state_of(http).engine.status()
    if status.healthy:
        return Response()
    down = {"error": "unhealthy", "error_type": "healthcheck", "reason": status.reason}
    return Response(orjson.dumps(down), 503, media_type="application/json")


async def info(http: HttpRequest) -> Response:
    """The model, and the limits of a request."""
    return _json(_info(state_of(http)), {})


for _path, _route in (("/", health), ("/health", health), ("/ping", health), ("/info", info)):
    router.add_api_route(_path, _route, methods=["GET"], response_model=None)
    router.add_api_route(_path, _route, methods=["HEAD"], include_in_schema=False)


async def _generate(
    state: AppState, body: GenerateRequest
) -> tuple[GenerateResponse, dict[str, str]]:
    started = time.perf_counter()
    best_of = body.parameters.best_of or 1
    state.validator.check_best_of(best_of)
    with state.engine.admit(best_of):
        logprobs = wants_details(body) or best_of > 1
        request = await state.validator.validate(body, logprobs=logprobs)
        validated = time.perf_counter()
        completions = await complete(state.engine, request, best_of)
    headers = _compute_headers(state, body) | _result_headers(
        num_input=len(request.prompt_ids),
        end=completions[0].end,
        validation_s=validated - started,
        total_s=time.perf_counter() - started,
    )
    return generate_response(body, completions), headers


def _event_stream(state: AppState, body: GenerateRequest) -> Response:
    headers = _compute_headers(state, body) | {"x-accel-buffering": "no"}
    return sse.EventStream(_stream(state, body), headers)


async def _stream(state: AppState, body: GenerateRequest) -> AsyncGenerator[bytes, None]:
    """The whole life of a streamed request: closing it gives everything back."""
    try:
        state.validator.check_streamable(body.parameters)
        with state.engine.admit():
            request = await state.validator.validate(body, logprobs=True)
            with state.engine.submit(request) as generation:
                async for frames in _frames(body, len(request.prompt_ids), generation):
                    yield frames
    except REQUEST_ERRORS as problem:
        yield sse.event(wire_error(problem).json())


async def _frames(
    body: GenerateRequest, num_input: int, generation: Generation
) -> AsyncIterator[bytes]:
    """The one loop per token: whatever is pending becomes one write."""
    index, ended = 0, False
    async for events in generation.events():
        frames: list[bytes] = []
        for event, following in zip_longest(events, events[1:]):
            if not isinstance(event, TokenOutput):
                continue
            index += 1
            if isinstance(following, Finished):
                ended = True
                last = last_stream_response(body, num_input, index, event, following)
                frames.append(sse.event(last))
            else:
                frames.append(sse.event(stream_response(index, event)))
        if frames:
            yield b"".join(frames)
        if isinstance(events[-1], Failed):
            raise GenerationFailed(events[-1].message)
    if not ended:
        raise IncompleteStream


def _with_default_full_text(
    body: CompatGenerateRequest, pipeline_tag: str | None
) -> CompatGenerateRequest:
    """On this route a text generation model, or an unknown one, repeats the prompt."""
    if body.parameters.return_full_text is not None:
        return body
    full_text = pipeline_tag in (None, "text-generation")
    parameters = body.parameters.model_copy(update={"return_full_text": full_text})
    return body.model_copy(update={"parameters": parameters})


def _compute_headers(state: AppState, body: GenerateRequest) -> dict[str, str]:
    return {
        "x-compute-type": state.compute_type,
        "x-compute-characters": str(len(body.inputs)),
    }


def _result_headers(
    *, num_input: int, end: Finished, validation_s: float, total_s: float
) -> dict[str, str]:
    per_token_s = end.inference_s / end.num_generated_tokens
    return {
        "x-compute-time": f"{total_s:.9f}",
        "x-total-time": _ms(total_s),
        "x-validation-time": _ms(validation_s),
        "x-queue-time": _ms(end.queue_s),
        "x-inference-time": _ms(end.inference_s),
        "x-time-per-token": _ms(per_token_s),
        "x-prompt-tokens": str(num_input),
        "x-generated-tokens": str(end.num_generated_tokens),
    }


def _ms(seconds: float) -> str:
    return str(int(seconds * 1000))


def _info(state: AppState) -> Info:
    model, limits, settings = state.engine.model, state.limits, state.settings
    return {
        "model_id": model.model_id,
        "model_sha": model.sha,
        "model_pipeline_tag": model.pipeline_tag,
        "max_concurrent_requests": settings.max_concurrent_requests,
        "max_best_of": limits.max_best_of,
        "max_stop_sequences": limits.max_stop_sequences,
        "max_input_tokens": limits.max_input_tokens,
        "max_total_tokens": limits.max_total_tokens,
        "validation_workers": settings.validation_workers,
        "max_client_batch_size": settings.max_client_batch_size,
        "router": "text-generation-router",
        "version": TGI_VERSION,
        "sha": None,
        "docker_label": None,
    }


def _json(payload: object, headers: dict[str, str]) -> Response:
    content = orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, headers=headers, media_type="application/json")
