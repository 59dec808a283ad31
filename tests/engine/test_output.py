"""One sequence's events: order of the stop conditions, stop strings, texts, top tokens.

Most tests run on a tokenizer whose tokens are whatever strings the test names, so that
the borders between tokens lie where the test wants them.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.core.request import (
    FinishReason,
    ReachedStop,
    Request,
    SamplingParams,
    StoppingParams,
    Token,
    TokenOutput,
)
from engine.core.sequence import Sequence
from engine.output import SequenceOutput
from engine.sampling.sampler import SampledTokens
from engine.sampling.torch_sampler import TorchSampler
from engine.text.tokenizer import Tokenizer
from tests.engine.text.test_tokenizer import smollm2

LENGTH, EOS, STOP = FinishReason.LENGTH, FinishReason.EOS_TOKEN, FinishReason.STOP_SEQUENCE
PROMPT = "prompt"
Top = list[tuple[int, float]]


@cache
def spelled(*texts: str) -> Tokenizer:
    """Token 0 is <eos>, special; 1 is the prompt's; token 2 + i reads `texts[i]`."""
    vocab = {text: i for i, text in enumerate(["<eos>", PROMPT, *texts])}
    assert len(vocab) == 2 + len(texts)
    fast = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    fast.decoder = decoders.Fuse()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>"))


@cache
def of_bytes() -> Tokenizer:
    """Token i is byte i; 256 is <eos>."""
    units = pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    chars = {byte: chr(byte) if byte in printable else chr(next(others)) for byte in range(256)}
    assert set(chars.values()) == set(units)
    fast = tokenizers.Tokenizer(models.BPE({char: byte for byte, char in chars.items()}, []))
    fast.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>"))


class Said:
    """A sequence that is given its tokens, and the outputs that it produces."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        *stop: str,
        max_new_tokens: int = 1 << 20,
        ignore_eos: bool = False,
        top_n_tokens: int = 0,
        eos_token_ids: frozenset[int] | None = None,
    ):
        request = Request(
            request_id="r",
            prompt_ids=prompt_ids,
            sampling=SamplingParams(top_n_tokens=top_n_tokens),
            stopping=StoppingParams(max_new_tokens, stop, ignore_eos),
        )
        if eos_token_ids is None:
            eos_token_ids = frozenset([tokenizer.eos_token_id or 0])
        self.seq = Sequence(request)
        self.output = SequenceOutput(self.seq, tokenizer, eos_token_ids)
        self.texts: list[str] = []
        self.reason: FinishReason | None = None

    def push(
        self,
        token_id: int,
        logprob: float | None = None,
        top: list[tuple[int, float]] | None = None,
    ) -> TokenOutput:
        """Append the token to the sequence before its text is decoded, as the engine does."""
        assert self.reason is None, "already ended"
        self.seq.token_ids.append(token_id)
        event, self.reason = self.output.push(token_id, logprob, top or [])
        self.texts.append(event.token.text)
        return event

    def push_until_end(self, token_ids: list[int]) -> int:
        """Return the number of tokens that were pushed."""
        for n, token_id in enumerate(token_ids, 1):
            self.push(token_id)
            if self.reason is not None:
                return n
        return len(token_ids)


def say(texts: list[str], *stop: str, **options: Any) -> Said:
    """Push tokens of these texts, in order, until the sequence ends."""
    known = sorted(set(texts) - {"<eos>"})
    said = Said(spelled(*known), [1], *stop, **options)
    said.push_until_end([0 if text == "<eos>" else 2 + known.index(text) for text in texts])
    return said


# -- order of the stop conditions -----------------------------------------------------


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_length_ends_a_sequence_at_exactly_max_new_tokens(max_new_tokens: int) -> None:
    said = say(["a"] * 9, max_new_tokens=max_new_tokens)
    assert said.reason is LENGTH
    assert said.texts == ["a"] * max_new_tokens


def test_length_is_checked_before_eos() -> None:
    assert say(["a", "<eos>"], max_new_tokens=2).reason is LENGTH
    assert say(["a", "<eos>"], max_new_tokens=3).reason is EOS


def test_length_is_checked_before_stop_strings() -> None:
    assert say(["a", "stop"], "stop", max_new_tokens=2).reason is LENGTH
    assert say(["a", "stop"], "stop", max_new_tokens=3).reason is STOP


def test_eos_is_checked_before_stop_strings() -> None:
    assert say(["a", "<eos>"], "<eos>", "a<eos>").reason is EOS


def test_eos_is_counted_and_shown_as_special() -> None:
    said = Said(spelled("a"), [1])
    assert said.push(2).token == Token(2, "a", None, special=False)
    assert said.push(0, -0.5).token == Token(0, "<eos>", -0.5, special=True)
    assert said.reason is EOS
    assert said.seq.num_generated == 2
    assert said.output.generated_text() == "a"


def test_ignored_eos_is_a_token_like_any_other() -> None:
    assert say(["a", "<eos>", "b"], ignore_eos=True).reason is None
    assert say(["a", "<eos>", "b"], "<eos>", ignore_eos=True).reason is STOP


def test_each_of_several_eos_ids_ends_it_and_no_other_special() -> None:
    for ends in (2, 3):
        said = Said(spelled("a", "b"), [1], eos_token_ids=frozenset([2, 3]))
        assert said.push_until_end([0, 1, ends, 0]) == 3
        assert said.reason is EOS
    assert Said(spelled("a"), [1], eos_token_ids=frozenset()).push_until_end([0, 0, 2]) == 3


# -- stop strings ---------------------------------------------------------------------


def test_a_stop_string_across_token_borders() -> None:
    said = say(["x", "S", "T", "OP", "y"], "STOP")
    assert said.reason is STOP
    assert said.texts == ["x", "S", "T", "OP"]


def test_a_stop_string_stays_in_the_text() -> None:
    said = say(["x ", "the end"], "end")
    assert said.reason is STOP
    assert said.output.generated_text() == "x the end"


def test_a_stop_string_within_a_token_ends_the_sequence_with_that_token() -> None:
    said = say([" is", " lo", "vely", "."], "is l")
    assert said.reason is STOP
    assert said.texts == [" is", " lo"]
    assert say(["STOP it", "a"], "STOP").texts == ["STOP it"]
    assert say(["x", "xSTOPx", "a"], "STOP").texts == ["x", "xSTOPx"]


def test_a_stop_string_before_newlines_in_its_token() -> None:
    for end in ("\n", "\n\n", "\r\n"):
        assert say(["x", "stop" + end, "y"], "stop").texts == ["x", "stop" + end]
    assert say(["st", "op\n"], "stop\n").reason is STOP
    assert say(["st", "op"], "stop\n").reason is None


def test_the_prompt_is_no_part_of_a_stop_string() -> None:
    assert say(["x"], "tx", PROMPT, PROMPT + "x").reason is None


def test_any_of_several_stop_strings() -> None:
    for text in ("a", "ab", "abc", "b", "c", "zzz"):
        assert (say(["x", text], "a", "ab", "abc", "b", "c").reason is STOP) == (text != "zzz")


def test_special_characters_in_stop_strings_are_literal() -> None:
    assert say(["aXb"], "a.b", "(", "$", "^", "[ab]", "\\w").reason is None
    assert say(["x", "a.b"], "a.b").reason is STOP
    assert say(["x", "\\d+$"], "\\d+$").reason is STOP


def test_an_emoji_whose_bytes_are_tokens() -> None:
    tokenizer = of_bytes()
    said = Said(tokenizer, [97], "🛑", eos_token_ids=frozenset())
    emoji = list("🛑".encode())
    assert said.push_until_end([*emoji[:3], 98, *emoji, 99]) == 8
    assert said.reason is STOP
    assert said.texts == ["", "", "", "\ufffdb", "", "", "", "🛑"]


def test_an_emoji_within_longer_stop_strings() -> None:
    said = Said(of_bytes(), [97], "é🙂\n#", eos_token_ids=frozenset())
    token_ids = list("sé🙂\n é🙂\n##".encode())
    assert said.push_until_end(token_ids) == len(token_ids) - 1
    assert said.reason is STOP


@pytest.mark.parametrize("length", [199, 200, 201, 250, 301, 1500])
@pytest.mark.parametrize("before", [0, 1, 199, 500])
@pytest.mark.parametrize("newline", [False, True])
def test_a_long_stop_string_is_found_as_well_as_a_short_one(
    length: int, before: int, newline: bool
) -> None:
    """Text Generation Inference forgets all but 200 characters; clients cannot rely on that."""
    stop = "".join(chr(97 + i * i % 23) for i in range(length))
    tail = [*stop[:-1], stop[-1] + "\n"] if newline else [*stop]
    said = say([*"-" * before, *tail, "!"], stop)
    assert said.reason is STOP
    assert len(said.texts) == before + length


@pytest.mark.parametrize("size", [1, 7, 150, 250, 900])
def test_a_long_stop_string_in_large_tokens(size: int) -> None:
    stop = "".join(f"{i} " for i in range(300))
    text = "." * 777 + stop
    said = say([text[i : i + size] for i in range(0, len(text), size)] + ["!"], "zzz", stop, "a")
    assert said.reason is STOP
    assert "".join(said.texts) == text


_PIECES = ["a", "b", "ab", "ba", "\n", "a\n", "b\n\n", "🙂", "🙂a", ".", "aab.", "", "<eos>"]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(_PIECES), min_size=1, max_size=25),
    st.lists(
        st.lists(st.sampled_from([*"ab\n.🙂<>"]), min_size=1, max_size=4).map("".join), max_size=3
    ),
)
def test_a_sequence_ends_with_the_token_that_completes_a_stop_string(
    texts: list[str], stop: list[str]
) -> None:
    said = Said(spelled(*_PIECES[:-1]), [1], *stop, ignore_eos=True)
    ids = [0 if text == "<eos>" else 2 + _PIECES.index(text) for text in texts]
    num_taken = said.push_until_end(ids)
    for n in range(1, len(texts) + 1):
        if any(s in "".join(texts[:n]) for s in stop):
            assert (num_taken, said.reason) == (n, STOP)
            assert said.texts == texts[:n]
            return
    assert (num_taken, said.reason) == (len(texts), None)


def test_the_text_before_a_stop_string_is_known() -> None:
    for texts, stop in [
        (["a b", " is", " lovely", "!"], "is l"),
        (["a b", " ", "is lo", "!"], "is l"),
        (["a b ", "is l", "!"], "is l"),
        (["a b ", "i", "s", " ", "l", "!"], "is l"),
    ]:
        assert say(texts, "zz", stop).output.reached_stop() == ReachedStop("is l", "a b ")
    assert say(["a", "b"], "c").output.reached_stop() is None
    assert say(["a", "b"]).output.reached_stop() is None


def test_the_text_before_a_stop_string_has_no_special_tokens() -> None:
    said = say(["a", "<eos>", "b<", "<eos>", "c"], "<<eo", ignore_eos=True)
    assert said.reason is STOP
    assert said.output.reached_stop() == ReachedStop("<<eo", "ab")


def test_a_stop_string_is_known_whatever_else_its_token_ends() -> None:
    assert say(["a", "stop"], "st", max_new_tokens=2).output.reached_stop() == ("st", "a")
    assert say(["a", "<eos>"], "a<e").output.reached_stop() == ("a<e", "")


def test_a_character_that_completes_a_stop_string_with_its_last_byte() -> None:
    said = Said(of_bytes(), [97], "b🛑", eos_token_ids=frozenset())
    said.push_until_end(list("ab🛑".encode()))
    assert said.reason is STOP
    assert said.output.reached_stop() == ("b🛑", "a")
    assert said.texts == ["a", "b", "", "", "", "🛑"]


TEXT = "The capital of France is Paris.\n\nIt is lovely; «très beau» 🙂🛑 日本の首都は東京。 aaaab"


@cache
def real() -> Tokenizer:
    return Tokenizer(smollm2())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.integers(1, 12), st.integers(0, len(TEXT) - 1))
def test_any_part_of_a_real_models_text_ends_it(start: int, length: int, other: int) -> None:
    stop = TEXT[start : start + length], TEXT[other : other + 20]
    said = Said(real(), real().encode("Say:\n"), *stop)
    said.push_until_end(real().encode(TEXT))
    first = min(stop, key=lambda s: TEXT.index(s) + len(s))
    assert said.reason is STOP
    assert first in "".join(said.texts)
    assert first not in "".join(said.texts[:-1])
    assert said.output.reached_stop() == (first, TEXT[: TEXT.index(first)])


# -- texts ----------------------------------------------------------------------------


def test_held_text_comes_with_the_last_token() -> None:
    said = Said(of_bytes(), [97], max_new_tokens=3, eos_token_ids=frozenset())
    assert said.push_until_end([98, *"🙂".encode()]) == 3
    assert said.texts == ["b", "", "\ufffd"]
    assert said.output.generated_text() == "b\ufffd"


def test_held_text_is_no_part_of_a_stop_string() -> None:
    said = Said(of_bytes(), [97], "\ufffd", eos_token_ids=frozenset())
    assert said.push_until_end(list("🙂🙂".encode())[:-1]) == 7
    assert said.reason is None


def test_generated_text_keeps_a_leading_space_and_leaves_specials_out() -> None:
    said = say([" a", "<eos>", " b"], ignore_eos=True)
    assert said.output.generated_text() == " a b"
    assert said.texts == [" a", "<eos>", " b"]


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf, None])
def test_a_logprob_that_is_no_number_is_none(logprob: float | None) -> None:
    assert Said(spelled("a"), [1]).push(2, logprob).token.logprob is None


# -- top tokens -----------------------------------------------------------------------


def top_of(n: int, *top: tuple[int, float]) -> list[tuple[int, float | None]]:
    said = Said(spelled("a", "b", "c", "d", "e", "f"), [1], top_n_tokens=n)
    return [(t.id, t.logprob) for t in said.push(2, -1.0, list(top)).top_tokens]


def test_top_tokens_are_the_n_best_in_order() -> None:
    top = (3, -0.1), (0, -0.7), (2, -3.5), (4, -9.0)
    assert top_of(1, *top) == [*top[:1]]
    assert top_of(3, *top) == [*top[:3]]
    assert top_of(4, *top) == [*top]


def test_top_tokens_that_tie_with_the_nth_are_all_kept() -> None:
    top = (3, -0.1), (0, -0.7), (2, -0.7), (4, -0.7), (5, -0.9)
    assert top_of(1, *top) == [*top[:1]]
    assert top_of(2, *top) == [*top[:4]]
    assert top_of(3, *top) == [*top[:4]]


def test_top_tokens_that_were_excluded_are_left_out() -> None:
    top = (3, 0.0), (0, -math.inf), (2, -math.inf)
    assert top_of(1, *top) == [*top[:1]]
    assert top_of(2, *top) == [*top[:1]]
    assert top_of(3, *top) == [*top[:1]]


def test_a_vocabulary_smaller_than_n_gives_all_of_it() -> None:
    assert top_of(5, (3, -0.1), (2, -2.0)) == [(3, -0.1), (2, -2.0)]


def test_top_tokens_of_a_row_of_nan_are_none() -> None:
    assert top_of(2, (3, math.nan), (2, math.nan), (4, math.nan)) == []


def test_top_tokens_are_only_shown_when_asked_for() -> None:
    assert Said(spelled("a"), [1]).push(2, -0.5).top_tokens == ()


def test_the_chosen_token_is_not_forced_into_the_top() -> None:
    assert top_of(1, (5, -0.1), (2, -1.0)) == [(5, -0.1)]


def test_texts_of_top_tokens_are_of_the_token_alone() -> None:
    tokenizer = of_bytes()
    said = Said(tokenizer, [97], top_n_tokens=2, eos_token_ids=frozenset())
    emoji = list("🙂".encode())
    for token_id in emoji[:3]:
        said.push(token_id)
    event = said.push(emoji[3], -0.1, [(emoji[3], -0.1), (98, -2.0)])
    assert event.token.text == "🙂"
    assert event.top_tokens == (
        Token(emoji[3], "\ufffd", -0.1, special=False),
        Token(98, "b", -2.0, special=False),
    )


def test_special_top_tokens_keep_their_text_and_say_so() -> None:
    said = Said(spelled("a"), [1], top_n_tokens=1)
    [eos] = said.push(2, -3.0, [(0, -0.1)]).top_tokens
    assert eos == Token(0, "<eos>", -0.1, special=True)


@pytest.mark.parametrize("ties", ["all", "few"])
def test_top_tokens_of_a_row_do_not_depend_on_what_its_company_asks_for(ties: str) -> None:
    """Logits that all tie, beyond the sampler's margin, or as bfloat16 has it, a few do."""
    num_rows, n = 60, 3
    logits = torch.zeros(num_rows, 5000)
    if ties == "few":
        logits = 3 * torch.randn(num_rows, 5000, generator=torch.Generator().manual_seed(0))
    logits = logits.bfloat16()
    tokenizer = spelled(*(f"<{i}>" for i in range(4998)))
    slots = np.arange(num_rows + 1)
    sampler = TorchSampler(len(slots), 5000, torch.device("cpu"))
    shown = []
    for company in (0, 4, 5):
        for slot in range(num_rows):
            sampler.set_parameters(slot, SamplingParams(top_n_tokens=n))
        sampler.set_parameters(num_rows, SamplingParams(top_n_tokens=company))
        plan = sampler.plan(slots, slots)
        arrays = {name: torch.from_numpy(array) for name, array in plan.arrays.items()}
        sampled = sampler.sample(torch.cat([logits, logits[:1]]), arrays, plan.kind)
        shown.append([top_tokens(sampled, row, n, tokenizer) for row in range(num_rows)])
    assert shown[0] == shown[1] == shown[2]


def top_tokens(
    sampled: SampledTokens, row: int, n: int, tokenizer: Tokenizer
) -> list[tuple[int, float | None]]:
    """Return the top tokens that the row's request gets from a step's result."""
    assert sampled.top_ids is not None
    assert sampled.top_logprobs is not None
    top = zip(sampled.top_ids[row].tolist(), sampled.top_logprobs[row].tolist(), strict=True)
    shown = Said(tokenizer, [1], top_n_tokens=n).push(2, None, list(top)).top_tokens
    return [(token.id, token.logprob) for token in shown]
