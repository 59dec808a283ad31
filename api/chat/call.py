"""The call of a tool as the model generates it: `{"name": "f", "parameters": {"a": 1}}`.

The grammar of `GrammarCompiler.call` fixes everything but the name and the parameters. The name
comes first, so that a stream can tell early which tool is called.
"""

import re
import uuid

import orjson

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:', re.DOTALL)


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class CallReader:
    """Reads a generated call token by token.

    `name` is None until it is known. A call that `is_complete` has all of its arguments.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_complete = False
        self._head = ""
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def read(self, text: str) -> str:
        """Return the part of the arguments that `text` has."""
        if self.name is None:
            self._head += text
            found = _HEAD.match(self._head)
            if found is None:
                return ""
            self.name = orjson.loads(found[1])
            text = self._head[found.end() :]
        return self._arguments(text)

    def _arguments(self, text: str) -> str:
        if self.is_complete:
            return ""
        if self._depth == 0:
            text = text.lstrip()
        for position, character in enumerate(text):
            self._depth += self._step(character)
            if character == "}" and self._depth == 0:
                self.is_complete = True
                return text[: position + 1]
        return text

    def _step(self, character: str) -> int:
        """Return by how much `character` changes the depth, which strings leave as it is."""
        if self._is_escaped:
            self._is_escaped = False
        elif character == '"':
            self._is_in_string = not self._is_in_string
        elif self._is_in_string:
            self._is_escaped = character == "\\"
        elif character in "{[":
            return 1
        elif character in "}]":
            return -1
        return 0
