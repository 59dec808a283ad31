"""The request bodies of the Messages API. Null equals absent for every optional field. Unknown
fields are ignored, among them those that change nothing in an answer, such as `cache_control`,
`metadata` and `thinking`.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from api.generation.request import WireRequest
from api.http.serde import F32, I32, U32, Vec, tagged, text_or_list


class TextBlock(WireRequest):
    type: Literal["text"]
    text: str


Texts = Annotated[
    str | Vec[Annotated[TextBlock, tagged({"text": TextBlock})]],
    text_or_list(Annotated[TextBlock, tagged({"text": TextBlock})]),
]


class ToolUseBlock(WireRequest):
    """A call that an earlier answer made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, JsonValue]


class ToolResultBlock(WireRequest):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = ""
    is_error: bool | None = None


class ThinkingBlock(WireRequest):
    """What a model thought before an earlier answer. It is not shown to the model again."""

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock,
    tagged(
        {
            "text": TextBlock,
            "tool_use": ToolUseBlock,
            "tool_result": ToolResultBlock,
            "thinking": ThinkingBlock,
            "redacted_thinking": ThinkingBlock,
        }
    ),
]


class MessageParam(WireRequest):
    role: Literal["user", "assistant", "system"]
    content: Annotated[str | Vec[Block], text_or_list(Block)]


class ToolParam(WireRequest):
    """A tool. Its `input_schema` is the JSON schema of a call's `input`."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, JsonValue]


class ToolChoiceParam(WireRequest):
    """Which tools may be called. `disable_parallel_tool_use` is ignored: an answer has at most one
    call.
    """

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None

    @model_validator(mode="after")
    def _needs_a_name(self) -> "ToolChoiceParam":
        if self.type == "tool" and self.name is None:
            raise PydanticCustomError("serde", "missing field `name`")
        return self


class JsonOutputFormat(WireRequest):
    type: Literal["json_schema"]
    schema_: dict[str, JsonValue] = Field(alias="schema")


class OutputConfig(WireRequest):
    format: JsonOutputFormat | None = None


class PromptRequest(WireRequest):
    """The fields that make the prompt: a body of `/v1/messages/count_tokens`."""

    model: str
    messages: Vec[MessageParam]
    system: Texts | None = None
    tools: Vec[Annotated[ToolParam, tagged({"custom": ToolParam}, default="custom")]] | None = None
    tool_choice: ToolChoiceParam | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(PromptRequest):
    """A body of `/v1/messages`. Nothing is stored, so `messages` must be the whole conversation.

    Those fields that `unsupported` names would change the answer in a way that cannot be done.
    """

    unsupported: ClassVar[tuple[str, ...]] = ("thread", "mcp_servers", "compaction")

    max_tokens: U32
    stop_sequences: Vec[str] | None = None
    temperature: F32 | None = None
    top_k: I32 | None = None
    top_p: F32 | None = None
    stream: bool | None = None

    thread: JsonValue = None
    mcp_servers: JsonValue = None
    compaction: JsonValue = None
