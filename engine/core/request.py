"""The messages that go into the engine and come out of it: frozen, without behaviour.

A `Request` is valid when it is built: its builder has checked every limit, and the engine does
not check again. The engine answers each accepted request with any number of `TokenOutput` and
then exactly one `Finished` or `Failed`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import NamedTuple, Protocol, cast


class FinishReason(StrEnum):
    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, in Text Generation Inference's order of steps.

    The default of each parameter switches its step off. `seed` (u64) is the only source of
    randomness, and is unused when `do_sample` is False. `watermark` makes the generated text
    detectable (see `kernels/watermark.py`).

    `logit_bias` has (token id, bias) pairs, each id once and within the model's vocabulary: the
    bias is added to the token's logit before any other step. A token that a grammar forbids stays
    forbidden.

    `frequency_penalty` is Text Generation Inference's, times the token's share of the context.
    `output_frequency_penalty` is OpenAI's, times how often the token was generated. A request
    uses at most one of them, for the device counts the tokens of a prompt only for the first.

    `logprobs` returns the logprob of the chosen token, `top_n_tokens` that many alternatives with
    their logprobs. They are those of the scores that the token is chosen by, or with
    `raw_logprobs` those of the model's own distribution, as if no other parameter and no grammar
    were there.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    output_frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: bool = False
    top_n_tokens: int = 0
    raw_logprobs: bool = False
    watermark: bool = False

    @property
    def reports_raw(self) -> bool:
        """Whether logprobs of the model's own distribution are returned."""
        return self.raw_logprobs and (self.logprobs or self.top_n_tokens > 0)


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When a sequence ends. `max_new_tokens` is at least 1.

    It ends with the token that completes a string of `stop`, none of which is empty, wherever in
    the token's text that is.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class ConstraintState(Protocol):
    """How far one sequence has followed its `TokenConstraint`."""

    def accept(self, token_id: int) -> None:
        """The sequence goes on with this token."""

    def forced(self) -> list[int]:
        """The tokens that must come next; empty where the constraint leaves a choice."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the sequence may follow."""

    @property
    def error(self) -> str:
        """Why the constraint cannot be followed any further; empty while it can."""


class TokenConstraint(Protocol):
    """What the tokens of a sequence have to follow, such as a compiled grammar.

    `warnings` say which parts of it are not enforced.
    """

    @property
    def warnings(self) -> tuple[str, ...]: ...

    def start(self) -> ConstraintState:
        """The state of a sequence that has generated nothing."""


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. `prompt_ids` is not empty and leaves room for one token.

    Sequences share cached prefixes only under the same `cache_salt`, so that no client can learn
    from timing what another has sent. It must come from verified credentials, never from a
    request's body.

    `prompt_logprobs` returns the prompt's tokens with their logprobs in the model's own
    distribution, and then `prompt_top_tokens` that many alternatives at each position.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    stopping: StoppingParams
    cache_salt: bytes = b""
    grammar: TokenConstraint | None = None
    prompt_logprobs: bool = False
    prompt_top_tokens: int = 0


class Token(NamedTuple):
    """A token and its text. `logprob` is None if it was not requested or is not finite."""

    id: int
    text: str
    logprob: float | None
    special: bool


class TokenOutput(NamedTuple):
    """One generated token; `top_tokens` is empty unless alternatives were requested."""

    token: Token
    top_tokens: tuple[Token, ...] = ()


# Both are made for every token. A named tuple takes a third of the time of a frozen dataclass, and
# skipping the checks of its `__new__` a third of that.
new_token = cast(
    Callable[[tuple[int, str, float | None, bool]], Token], partial(tuple.__new__, Token)
)
new_token_output = cast(
    Callable[[tuple[Token, tuple[Token, ...]]], TokenOutput], partial(tuple.__new__, TokenOutput)
)


class ReachedStop(NamedTuple):
    """A stop string that is in the generated text, and the text before it.

    `text_before` has no special tokens, like `generated_text`.
    """

    string: str
    text_before: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a sequence that ended as requested.

    generated_text     without special tokens and without the prompt; with all of its last token
    seed               None for greedy decoding
    queue_s            seconds from acceptance to the first step
    inference_s        seconds from the first step to the end
    prompt             the prompt's tokens with their logprobs, if those were requested
    prompt_top_tokens  the alternatives at each of the prompt's tokens, if those were requested;
                       none at the first token, which nothing predicts
    stop               the stop string that the last token completed, also where that token ends the
                       sequence for another `reason`, which is then the one that is told
    """

    reason: FinishReason
    generated_text: str
    num_prompt_tokens: int
    num_generated_tokens: int
    seed: int | None
    queue_s: float
    inference_s: float
    prompt: tuple[Token, ...] = ()
    prompt_top_tokens: tuple[tuple[Token, ...], ...] = ()
    stop: ReachedStop | None = None

    @property
    def text_before_stop(self) -> str:
        """The generated text up to its stop string; all of it if there is none."""
        return self.generated_text if self.stop is None else self.stop.text_before


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a sequence that could not be finished; `message` says why."""

    message: str


Event = TokenOutput | Finished | Failed


class Delivery(NamedTuple):
    """What a request receives at one time: its next tokens, and its end once that is reached.

    A delivery is never empty, and a `Finished` comes together with the last token.
    """

    tokens: list[TokenOutput]
    end: Finished | Failed | None
