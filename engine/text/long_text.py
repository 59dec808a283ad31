"""Encodes long texts in processes of their own.

To encode a text takes up to 300 times its size in memory, and to free that stops all threads. A
process gives it back by ending. It needs half a second to start, which for a text this long is
little.
"""

import json
import os
import subprocess
import sys
from array import array
from pathlib import Path
from typing import BinaryIO

from tokenizers import Tokenizer as FastTokenizer

from engine.text.encoding import TokenSpans, encode, tokenize

LONG_BYTES = 1 << 18
"""Length from which a text is long. It has 65,000 tokens, if it is English."""

_ROOT = Path(__file__).parents[2]
_NICENESS = 10


class EncodingFailed(Exception):
    """The process that was to encode a text failed."""


def is_long(text: str) -> bool:
    return len(text) > LONG_BYTES or (
        len(text) > LONG_BYTES // 4 and len(text.encode()) > LONG_BYTES
    )


class LongTexts:
    """Does for long texts what the functions of `encoding` do. Thread-safe.

    Raises ValueError for a tokenizer that cannot be written as JSON, such as one with Python code.
    """

    def __init__(self, fast: FastTokenizer):
        try:
            self._tokenizer = fast.to_str().encode()
        except Exception as error:  # the library has no narrower one
            raise ValueError(str(error)) from error

    def encode(self, text: str, truncate: int | None, add_special_tokens: bool) -> list[int]:
        [ids] = self._run(text, [truncate, add_special_tokens])
        return ids.tolist()

    def tokenize(self, text: str, add_special_tokens: bool) -> TokenSpans:
        return TokenSpans(*self._run(text, [add_special_tokens]))

    def _run(self, text: str, arguments: list[int | None]) -> list["array[int]"]:
        command = [sys.executable, "-m", __name__, json.dumps(arguments)]
        sent = len(self._tokenizer).to_bytes(8) + self._tokenizer + text.encode()
        done = subprocess.run(command, input=sent, capture_output=True, cwd=_ROOT, check=False)
        if done.returncode:
            raise EncodingFailed(_last_line(done.stderr) or f"exit status {done.returncode}")
        num_arrays = 1 if len(arguments) == 2 else 3
        size = len(done.stdout) // num_arrays
        return [array("I", done.stdout[n * size : (n + 1) * size]) for n in range(num_arrays)]


def _last_line(output: bytes) -> str:
    return output.decode(errors="replace").strip().rpartition("\n")[2]


def main(arguments: str, source: BinaryIO, target: BinaryIO) -> None:
    """Encode the text in `source`, which is behind the tokenizer's length and JSON."""
    os.nice(_NICENESS)  # the engine and the event loop go first
    fast = FastTokenizer.from_buffer(source.read(int.from_bytes(source.read(8))))
    text = source.read().decode()
    match json.loads(arguments):
        case [truncate, special]:
            array("I", encode(fast, text, truncate, special)).tofile(target)
        case [special]:
            spans = tokenize(fast, text, special)
            for part in (spans.ids, spans.starts, spans.stops):
                target.write(array("I", part))


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin.buffer, sys.stdout.buffer)
