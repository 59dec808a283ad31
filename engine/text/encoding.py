"""Encodes a text with a tokenizer of the `tokenizers` library.

Each function lets other threads run meanwhile, as the library's functions for batches do and its
others do not. What it computes is `Tokenizer`'s.
"""

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

from tokenizers import Tokenizer as FastTokenizer


@dataclass(frozen=True, slots=True)
class TokenSpans:
    """Tokens with the start and the end of their bytes in a text, in three arrays of one length."""

    ids: Seq[int]
    starts: Seq[int]
    stops: Seq[int]


def encode(
    fast: FastTokenizer, text: str, truncate: int | None, add_special_tokens: bool
) -> list[int]:
    """See `Tokenizer.encode`."""
    [encoding] = fast.encode_batch_fast([text], add_special_tokens=False)
    if truncate is not None:
        num_special = fast.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
        encoding.truncate(max(truncate - num_special, 0), direction="left")
    if add_special_tokens:
        encoding = fast.post_process(encoding, add_special_tokens=True)
    return list(encoding.ids)


def tokenize(fast: FastTokenizer, text: str, add_special_tokens: bool) -> TokenSpans:
    """See `Tokenizer.tokenize`."""
    [encoding] = fast.encode_batch([text], add_special_tokens=add_special_tokens)
    ids, starts, stops = array("I", encoding.ids), array("I"), array("I")
    span_of = encoding.token_to_chars  # `offsets` would make a million tuples in one go
    for index in range(len(ids)):
        start, stop = span_of(index) or (0, 0)
        starts.append(start)
        stops.append(stop)
    if text.isascii():
        return TokenSpans(ids, starts, stops)
    # The library's offsets count characters, ours count bytes.
    byte_at = array("I", accumulate((len(char.encode()) for char in text), initial=0))
    return TokenSpans(
        ids,
        array("I", (byte_at[start] for start in starts)),
        array("I", (byte_at[stop] for stop in stops)),
    )
