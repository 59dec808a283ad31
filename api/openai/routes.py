"""OpenAI's routes: chats, completions and the list of the one model."""

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.generation.state import state_of
from api.http.body import read_body
from api.http.errors import Refused
from api.http.responses import json_response
from api.openai.chat import answer_chat
from api.openai.completions import answer_completion
from api.openai.errors import RESPONSES, ErrorBody
from api.openai.requests import ChatRequest, CompletionRequest
from api.openai.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ModelInfo,
    ModelsInfo,
)

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion | ChatCompletionChunk,
    responses=RESPONSES,
)
async def chat_completions(http: HttpRequest) -> Response:
    """Answer a chat, with a server-sent event for each token if `stream` is true."""
    limit = state_of(http).settings.payload_limit
    return await answer_chat(http, await read_body(http, ChatRequest, limit))


@router.post("/v1/completions", response_model=Completion, responses=RESPONSES)
async def completions(http: HttpRequest) -> Response:
    """Complete one prompt or several, with server-sent events if `stream` is true."""
    limit = state_of(http).settings.payload_limit
    return await answer_completion(http, await read_body(http, CompletionRequest, limit))


async def models(http: HttpRequest) -> Response:
    """List the model that is served."""
    return json_response({"object": "list", "data": [_model_info(http)]})


@router.get(
    "/v1/models/{model:path}", response_model=ModelInfo, responses={404: {"model": ErrorBody}}
)
async def model(http: HttpRequest, model: str) -> Response:
    """Describe the model that is served, by its name."""
    info = _model_info(http)
    if model != info["id"]:
        text = f"The model `{model}` is not served"
        raise Refused(404, text, "model_not_found", field="model", code="model_not_found")
    return json_response(info)


def _model_info(http: HttpRequest) -> ModelInfo:
    served = state_of(http).engine.model.model_id
    return {"id": served, "object": "model", "created": 0, "owned_by": served}


router.add_api_route("/v1/models", models, methods=["GET"], response_model=ModelsInfo)
router.add_api_route("/v1/models", models, methods=["HEAD"], include_in_schema=False)
