"""Text to ids, and ids back to text piece by piece.

Encoding is safe from several threads at once: nothing on the underlying tokenizer is
changed after load (truncation is applied to the encoding, not configured).
"""

from collections.abc import Sequence as Seq
from functools import lru_cache

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 5


class Tokenizer:
    """A model's tokenizer. Needs its fast form, which transformers makes where it can."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.fast: FastTokenizer = tokenizer.backend_tokenizer
        self.fast.no_truncation()
        self.fast.no_padding()
        self._hf = tokenizer
        self._num_special = self.fast.num_special_tokens_to_add(is_pair=False)
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in added if token.special
        }
        self.token_text = lru_cache(maxsize=1 << 16)(self._token_text)

    @property
    def eos_token_id(self) -> int | None:
        return self._hf.eos_token_id

    @property
    def max_length(self) -> int:
        return int(self._hf.model_max_length)

    def encode(
        self, text: str, truncate: int | None = None, add_special_tokens: bool = True
    ) -> list[int]:
        """Ids of `text`; with `truncate`, at most that many, keeping the last ones.

        Special tokens that the tokenizer puts around a text stay in place.
        """
        encoding = self.fast.encode(text, add_special_tokens=False)
        if truncate is not None:
            num_special = self._num_special if add_special_tokens else 0
            encoding.truncate(max(truncate - num_special, 0), direction="left")
        if add_special_tokens:
            encoding = self.fast.post_process(encoding, add_special_tokens=True)
        return list(encoding.ids)

    def decode(self, token_ids: Seq[int], skip_special_tokens: bool) -> str:
        return self.fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def _token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def generated_text(self, prompt_ids: Seq[int], generated_ids: Seq[int]) -> str:
        """The text that `generated_ids` add to the prompt, without special tokens.

        The last prompt token is decoded along, so that a leading space survives.
        """
        context = prompt_ids[-1:]
        text = self.decode([*context, *generated_ids], skip_special_tokens=True)
        return text[len(self.decode(context, skip_special_tokens=True)) :]


class TextStream:
    """The pieces of text that a sequence's tokens add, one after the other.

    Text Generation Inference's incremental decoding: a token that does not complete a
    character adds "", and the one that does adds all of it. Special tokens are kept.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Seq[int]):
        self._tokenizer = tokenizer
        self._context = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._held: list[int] = []
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        text: str | None = self._stream.step(self._tokenizer.fast, token_id)
        if text is None:
            self._held.append(token_id)
            return ""
        self._context = [*self._held, token_id]
        self._held.clear()
        return text

    def flush(self) -> str:
        """What is still held back when the sequence ends within a character."""
        if not self._held:
            return ""
        decode = self._tokenizer.decode
        before = decode(self._context, skip_special_tokens=False)
        return decode([*self._context, *self._held], skip_special_tokens=False)[len(before) :]
