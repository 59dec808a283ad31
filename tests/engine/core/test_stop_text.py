"""The text of a stream up to its first stop string, compared with its definition."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.stop_text import StopText

Pieces = Sequence[tuple[str, bool]]
"""Texts of tokens, each with whether the token is special."""


def defined(pieces: Pieces, stop: Sequence[str]) -> tuple[str, str | None]:
    """Return what is shown of all pieces, and the stop string before which it ends.

    Read character by character, the text ends when it ends with a stop string.
    """
    text, shown = "", ""
    for piece, special in pieces:
        for char in piece:
            text += char
            shown += "\0" if special else char
            for string in stop:
                if text.endswith(string):
                    return shown[: -len(string)].replace("\0", ""), string
    return shown.replace("\0", ""), None


def can_continue(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that a stop string begins with."""
    starts = (n for string in stop for n in range(1, len(string)) if text.endswith(string[:n]))
    return max(starts, default=0)


words = st.text("ab.🙂", min_size=0, max_size=5)
stops = st.lists(st.text("ab.🙂", min_size=1, max_size=7), max_size=4)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.tuples(words, st.booleans())), stops)
def test_what_is_shown_is_the_text_before_the_first_stop_string(
    pieces: list[tuple[str, bool]], stop: list[str]
) -> None:
    until = StopText(stop)
    shown = [until.push(*piece) for piece in pieces]
    assert ("".join([*shown, until.flush()]), until.reached) == defined(pieces, stop)


@settings(max_examples=500, deadline=None)
@given(st.lists(words, min_size=1), stops)
def test_only_what_may_become_a_stop_string_is_held_back(
    pieces: list[str], stop: list[str]
) -> None:
    until, text, shown = StopText(stop), "", ""
    for piece in pieces:
        shown += until.push(piece)
        text += piece
        if until.reached is not None:
            return
        assert shown == text[: len(text) - can_continue(text, stop)]
    assert shown + until.flush() == text


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=40), st.lists(st.integers(0, 40)), stops)
def test_the_pieces_of_a_text_do_not_matter(text: str, cuts: list[int], stop: list[str]) -> None:
    ends = sorted({*cuts, len(text)})
    pieces = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    whole, cut = StopText(stop), StopText(stop)
    assert whole.push(text) + whole.flush() == "".join(map(cut.push, pieces)) + cut.flush()
    assert whole.reached == cut.reached


def test_the_stop_string_that_is_completed_first_wins() -> None:
    until = StopText(["abcd", "c"])
    assert (until.push("xabcd"), until.reached) == ("xab", "c")
    for stop in (["lo", "hello"], ["hello", "lo"]):
        until = StopText(stop)
        assert until.push("a hello") == {"lo": "a hel", "hello": "a "}[stop[0]]
        assert until.reached == stop[0]


def test_a_special_token_may_complete_a_stop_string_and_is_not_shown() -> None:
    until = StopText(["\n<|end|>"])
    assert [until.push("a\n"), until.push("<|user|>", special=True)] == ["a", "\n"]
    assert [until.push("b\n"), until.push("<|end|>", special=True)] == ["b", ""]
    assert until.reached == "\n<|end|>"


def test_nothing_is_shown_after_a_stop_string() -> None:
    until = StopText(["b"])
    assert [until.push("abc"), until.push("d"), until.flush()] == ["a", "", ""]


def test_without_stop_strings_all_text_is_shown_at_once() -> None:
    until = StopText([])
    assert [until.push("ab"), until.push("<eos>", special=True), until.flush()] == ["ab", "", ""]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stop", ["a" * 20_000 + "b", "ab" * 10_000 + "c", "a" * 1_000_000])
def test_long_stop_strings_that_repeat_themselves_take_linear_time(stop: str) -> None:
    """Comparing every beginning with every end would not end before the timeout."""
    until = StopText([stop])
    shown = [until.push(stop[n : n + 4]) for n in range(0, 20_000, 4)]
    shown += [until.push("zab"), until.flush()]
    assert "".join(shown) == stop[:20_000] + "zab"
