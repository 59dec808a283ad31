"""One choice of a completion: its text, and its logprobs in the older of OpenAI's two shapes."""

from collections.abc import Iterable, Sequence

from api.generation.contract import f32
from api.openai.responses import CompletionLogprobs
from engine.core.request import Finished, Token, TokenOutput


class LogprobsWriter:
    """Writes the logprobs of one choice's tokens, the prompt's first if that is echoed.

    An entry's alternatives are the `num_top` likeliest tokens by their text, and its own token. Of
    tokens with the same text, such as parts of characters, the likeliest counts.
    """

    def __init__(self, num_top: int, echo: str) -> None:
        self._num_top = num_top
        self._echo = echo
        self._offset = len(echo)

    def prompt(self, end: Finished) -> CompletionLogprobs:
        """Return the entries of the prompt, of which there are none unless they were asked for. The
        first token has no logprob.
        """
        tokens = end.prompt
        offsets = text_offsets(self._echo, [token.text for token in tokens])
        tops = end.prompt_top_tokens or [()] * len(tokens)
        alternatives = [self._alternatives(*pair) for pair in zip(tokens, tops, strict=True)]
        return _logprobs(tokens, offsets, [None, *alternatives[1:]] if tokens else [])

    def generated(self, outputs: Sequence[TokenOutput]) -> CompletionLogprobs:
        """Return the entries of the next generated tokens."""
        offsets = []
        for token, _ in outputs:
            offsets.append(self._offset)
            self._offset += 0 if token.special else len(token.text)
        tops = [self._alternatives(token, top_tokens) for token, top_tokens in outputs]
        return _logprobs([token for token, _ in outputs], offsets, tops)

    def _alternatives(self, token: Token, top: Iterable[Token]) -> dict[str, float | None]:
        best = list(top)[: self._num_top]
        alternatives: dict[str, float | None] = {}
        for other in best if any(other.id == token.id for other in best) else [*best, token]:
            alternatives.setdefault(other.text, f32(other.logprob))
        return alternatives


def joined(parts: Iterable[CompletionLogprobs]) -> CompletionLogprobs:
    """Return the entries of all `parts` in one."""
    whole = _logprobs([], [], [])
    for part in parts:
        whole["tokens"] += part["tokens"]
        whole["token_logprobs"] += part["token_logprobs"]
        whole["top_logprobs"] += part["top_logprobs"]
        whole["text_offset"] += part["text_offset"]
    return whole


def text_offsets(text: str, pieces: Iterable[str]) -> list[int]:
    """Return where in `text` each token begins, of which `pieces` has the text when it is alone.

    A piece that is not in the text, such as a part of a character or a special token that was put
    in front, may stand for one character at most. The next one is searched behind it.
    """
    offsets, offset, num_unseen = [], 0, 0
    for piece in pieces:
        # A token alone may lack the space before it, which is one character more.
        place = text.find(piece, offset, offset + num_unseen + len(piece) + 1)
        if place >= 0:
            offset = place
        offsets.append(offset)
        offset += len(piece) if place >= 0 else 0
        num_unseen = 0 if place >= 0 else num_unseen + 1
    return offsets


def _logprobs(
    tokens: Sequence[Token],
    offsets: list[int],
    alternatives: Sequence[dict[str, float | None] | None],
) -> CompletionLogprobs:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [f32(token.logprob) for token in tokens],
        "top_logprobs": list(alternatives),
        "text_offset": offsets,
    }
