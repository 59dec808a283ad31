"""Turns a sequence's token ids into its events: text, stop conditions, finish reason."""

from math import inf, isfinite

from engine.core.pipeline import SampledToken
from engine.core.request import (
    FinishReason,
    ReachedStop,
    Token,
    TokenOutput,
    new_token,
    new_token_output,
)
from engine.core.sequence import Sequence
from engine.core.stop_text import StopText
from engine.sampling.sampler import TIE_MARGIN
from engine.text.tokenizer import TextStream, Tokenizer


class SequenceOutput:
    """The text of one sequence so far. Call `push` once per token."""

    __slots__ = (
        "_before_stop",
        "_eos_token_ids",
        "_prompt_logprobs",
        "_prompt_top",
        "_seq",
        "_special_ids",
        "_stop_text",
        "_text",
        "_tokenizer",
    )

    def __init__(self, seq: Sequence, tokenizer: Tokenizer, eos_token_ids: frozenset[int]):
        self._seq = seq
        self._tokenizer = tokenizer
        self._special_ids = tokenizer.special_ids
        self._eos_token_ids = eos_token_ids
        self._text = TextStream(tokenizer, seq.request.prompt_ids)
        stop = seq.request.stopping.stop
        self._stop_text = StopText(stop) if stop else None
        self._before_stop: list[str] = []
        self._prompt_logprobs: list[float | None] = [None]
        self._prompt_top: list[list[tuple[int, float]]] = [[]]

    def push(
        self, token_id: int, logprob: float | None, top: list[tuple[int, float]]
    ) -> tuple[TokenOutput, FinishReason | None]:
        """Return the event of the sequence's last token, and the finish reason if it ends there.

        `top` has the best alternatives as (token id, logprob), best first.
        """
        special = token_id in self._special_ids
        text = self._text.push(token_id)
        self._look_for_stop(text, special)
        reason = self._finish_reason(token_id)
        if reason is not None and (held := self._text.flush()):
            self._look_for_stop(held, special)
            text += held
        token = new_token((token_id, text, _finite(logprob), special))
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

    def reached_stop(self) -> ReachedStop | None:
        """Return the first stop string in the text, whether or not it is what ended it."""
        if self._stop_text is None or self._stop_text.reached is None:
            return None
        return ReachedStop(self._stop_text.reached, "".join(self._before_stop))

    def _look_for_stop(self, text: str, special: bool) -> None:
        if self._stop_text is not None:
            self._before_stop.append(self._stop_text.push(text, special))

    def _finish_reason(self, token_id: int) -> FinishReason | None:
        seq, stopping = self._seq, self._seq.request.stopping
        if len(seq.token_ids) >= seq.max_tokens:
            return FinishReason.LENGTH
        if token_id in self._eos_token_ids and not (stopping.ignore_eos and seq.constraint is None):
            return FinishReason.EOS_TOKEN
        if seq.constraint is not None and seq.constraint.is_finished and not self._eos_token_ids:
            return FinishReason.EOS_TOKEN
        if self._stop_text is not None and self._stop_text.reached is not None:
            return FinishReason.STOP_SEQUENCE
        return None

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
