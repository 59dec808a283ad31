"""A chat as every dialect's route translates its body to: messages, tools and how to generate."""

from dataclasses import dataclass, field

from pydantic import JsonValue

from api.generation.request import GenerateParameters
from api.generation.validation import Extras


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    `schema` is the JSON schema of its arguments, or None if it takes none. The arguments are an
    object whatever the schema says.
    """

    name: str
    description: str | None = None
    schema: JsonValue = None


@dataclass(frozen=True, slots=True)
class PastCall:
    """A call that an earlier message of the assistant made, with its `arguments` as they came: a
    string of JSON, or JSON.
    """

    id: str
    name: str
    arguments: JsonValue
    type: str = "function"
    description: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a chat. A tool's result names the call that it answers by `call_id`."""

    role: str
    text: str
    calls: tuple[PastCall, ...] = ()
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """What to answer, and how.

    messages     the conversation; if the last message is the assistant's, it is continued
    parameters   how to generate; a grammar there is the format of the answer
    extras       the parameters that TGI's own requests do not have
    tools        the functions that may be called; empty if the answer is a text
    must_call    whether one of the tools must be called; else the model may answer in words
    tool_prompt  what tells the model how to call a tool; None or "" for the usual text
    n            the number of answers
    logprobs     whether the answer shows logprobs
    """

    messages: tuple[Message, ...]
    parameters: GenerateParameters
    extras: Extras = field(default_factory=lambda: Extras(add_special_tokens=False))
    tools: tuple[Tool, ...] = ()
    must_call: bool = False
    tool_prompt: str | None = None
    n: int = 1
    logprobs: bool = False
