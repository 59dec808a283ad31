"""The events of the answers to a chat, in no dialect: a route's writer encodes them.

Each of the `n` answers has its own: one `Started`, then the deltas of its text, or one
`CallStarted` and the deltas of the call's arguments, then one `Ended`. The events of different
answers alternate. `choice` is the number of the answer, and `tokens` are the generated tokens that
an event stands for; each token belongs to one event.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from engine.core.request import Finished, TokenOutput

EndReason = Literal["stop", "length", "tool_calls"]


class Started(NamedTuple):
    """An answer begins. Its prompt has `num_prompt_tokens`."""

    choice: int
    num_prompt_tokens: int


class TextDelta(NamedTuple):
    """More of the text; empty for a token that shows none, such as the end of the sequence."""

    choice: int
    text: str
    tokens: Sequence[TokenOutput]


class CallStarted(NamedTuple):
    """The answer is the call of the tool `name`. The `id` is unique."""

    choice: int
    id: str
    name: str
    tokens: Sequence[TokenOutput]


class ArgumentsDelta(NamedTuple):
    """More of the call's arguments, which are one JSON object when joined."""

    choice: int
    text: str
    tokens: Sequence[TokenOutput]


class Ended(NamedTuple):
    """An answer is complete.

    reason    `length` if it was cut by the limit of tokens, `tool_calls` if it is a whole call
    finished  the engine's account: tokens of the prompt and the answer, why it ended
    """

    choice: int
    reason: EndReason
    finished: Finished


ChatEvent = Started | TextDelta | CallStarted | ArgumentsDelta | Ended
