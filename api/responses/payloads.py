"""The JSON of a response and of its output items."""

import uuid
from collections.abc import Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from api.chat.answer import Call, ChatAnswer
from api.chat.events import Ended
from api.generation.state import AppState
from api.openai.chat_payloads import chat_logprobs
from api.openai.payloads import created_and_model
from api.openai.responses import TokenLogprob
from api.responses.requests import ResponsesRequest, TextConfig
from engine.core.request import Finished, TokenOutput

Status = Literal["in_progress", "completed", "incomplete", "failed"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(TypedDict):
    type: Literal["message"]
    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCall(TypedDict):
    type: Literal["function_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | FunctionCall


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseFailure(TypedDict):
    code: str
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseObject(TypedDict):
    """A response. The fields that are None throughout are those of features that are not there."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: Sequence[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, None]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


def new_item_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class Response:
    """One response from its creation to its end, which repeats what it was asked for."""

    def __init__(self, state: AppState, body: ResponsesRequest) -> None:
        self._id = new_item_id("resp")
        self._created, self._model = created_and_model(state, body.model)
        self._body = body

    def begun(self) -> ResponseObject:
        return self._json("in_progress")

    def ended(self, output: OutputItem, end: Ended) -> ResponseObject:
        usage = _usage(end.finished)
        if end.reason == "length":
            return self._json("incomplete", [output], usage, {"reason": "max_output_tokens"})
        return self._json("completed", [output], usage)

    def failed(self, output: Sequence[OutputItem], failure: ResponseFailure) -> ResponseObject:
        return self._json("failed", output, error=failure)

    def _json(
        self,
        status: Status,
        output: Sequence[OutputItem] = (),
        usage: ResponseUsage | None = None,
        incomplete: IncompleteDetails | None = None,
        error: ResponseFailure | None = None,
    ) -> ResponseObject:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": _text_config(body.text),
            "tool_choice": _tool_choice(body),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": usage,
        }


def output_item(answer: ChatAnswer, has_logprobs: bool) -> OutputItem:
    """Return the one item of a complete answer."""
    assert answer.end is not None
    status = item_status(answer.end)
    if answer.call is not None:
        return call_item(new_item_id("fc"), answer.call, status)
    logprobs = token_logprobs(answer.tokens) if has_logprobs else []
    return message_item(new_item_id("msg"), answer.text, logprobs, status)


def message_item(
    id: str, text: str, logprobs: list[TokenLogprob], status: ItemStatus
) -> OutputMessage:
    return {
        "type": "message",
        "id": id,
        "status": status,
        "role": "assistant",
        "content": [output_text(text, logprobs)],
    }


def output_text(text: str, logprobs: list[TokenLogprob]) -> OutputText:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def call_item(id: str, call: Call, status: ItemStatus) -> FunctionCall:
    return {
        "type": "function_call",
        "id": id,
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def token_logprobs(outputs: Sequence[TokenOutput]) -> list[TokenLogprob]:
    return chat_logprobs(outputs)["content"]


def item_status(end: Ended) -> ItemStatus:
    return "incomplete" if end.reason == "length" else "completed"


def _usage(end: Finished) -> ResponseUsage:
    return {
        "input_tokens": end.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": end.num_generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": end.num_prompt_tokens + end.num_generated_tokens,
    }


def _text_config(text: TextConfig | None) -> dict[str, Any]:
    if text is None or text.format is None:
        return {"format": {"type": "text"}}
    return {"format": text.format.model_dump(by_alias=True)}


def _tool_choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    return choice.model_dump()
