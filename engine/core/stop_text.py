"""Finds the first stop string in a text that comes in pieces, and tells what may be shown of it."""

from collections.abc import Sequence


class StopText:
    """The text of a sequence up to its first stop string.

    `push` and `flush` return together the text before that stop string, or all of it if there is
    none. Only the end that could still become a stop string is held back.

    The first stop string is the one that is completed first. If one character completes several,
    it is the first of the list. This depends on the text alone, not on its pieces.

    stop     the stop strings, none of which is empty
    reached  the stop string that was found, or None
    """

    __slots__ = ("_beginnings", "_held", "_searches", "reached")

    def __init__(self, stop: Sequence[str]):
        self._searches = [_Search(string) for string in stop]
        self._beginnings = frozenset(string[0] for string in stop)
        self._held: list[str] = []  # one element a character, "" for one that is not shown
        self.reached: str | None = None

    def push(self, text: str, special: bool = False) -> str:
        """Add the next piece of text and return what can now be shown, "" after a stop string.

        The text of a `special` token may be part of a stop string, but is never shown.
        """
        if self.reached is not None:
            return ""
        if not self._held and self._beginnings.isdisjoint(text):
            return "" if special else text
        self._held += [""] * len(text) if special else text
        num_shown = len(self._held) - self._search(text)
        shown = "".join(self._held[:num_shown])
        del self._held[: num_shown if self.reached is None else None]
        return shown

    def flush(self) -> str:
        """Return what is still held back when the text has ended, "" after a stop string."""
        held, self._held = "".join(self._held), []
        return held

    def _search(self, text: str) -> int:
        """Read `text` up to the first stop string, and return the number of characters to hide.

        They are the stop string and all behind it, or else what a stop string may begin with.
        """
        for num_read, char in enumerate(text, 1):
            for search in self._searches:
                if search.read(char):
                    self.reached = search.string
                    return len(search.string) + len(text) - num_read
        return max(search.num_read for search in self._searches)


class _Search:
    """The search of one string, by the algorithm of Knuth, Morris and Pratt.

    num_read  length of the longest beginning of the string that the text ends with
    """

    __slots__ = ("_borders", "num_read", "string")

    def __init__(self, string: str):
        self.string = string
        self.num_read = 0
        # For each length, the longest beginning of that part of the string which is also its end
        # and shorter than it. Extended as the search gets there: most never do.
        self._borders = [0, 0]

    def read(self, char: str) -> bool:
        """Read the next character of the text and return whether it completes the string."""
        string, borders, num_read = self.string, self._borders, self.num_read
        while num_read and string[num_read] != char:
            num_read = borders[num_read]
        if string[num_read] == char:
            num_read += 1
            if num_read == len(borders):
                borders.append(self._border(num_read))
        self.num_read = num_read
        return num_read == len(string)

    def _border(self, length: int) -> int:
        string, borders = self.string, self._borders
        border = borders[length - 1]
        while border and string[border] != string[length - 1]:
            border = borders[border]
        return border + (string[border] == string[length - 1])
