"""Turns a sequence's token ids into its events: text, stop conditions, finish reason."""

from math import inf, isfinite

from engine.core.pipeline import SampledToken
from engine.core.request import (
    FinishReason,
    Token,
    TokenOutput,
    new_token,
    new_token_output,
)
from engine.core.sequence import Sequence
from engine.sampling.sampler import TIE_MARGIN
from engine.text.tokenizer import TextStream, Tokenizer

_STOP_WINDOW = 200
"""Characters of recent text that stop sequences are compared with, as in TGI."""


class SequenceOutput:
    """The text of one sequence so far. Call `push` once per token."""

    __slots__ = (
        "_eos_token_ids",
        "_prompt_logprobs",
        "_prompt_top",
        "_seq",
        "_special_ids",
        "_tail",
        "_text",
        "_tokenizer",
    )

    def __init__(self, seq: Sequence, tokenizer: Tokenizer, eos_token_ids: frozenset[int]):
        self._seq = seq
        self._tokenizer = tokenizer
        self._special_ids = tokenizer.special_ids
        self._eos_token_ids = eos_token_ids
        self._text = TextStream(tokenizer, seq.request.prompt_ids)
        self._tail = ""
        self._prompt_logprobs: list[float | None] = [None]
        self._prompt_top: list[list[tuple[int, float]]] = [[]]

    def push(
        self, token_id: int, logprob: float | None, top: list[tuple[int, float]]
    ) -> tuple[TokenOutput, FinishReason | None]:
        """Return the event of the sequence's last token, and the finish reason if it ends there.

        `top` has the best alternatives as (token id, logprob), best first.
        """
        text = self._text.push(token_id)
        reason = self._finish_reason(token_id, text)
        if reason is not None:
            text += self._text.flush()
        token = new_token((token_id, text, _finite(logprob), token_id in self._special_ids))
        top = _best(top, self._seq.request.sampling.top_n_tokens) if top else top
        return new_token_output((token, self._tokens(top) if top else ())), reason

    def add_prompt_tokens(self, start: int, tokens: list[SampledToken]) -> None:
        """Store the logprobs of the tokens after `start`. After a preemption the same positions
        are reported again.
        """
        n, places = self._seq.request.prompt_top_tokens, slice(start + 1, start + 1 + len(tokens))
        self._prompt_logprobs[places] = [token.logprob for token in tokens]
        if n:
            self._prompt_top[places] = [_best(token.top, n) for token in tokens]

    def prompt(self) -> tuple[Token, ...]:
        """Return the prompt's tokens with their logprobs, if those were requested."""
        request, tokenizer = self._seq.request, self._tokenizer
        if not request.prompt_logprobs:
            return ()
        pairs = zip(request.prompt_ids, self._prompt_logprobs, strict=True)
        return tuple(
            Token(i, tokenizer.token_text(i), _finite(p), i in tokenizer.special_ids)
            for i, p in pairs
        )

    def prompt_top_tokens(self) -> tuple[tuple[Token, ...], ...]:
        """Return the alternatives at each of the prompt's tokens, if those were requested."""
        request = self._seq.request
        if not (request.prompt_logprobs and request.prompt_top_tokens):
            return ()
        return tuple(map(self._tokens, self._prompt_top))

    def generated_text(self) -> str:
        seq = self._seq
        return self._tokenizer.generated_text(
            seq.request.prompt_ids, seq.token_ids[seq.num_prompt_tokens :]
        )

    def _finish_reason(self, token_id: int, text: str) -> FinishReason | None:
        seq, stopping = self._seq, self._seq.request.stopping
        if len(seq.token_ids) >= seq.max_tokens:
            return FinishReason.LENGTH
        if token_id in self._eos_token_ids and not (stopping.ignore_eos and seq.constraint is None):
            return FinishReason.EOS_TOKEN
        if seq.constraint is not None and seq.constraint.is_finished and not self._eos_token_ids:
            return FinishReason.EOS_TOKEN
        if stopping.stop and self._reached_stop(text, stopping.stop):
            return FinishReason.STOP_SEQUENCE
        return None

    def _reached_stop(self, text: str, stop: tuple[str, ...]) -> bool:
        """Whether the text ends with a stop string, ignoring one final newline."""
        window = max(_STOP_WINDOW, *(len(s) + 1 for s in stop))
        self._tail = (self._tail + text)[-window - len(text) :]
        return self._tail.endswith(stop) or (
            self._tail.endswith("\n") and self._tail[:-1].endswith(stop)
        )

    def _tokens(self, pairs: list[tuple[int, float]]) -> tuple[Token, ...]:
        tokenizer = self._tokenizer
        return tuple(
            Token(i, tokenizer.token_text(i), logprob, i in tokenizer.special_ids)
            for i, logprob in pairs
        )


def _best(top: list[tuple[int, float]], n: int) -> list[tuple[int, float]]:
    """Return the alternatives that are at least as likely as the n-th best.

    At most `TIE_MARGIN` ties are returned, as many as the request would get alone. Tokens that
    the logits processors excluded are left out.
    """
    threshold = max(top[min(n, len(top)) - 1][1], -inf)
    return [
        (i, logprob)
        for i, logprob in top[: n + TIE_MARGIN]
        if logprob >= threshold and logprob != -inf
    ]


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is not None and isfinite(logprob) else None
