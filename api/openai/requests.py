"""The request bodies of the OpenAI routes: TGI's, and what OpenAI's own clients send in addition.

They accept more than TGI: null equals absent for every optional field, `stop` may be one string,
and `response_format` may have TGI's shape or OpenAI's. Unknown fields are ignored, among them those
that change nothing in an answer, such as `user`, `store` and `metadata`.
"""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from api.generation.request import WireRequest
from api.http.serde import (
    F32,
    SEED,
    U32,
    U32_MAX,
    no_variant,
    unexpected,
    untagged,
)


def _list_of_stops(value: object) -> object:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _list_of_prompts(value: object) -> object:
    if value == []:
        text = "Empty array detected. Do not use an empty array for the prompt."
        raise PydanticCustomError("serde", "{text}", {"text": text})
    is_one = isinstance(value, str) or (isinstance(value, list) and type(value[0]) is int)
    return [value] if is_one else value


_MAX_BIASES = 1024
_TOKEN_ID = re.compile(r"[0-9]{1,10}")


def _logit_bias(value: object) -> object:
    """Check that the keys are token ids, which JSON has as strings, and that there are not many:
    all of them are copied to the device in every step.
    """
    if isinstance(value, dict):
        if len(value) > _MAX_BIASES:
            text = f"invalid length {len(value)}, expected at most {_MAX_BIASES} tokens"
            raise PydanticCustomError("serde", "{text}", {"text": text})
        for key in value:
            if not _TOKEN_ID.fullmatch(key):
                text = f"invalid value: {unexpected(key)}, expected a token id"
                raise PydanticCustomError("serde", "{text}", {"text": text})
    return value


TokenId = Annotated[int, Field(ge=0, le=U32_MAX)]
"""An id in a long list, of which pydantic alone checks each in less time than `U32` does."""


def _other_than_text(modalities: object) -> object:
    """Return None for text, which is what every answer is."""
    return None if modalities == ["text"] else modalities


class StreamOptions(WireRequest):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Whether every chunk has the usage so far, as in vLLM."""


class OpenAIRequest(WireRequest):
    """The fields that chats and completions have in common.

    Those named in `unsupported` would change the answer in a way that cannot be done.
    """

    unsupported: ClassVar[tuple[str, ...]] = ()

    model: str | None = None
    max_tokens: U32 | None = None
    max_completion_tokens: U32 | None = None
    """The newer name of `max_tokens`. If both are given, this one counts."""
    temperature: F32 | None = None
    top_p: F32 | None = None
    frequency_penalty: F32 | None = None
    presence_penalty: F32 | None = None
    stop: Annotated[list[str], BeforeValidator(_list_of_stops)] = Field([])
    seed: SEED | None = None
    n: U32 | None = None
    logit_bias: Annotated[dict[str, F32] | None, BeforeValidator(_logit_bias)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @property
    def token_limit(self) -> int | None:
        """The most tokens that may be generated, or None for as many as there is room for."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_usage_in_every_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class FunctionDefinition(WireRequest):
    """The function of a tool or of a call. The `arguments` of a tool are their JSON schema."""

    description: str | None = None
    name: str
    arguments: JsonValue = Field(
        default=None, validation_alias=AliasChoices("parameters", "arguments")
    )


class Tool(WireRequest):
    type: str = "function"
    function: FunctionDefinition


class ToolCall(WireRequest):
    id: str
    type: str = "function"
    function: FunctionDefinition


class TextChunk(WireRequest):
    type: Literal["text"]
    text: str


class ImageUrl(WireRequest):
    url: str


class ImageChunk(WireRequest):
    type: Literal["image_url"]
    image_url: ImageUrl


class RefusalChunk(WireRequest):
    type: Literal["refusal"]
    refusal: str


Chunk = Annotated[TextChunk | ImageChunk | RefusalChunk, Field(discriminator="type")]


class Message(WireRequest):
    """A message of a chat. Its `content` may be null, but may be absent only if there are calls or
    a refusal.
    """

    role: str
    content: str | list[Chunk] | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _in_serdes_words(cls, value: Any, handler: ModelWrapValidatorHandler["Message"]) -> Any:
        try:
            message = handler(value)
        except ValidationError as error:
            if any(
                detail["loc"][:1] in (("content",), ("tool_calls",)) for detail in error.errors()
            ):
                raise no_variant("MessageBody") from None
            raise
        has_other = message.tool_calls or message.refusal
        if "content" not in message.model_fields_set and not has_other:
            raise no_variant("MessageBody")
        return message


class NamedFunction(WireRequest):
    name: str


class NamedTool(WireRequest):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(WireRequest):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolsChoice(WireRequest):
    """OpenAI's choice of some of the tools, of which one may or must be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class OpenAISchema(WireRequest):
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")


class ResponseFormat(WireRequest):
    """TGI's format, which has a `value`, or OpenAI's, which has a `json_schema` or neither. A
    `json_object` that has neither means any object.
    """

    type: Literal["json", "json_object", "regex", "json_schema", "text"]
    value: JsonValue = None
    json_schema: OpenAISchema | None = None

    @model_validator(mode="after")
    def _needs_a_value(self) -> "ResponseFormat":
        may_lack_it = self.type in ("json_object", "text") or self.json_schema is not None
        if self.value is None and not may_lack_it:
            raise PydanticCustomError("serde", "missing field `value`")
        return self


ToolChoice = str | NamedTool | AllowedToolsChoice


class ChatRequest(OpenAIRequest):
    """A body of `/v1/chat/completions`."""

    unsupported: ClassVar[tuple[str, ...]] = (
        "audio",
        "function_call",
        "functions",
        "modalities",
        "web_search_options",
    )

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: list[Tool] | None = None
    tool_choice: Annotated[ToolChoice | None, untagged("ToolTypeDeserializer")] = None
    parallel_tool_calls: bool | None = None
    """Accepted, and permitted either way: an answer has at most one call."""
    tool_prompt: str | None = None
    response_format: ResponseFormat | None = None
    audio: JsonValue = None
    function_call: JsonValue = None
    functions: JsonValue = None
    modalities: Annotated[JsonValue, BeforeValidator(_other_than_text)] = None
    web_search_options: JsonValue = None


class CompletionRequest(OpenAIRequest):
    """A body of `/v1/completions`. A prompt is a text or a list of token ids."""

    unsupported: ClassVar[tuple[str, ...]] = ("suffix",)

    prompt: Annotated[
        list[str] | list[list[TokenId]],
        untagged("PromptDeserializer"),
        BeforeValidator(_list_of_prompts),
    ]
    suffix: JsonValue = None
    best_of: U32 | None = None
    echo: bool | None = None
    logprobs: U32 | None = None
    """How many of the likeliest tokens to tell beside each token of the answer."""
    repetition_penalty: F32 | None = None
