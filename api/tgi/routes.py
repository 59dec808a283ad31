"""TGI's own routes: /generate, /generate_stream, / (either), /health, /ping and /info.

The routes follow the router of Text Generation Inference 3 to the byte. A plain route reports
an error by its status. A stream has answered 200 before it validates its request, and reports
an error as its last event.
"""

import orjson
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.generation.contract import ERRORS, TGI_VERSION
from api.generation.headers import answer_headers, caller_of, stream_headers
from api.generation.inference import Answer
from api.generation.request import CompatGenerateRequest, GenerateRequest
from api.generation.state import AppState, state_of
from api.generation.streaming import stream_frames
from api.http import sse
from api.http.body import read_body
from api.http.disconnect import until_disconnect
from api.http.responses import json_response
from api.tgi.payloads import GenerateFrameWriter, generate_response, wants_details
from api.tgi.schemas import GenerateResponse, Info, StreamResponse

BODIES: dict[str, type[BaseModel]] = {
    "/generate": GenerateRequest,
    "/generate_stream": GenerateRequest,
    "/": CompatGenerateRequest,
}
"""The body that each POST route takes, for the OpenAPI document."""

router = APIRouter()


@router.post("/generate", response_model=GenerateResponse, responses=ERRORS)
async def generate(http: HttpRequest) -> Response:
    """Generate, and answer when it is done."""
    state = state_of(http)
    body = await read_body(http, GenerateRequest, state.settings.payload_limit)
    answer = await _complete(http, body)
    return json_response(generate_response(body, answer), answer_headers(state, body, answer))


@router.post("/generate_stream", response_model=StreamResponse)
async def generate_stream(http: HttpRequest) -> Response:
    """Generate, with a server-sent event for each token."""
    state = state_of(http)
    body = await read_body(http, GenerateRequest, state.settings.payload_limit)
    return _event_stream(http, body)


@router.post("/", response_model=list[GenerateResponse], responses=ERRORS)
async def compat_generate(http: HttpRequest) -> Response:
    """Answer like /generate_stream if `stream` is true, else like /generate with a list of one."""
    limit = state_of(http).settings.payload_limit
    return await answer_compat(http, await read_body(http, CompatGenerateRequest, limit))


async def answer_compat(http: HttpRequest, body: CompatGenerateRequest) -> Response:
    """Answer a request of `/`, whatever route it came by."""
    state = state_of(http)
    body = _with_default_full_text(body, state.engine.model.pipeline_tag)
    if body.stream:
        return _event_stream(http, body)
    answer = await _complete(http, body)
    return json_response([generate_response(body, answer)], answer_headers(state, body, answer))


async def health(http: HttpRequest) -> Response:
    """Answer 200 while tokens can be generated, else 503 and why."""
    status = state_of(http).engine.status()
    if status.healthy:
        return Response()
    # TGI's body, but for `reason`.
    down = {"error": "unhealthy", "error_type": "healthcheck", "reason": status.reason}
    return Response(orjson.dumps(down), 503, media_type="application/json")


async def info(http: HttpRequest) -> Response:
    """Return the model and the limits of a request."""
    return json_response(_info(state_of(http)))


for _path, _route in (("/", health), ("/health", health), ("/ping", health), ("/info", info)):
    router.add_api_route(_path, _route, methods=["GET"], response_model=None)
    router.add_api_route(_path, _route, methods=["HEAD"], include_in_schema=False)


async def _complete(http: HttpRequest, body: GenerateRequest) -> Answer:
    work = state_of(http).inference.complete(
        body, caller_of(http, "generate"), logprobs=wants_details(body)
    )
    return await until_disconnect(http.receive, work)


def _event_stream(http: HttpRequest, body: GenerateRequest) -> Response:
    state = state_of(http)
    stream = state.inference.stream(body, caller_of(http, "generate_stream"), logprobs=True)
    frames = stream_frames(stream, GenerateFrameWriter(body))
    return sse.EventStream(frames, stream_headers(state, body))


def _with_default_full_text(
    body: CompatGenerateRequest, pipeline_tag: str | None
) -> CompatGenerateRequest:
    """Set `return_full_text` if it is absent.

    On this route TGI repeats the prompt if the model is for text generation or of an unknown kind.
    """
    if body.parameters.return_full_text is not None:
        return body
    full_text = pipeline_tag in (None, "text-generation")
    parameters = body.parameters.model_copy(update={"return_full_text": full_text})
    return body.model_copy(update={"parameters": parameters})


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
