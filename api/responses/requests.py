"""The request body of `/v1/responses`. Null equals absent for every optional field. Unknown fields
are ignored, among them those that change nothing in an answer, such as `user` and `reasoning`.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue

from api.generation.request import WireRequest
from api.http.serde import F32, U32, Vec, tagged, text_or_list, untagged


class TextPart(WireRequest):
    type: Literal["input_text", "output_text"]
    text: str


class RefusalPart(WireRequest):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[
    TextPart | RefusalPart,
    tagged({"input_text": TextPart, "output_text": TextPart, "refusal": RefusalPart}),
]
Content = Annotated[str | Vec[Part], text_or_list(Part)]


class MessageItem(WireRequest):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(WireRequest):
    """A call that an earlier answer made. The `arguments` are JSON."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(WireRequest):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningItem(WireRequest):
    """What a model thought before an earlier answer. It is not shown to the model again."""

    type: Literal["reasoning"]


Item = Annotated[
    MessageItem | CallItem | CallOutputItem | ReasoningItem,
    tagged(
        {
            "message": MessageItem,
            "function_call": CallItem,
            "function_call_output": CallOutputItem,
            "reasoning": ReasoningItem,
        },
        default="message",
    ),
]


class FunctionTool(WireRequest):
    """A tool. Its `parameters` are the JSON schema of a call's arguments, which they always follow,
    whatever `strict` is.
    """

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class ToolChoiceFunction(WireRequest):
    type: Literal["function"]
    name: str


class ToolChoiceAllowed(WireRequest):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Vec[ToolChoiceFunction]


class PlainFormat(WireRequest):
    type: Literal["text", "json_object"]


class SchemaFormat(WireRequest):
    type: Literal["json_schema"]
    name: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")


Format = Annotated[
    PlainFormat | SchemaFormat,
    tagged({"text": PlainFormat, "json_object": PlainFormat, "json_schema": SchemaFormat}),
]


class TextConfig(WireRequest):
    format: Format | None = None


Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""What can be asked to be in an answer. Only logprobs are ever there to be included."""


class ResponsesRequest(WireRequest):
    """A body of `/v1/responses`. Nothing is stored, whatever `store` is.

    Those fields that `unsupported` names would change the answer in a way that cannot be done.
    """

    unsupported: ClassVar[tuple[str, ...]] = (
        "previous_response_id",
        "conversation",
        "background",
        "prompt",
        "moderation",
    )

    model: str | None = None
    input: Annotated[str | Vec[Item], text_or_list(Item)]
    instructions: str | None = None
    max_output_tokens: U32 | None = None
    temperature: F32 | None = None
    top_p: F32 | None = None
    top_logprobs: U32 | None = None
    include: Vec[Includable] | None = None
    tools: Vec[Annotated[FunctionTool, tagged({"function": FunctionTool})]] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ToolChoiceFunction | ToolChoiceAllowed | None,
        untagged("ToolChoice"),
    ] = None
    parallel_tool_calls: bool | None = None
    """Either way an answer has at most one call."""
    text: TextConfig | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None

    previous_response_id: str | None = None
    conversation: JsonValue = None
    background: bool | None = None
    prompt: JsonValue = None
    moderation: JsonValue = None

    @property
    def has_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)
