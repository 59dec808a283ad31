"""The pieces of a tool's call, told while it is generated."""

import re

import orjson

_NAME = re.compile(r'\s*\{\s*"function"\s*:\s*\{\s*"_name"\s*:\s*("(?:[^"\\]|\\.)*")', re.DOTALL)


class CallReader:
    """Reads `{"function": {"_name": "f", "a": 1}}` token by token.

    Says the arguments, `{"a": 1}`, as they come. Until `name` is known it says nothing, and
    nothing once the call `is_complete`.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_complete = False
        self._pieces: list[str] = []
        self._is_behind_name = False

    def push(self, text: str) -> str | None:
        """The part of the arguments that comes with `text`."""
        if self.is_complete:
            return None
        self._pieces.append(text)
        if self.name is not None:
            return self._arguments(text)
        whole = "".join(self._pieces)
        found = _NAME.match(whole)
        if found is None:
            return None
        self.name = orjson.loads(found[1])
        self._is_behind_name = True
        return "{" + self._arguments(whole[found.end() :])

    def _arguments(self, text: str) -> str:
        if "}" in text and self._is_whole():
            self.is_complete = True
            text = text.rstrip().removesuffix("}")
        if self._is_behind_name:
            text = text.lstrip()
            self._is_behind_name = not text
            text = text.removeprefix(",")
        return text

    def _is_whole(self) -> bool:
        try:
            orjson.loads("".join(self._pieces))
        except orjson.JSONDecodeError:
            return False
        return True
