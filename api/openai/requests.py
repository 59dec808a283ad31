"""The request bodies of the OpenAI routes: TGI's, and what OpenAI's own clients send in addition.

They accept more than TGI: null equals absent for every optional field, `stop` may be one string,
and `response_format` may have TGI's shape or OpenAI's. Unknown fields are ignored, `logit_bias`
and `user` among them.
"""

from typing import Annotated, Any, Literal

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
    U32,
    U64,
    Vec,
    no_variant,
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
    return [value] if isinstance(value, str) else value


class StreamOptions(WireRequest):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Whether every chunk has the usage so far, as in vLLM."""


class OpenAIRequest(WireRequest):
    """The fields that chats and completions have in common."""

    model: str | None = None
    max_tokens: U32 | None = None
    max_completion_tokens: U32 | None = None
    """The newer name of `max_tokens`. If both are given, this one counts."""
    temperature: F32 | None = None
    top_p: F32 | None = None
    frequency_penalty: F32 | None = None
    presence_penalty: F32 | None = None
    stop: Annotated[Vec[str], BeforeValidator(_list_of_stops)] = Field([])
    seed: U64 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

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


Chunk = Annotated[TextChunk | ImageChunk, Field(discriminator="type")]


class Message(WireRequest):
    """A message of a chat. Its `content` may be null, but may be absent only if there are calls."""

    role: str
    content: str | Vec[Chunk] | None = None
    tool_calls: Vec[ToolCall] | None = None

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
        if "content" not in message.model_fields_set and not message.tool_calls:
            raise no_variant("MessageBody")
        return message


class NamedFunction(WireRequest):
    name: str


class NamedTool(WireRequest):
    type: Literal["function"]
    function: NamedFunction


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


class ChatRequest(OpenAIRequest):
    messages: Vec[Message]
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: Vec[Tool] | None = None
    tool_choice: Annotated[str | NamedTool | None, untagged("ToolTypeDeserializer")] = None
    tool_prompt: str | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(OpenAIRequest):
    prompt: Annotated[Vec[str], untagged("PromptDeserializer"), BeforeValidator(_list_of_prompts)]
    suffix: str | None = None
    repetition_penalty: F32 | None = None
