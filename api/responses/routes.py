"""OpenAI's Responses API: the route that creates a response. Nothing is stored, so no other route
of that API has anything to answer.
"""

from functools import partial

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from api.chat.answer import ChatAnswer
from api.chat.serving import serve_chat
from api.generation.state import state_of
from api.http.body import read_body
from api.http.errors import ErrorFormat
from api.openai.errors import RESPONSES, OpenAIErrors
from api.responses.payloads import Response, ResponseObject, output_item
from api.responses.requests import ResponsesRequest
from api.responses.stream import EventWriter
from api.responses.translation import chat_of

BODIES: dict[str, type[BaseModel]] = {"/v1/responses": ResponsesRequest}
_ERRORS = OpenAIErrors(
    {
        "inputs": "input",
        "max_new_tokens": "max_output_tokens",
        "grammar": "text.format",
        "top_n_tokens": "top_logprobs",
    }
)
ERROR_FORMATS: dict[str, ErrorFormat] = {"/v1/responses": _ERRORS.response}

router = APIRouter()


@router.post("/v1/responses", response_model=ResponseObject, responses=RESPONSES)
async def responses(http: HttpRequest) -> HttpResponse:
    """Answer as a response, with typed server-sent events if `stream` is true."""
    state = state_of(http)
    body = await read_body(http, ResponsesRequest, state.settings.payload_limit)
    response = Response(state, body)

    def encode(answers: list[ChatAnswer]) -> ResponseObject:
        (answer,) = answers
        assert answer.end is not None
        return response.ended(output_item(answer, body.has_logprobs), answer.end)

    writer = EventWriter(response, body.has_logprobs) if body.stream else None
    return await serve_chat(http, "responses", partial(chat_of, body), encode, writer)
