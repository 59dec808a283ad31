"""The routes that SageMaker and Vertex AI call. They build on the other routes."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field, RootModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.chat.prompt import prepare
from api.generation.contract import ERRORS
from api.generation.headers import caller_of
from api.generation.inference import Answer
from api.generation.request import (
    CompatGenerateRequest,
    GenerateParameters,
    GenerateRequest,
    WireRequest,
)
from api.generation.state import AppState, state_of
from api.generation.validation import NO_EXTRAS, Extras
from api.http.body import read_body
from api.http.disconnect import all_together, until_disconnect
from api.http.errors import REQUEST_ERRORS, Refused, use_format
from api.http.responses import json_response
from api.http.serde import Vec, untagged
from api.openai.chat import answer_chat
from api.openai.chat_translation import chat_of
from api.openai.completions import answer_completion
from api.openai.errors import CHAT_ERRORS, COMPLETION_ERRORS
from api.openai.requests import ChatRequest, CompletionRequest
from api.openai.responses import ChatCompletion, Completion, VertexResponse
from api.telemetry.observation import Caller
from api.tgi.routes import answer_compat
from api.tgi.schemas import GenerateResponse


class SagemakerRequest(RootModel):
    """A request of any other route: the body is the first of these models that fits."""

    root: Annotated[
        Annotated[
            CompatGenerateRequest | ChatRequest | CompletionRequest,
            Field(union_mode="left_to_right"),
        ],
        untagged("SagemakerRequest"),
    ]


class GenerateInstance(WireRequest):
    """A prompt. Of its parameters only `max_new_tokens` and `seed` are used."""

    inputs: str
    parameters: GenerateParameters | None = None


Instance = Annotated[
    Annotated[GenerateInstance | ChatRequest, Field(union_mode="left_to_right")],
    untagged("VertexInstance"),
]


class VertexRequest(WireRequest):
    instances: Vec[Instance]


BODIES: dict[str, type[BaseModel]] = {"/invocations": SagemakerRequest, "/vertex": VertexRequest}

router = APIRouter()


@router.post(
    "/invocations",
    response_model=list[GenerateResponse] | ChatCompletion | Completion,
    responses=ERRORS,
)
async def invocations(http: HttpRequest) -> Response:
    """Answer like `/`, a chat or a completion, depending on the shape of the body. A body of none
    of these shapes is refused as on `/`.
    """
    limit = state_of(http).settings.payload_limit
    match (await read_body(http, SagemakerRequest, limit)).root:
        case CompatGenerateRequest() as body:
            return await answer_compat(http, body)
        case ChatRequest() as chat:
            use_format(http, CHAT_ERRORS.response)
            return await answer_chat(http, chat)
        case CompletionRequest() as completion:
            use_format(http, COMPLETION_ERRORS.response)
            return await answer_completion(http, completion)


@router.post("/vertex", response_model=VertexResponse, responses=ERRORS)
async def vertex(http: HttpRequest) -> Response:
    """Generate a text for each instance. If one fails, the request fails."""
    state = state_of(http)
    body = await read_body(http, VertexRequest, state.settings.payload_limit)
    state.observer.arrived()
    if not body.instances:
        raise Refused(422, "Input validation error", "Input validation error")
    generations = [await _generation(state, instance) for instance in body.instances]
    work = _answers(state, generations, caller_of(http, "vertex_compatibility"))
    answers = await until_disconnect(http.receive, work)
    return json_response({"predictions": [answer.best.end.generated_text for answer in answers]})


async def _generation(
    state: AppState, instance: GenerateInstance | ChatRequest
) -> tuple[GenerateRequest, Extras]:
    """Translate an instance. Raises the errors of the chat route for a chat."""
    if isinstance(instance, ChatRequest):
        prompt = await prepare(state.engine.tokenizer, chat_of(instance))
        return prompt.request, prompt.extras
    given = instance.parameters or GenerateParameters()
    parameters = GenerateParameters(
        do_sample=True, max_new_tokens=given.max_new_tokens, seed=given.seed
    )
    return GenerateRequest(inputs=instance.inputs, parameters=parameters), NO_EXTRAS


async def _answers(
    state: AppState, generations: list[tuple[GenerateRequest, Extras]], caller: Caller
) -> list[Answer]:
    try:
        return await all_together(
            state.inference.complete(request, caller, extras, logprobs=False)
            for request, extras in generations
        )
    except REQUEST_ERRORS:
        raise Refused(500, "Incomplete generation", "Incomplete generation") from None
