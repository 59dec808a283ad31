"""The JSON of the OpenAI routes' responses: typed dicts in the order of TGI's keys."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(TypedDict):
    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(TypedDict):
    name: str
    arguments: str


class ToolCallJson(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCallJson]]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: Logprobs | None
    finish_reason: str


class ChatCompletion(TypedDict):
    object: Literal["chat.completion"]
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: str | None


class ChatCompletionChunk(TypedDict):
    object: Literal["chat.completion.chunk"]
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]


class CompletionLogprobs(TypedDict):
    """The logprobs of a completion's tokens, each in four lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """A completion, or a part of one in a stream: its `finish_reason` is null but in the last."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class CompletionHead(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str


class Completion(CompletionHead):
    """An answer, or a chunk of one."""

    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class ModelInfo(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsInfo(TypedDict):
    object: Literal["list"]
    data: list[ModelInfo]


class SimpleToken(TypedDict):
    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(TypedDict):
    tokenize_response: list[SimpleToken]
    templated_text: str


class VertexResponse(TypedDict):
    predictions: list[str]
