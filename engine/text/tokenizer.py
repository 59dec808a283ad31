"""Converts text to token ids, and ids back to text, piece by piece.

Encoding is thread-safe: nothing on the underlying tokenizer is changed after load, since
truncation is applied to the encoding instead of being configured.
"""

import json
import re
from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from engine.text import encoding
from engine.text.chat_template import ChatTemplate
from engine.text.encoding import TokenSpans
from engine.text.long_text import LongTexts, is_long

_ANCHOR = "a"
_BYTE_TOKEN = re.compile("<0x..>")
_CONTEXT_TOKENS = 5
_CONTEXT_FREE_DECODERS = frozenset(
    ("ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip")
)
"""Decoders under which a token of whole characters gives the same text after any token."""
_INCOMPLETE = "\ufffd"
_MAX_UTF8_BYTES = 4


class Tokenizer:
    """A model's tokenizer, in the fast form that transformers makes for most models."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.fast: FastTokenizer = tokenizer.backend_tokenizer
        self.fast.no_truncation()
        self.fast.no_padding()
        if isinstance(self.fast.pre_tokenizer, pre_tokenizers.ByteLevel):
            # transformers may give a tokenizer from a GGUF file the decoder of another kind, too.
            self.fast.decoder = decoders.ByteLevel()
        self._hf = tokenizer
        self._chat = ChatTemplate(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in added if token.special
        }
        self.token_text = lru_cache(maxsize=1 << 16)(self._token_text)
        self.whole_texts = WholeTexts(self.fast)
        self._long_texts = _long_texts(self.fast)

    @property
    def eos_token_id(self) -> int | None:
        return self._hf.eos_token_id

    @property
    def max_length(self) -> int:
        return int(self._hf.model_max_length)

    def encode(
        self, text: str, truncate: int | None = None, add_special_tokens: bool = True
    ) -> list[int]:
        """Return the ids of `text`; with `truncate`, at most that many, keeping the last ones.

        Special tokens that the tokenizer puts around a text are kept and counted.
        """
        if self._long_texts is not None and is_long(text):
            return self._long_texts.encode(text, truncate, add_special_tokens)
        return encoding.encode(self.fast, text, truncate, add_special_tokens)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> TokenSpans:
        """Return the tokens with the start and the end of their bytes in `text`.

        Tokens that the tokenizer puts around a text have none: start and end are 0.
        """
        if self._long_texts is not None and is_long(text):
            return self._long_texts.tokenize(text, add_special_tokens)
        return encoding.tokenize(self.fast, text, add_special_tokens)

    @property
    def chat_uses_tools(self) -> bool:
        return self._chat.uses_tools

    def chat_mentions(self, word: str) -> bool:
        """See ChatTemplate.mentions."""
        return self._chat.mentions(word)

    def render_chat(
        self, messages: Seq[dict[str, Any]], tools: Seq[dict[str, Any]] | None = None
    ) -> str:
        """See ChatTemplate.render. Raises TemplateError."""
        return self._chat.render(messages, tools)

    def decode(self, token_ids: Seq[int], skip_special_tokens: bool) -> str:
        return self.fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def _token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def generated_text(self, prompt_ids: Seq[int], generated_ids: Seq[int]) -> str:
        """Return the text that `generated_ids` add to the prompt, without special tokens.

        The last prompt token is decoded with them, so that a leading space survives. If it is
        a byte of a character, the whole character is, lest the bytes of both be mixed.
        """
        context = self._whole_context(prompt_ids)
        text = self.decode([*context, *generated_ids], skip_special_tokens=True)
        return text[len(self.decode(context, skip_special_tokens=True)) :]

    def _whole_context(self, prompt_ids: Seq[int]) -> Seq[int]:
        for num_tokens in range(1, _MAX_UTF8_BYTES + 1):
            context = prompt_ids[-num_tokens:]
            if not self.decode(context, skip_special_tokens=True).endswith(_INCOMPLETE):
                return context
        return prompt_ids[-1:]


def _long_texts(fast: FastTokenizer) -> LongTexts | None:
    """Return what encodes long texts elsewhere, or None if `fast` must do so itself."""
    try:
        return LongTexts(fast)
    except ValueError:
        return None


class WholeTexts(dict[int, str]):
    """The text of each token that adds the same text after any other token; "" for the rest.

    These are the tokens of whole characters, if the decoder joins tokens independently of
    their neighbours. Most tokens are, and decoding one is a lookup in this dictionary.
    """

    def __init__(self, fast: FastTokenizer):
        super().__init__()
        self._fast = fast
        self._anchor = fast.encode(_ANCHOR, add_special_tokens=False).ids[-1:]
        self._before = fast.decode(self._anchor, skip_special_tokens=False)
        self._is_context_free = _is_context_free(fast) and self._before.endswith(_ANCHOR)

    def __missing__(self, token_id: int) -> str:
        self[token_id] = text = self._find(token_id)
        return text

    def _find(self, token_id: int) -> str:
        token = self._fast.id_to_token(token_id)
        if not self._is_context_free or token is None or _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._fast.decode([*self._anchor, token_id], skip_special_tokens=False)
        return "" if _INCOMPLETE in text else text[len(self._before) :]


def _is_context_free(fast: FastTokenizer) -> bool:
    """Return whether the decoder joins tokens independently of their neighbours.

    It does not with a `Strip` of the end, a `Replace` of text that two tokens can form together,
    or a `ByteLevel` that follows another step.
    """
    if fast.decoder is None:
        return False
    decoder = json.loads(fast.decoder.__getstate__())
    steps = decoder.get("decoders", [decoder])
    return "ByteLevel" not in [step["type"] for step in steps[1:]] and all(
        step["type"] in _CONTEXT_FREE_DECODERS
        and step.get("stop", 0) == 0
        and len(step.get("pattern", {"String": " "}).get("String", "")) == 1
        for step in steps
    )


class TextStream:
    """Decodes a sequence's tokens incrementally, to the piece of text that each one adds.

    This is Text Generation Inference's decoding with two offsets: a token that does not
    complete a character adds "", and the one that completes it adds all of it. Special
    tokens are kept.
    """

    __slots__ = ("_context", "_held", "_tokenizer", "_whole_texts")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Seq[int]):
        self._tokenizer = tokenizer
        self._whole_texts = tokenizer.whole_texts
        self._context = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        if not self._held:
            text = self._whole_texts[token_id]
            if text:
                self._context = [token_id]
                return text
        self._held.append(token_id)
        text = self._behind_context()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._context, self._held = self._held, []
        return text

    def flush(self) -> str:
        """Return the text that is still held back when the sequence ends within a character."""
        return self._behind_context() if self._held else ""

    def _behind_context(self) -> str:
        before = self._decode(self._context)
        return self._decode([*self._context, *self._held])[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
