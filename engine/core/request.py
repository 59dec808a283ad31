"""What goes into the engine and what comes out: frozen messages, no behaviour.

A `Request` is right by construction: whoever builds it has checked every limit, so
nothing in the engine asks again. Each accepted request is answered by any number of
`TokenOutput` and then exactly one `Finished` or `Failed`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from engine.text.grammar import Grammar


class FinishReason(StrEnum):
    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, in Text Generation Inference's order.

    Neutral values switch a step off: temperature 1, top_k 0, top_p 1, typical_p 1,
    penalties 1, 0 and 0. `seed` (u64) is the whole source of randomness; it is unused
    when `do_sample` is False. `logprobs` asks for the chosen token's logprob,
    `top_n_tokens` for that many alternatives with theirs. `watermark` marks the choices.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logprobs: bool = False
    top_n_tokens: int = 0
    watermark: bool = False


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When the sequence ends. `max_new_tokens` is at least 1."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. `prompt_ids` is not empty and leaves room for one token.

    `cache_salt` separates prefix-cache entries of identities that must not see each
    other's timing; it comes from verified credentials, never from a request's body.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    stopping: StoppingParams
    cache_salt: bytes = b""
    grammar: "Grammar | None" = None
    prompt_logprobs: bool = False


class Token(NamedTuple):
    """`logprob` is None where it was not asked for or is not finite."""

    id: int
    text: str
    logprob: float | None
    special: bool


class TokenOutput(NamedTuple):
    """One generated token; `top_tokens` is empty unless asked for."""

    token: Token
    top_tokens: tuple[Token, ...] = ()


# Both are made for each token. A named tuple takes a third of a frozen dataclass's time, and
# past the checks of its `__new__`, from a tuple of all its fields, a third of that again.
new_token = cast(
    Callable[[tuple[int, str, float | None, bool]], Token], partial(tuple.__new__, Token)
)
new_token_output = cast(
    Callable[[tuple[Token, tuple[Token, ...]]], TokenOutput], partial(tuple.__new__, TokenOutput)
)


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a sequence that ended well.

    `generated_text` has no special tokens and no prompt. `seed` is None for greedy.
    `queue_s` runs from acceptance to the first step, `inference_s` from there on.
    `prompt` are the prompt's tokens with their logprobs, if those were asked for.
    """

    reason: FinishReason
    generated_text: str
    num_prompt_tokens: int
    num_generated_tokens: int
    seed: int | None
    queue_s: float
    inference_s: float
    prompt: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a sequence that could not be finished, and why."""

    message: str


Event = TokenOutput | Finished | Failed


class Delivery(NamedTuple):
    """What a request receives at one time: its next tokens, and its end once that is reached.

    A delivery is never empty, and a `Finished` comes together with the last token.
    """

    tokens: list[TokenOutput]
    end: Finished | Failed | None
