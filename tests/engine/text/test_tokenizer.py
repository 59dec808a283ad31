"""Text to ids against transformers, ids to text against Text Generation Inference's two offsets.

Three kinds of tokenizer: byte-level (the embedded model's own), and two after
SentencePiece, whose rare characters are byte tokens: one decodes with Metaspace, one as
Llama 2 does, with Strip.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from engine.core.config import DEFAULT_MODEL_ID
from engine.loading.checkpoint import locate
from engine.text.encoding import TokenSpans
from engine.text.tokenizer import TextStream, Tokenizer

HELD = "�"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORDS = [
    "▁the",
    "▁he",
    "▁hello",
    "▁",
    "▁▁",
    "he",
    "llo",
    "lo",
    *"abcdefghijklmnopqrstuvwxyz.,!'\n",
]

examples = settings(max_examples=50, deadline=None)

# -- tokenizers -----------------------------------------------------------------------


def smollm2() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(locate(DEFAULT_MODEL_ID).path, truncation_side="left")


def wrap(fast: tokenizers.Tokenizer, template: str) -> PreTrainedTokenizerBase:
    """With <s> and </s> as specials 1 and 2, put around a text by `template`."""
    fast.add_special_tokens(["<s>", "</s>"])
    fast.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        truncation_side="left",
    )


def byte_level(template: str = "<s> $A") -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "he"), ("Ġhe", "ll"), ("ð", "Ł")]
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    fast = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=False))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return wrap(fast, template)


def metaspace(template: str = "<s> $A") -> PreTrainedTokenizerBase:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *_WORDS]
    scored = [(token, -float(len(tokens) - i)) for i, token in enumerate(tokens)]
    fast = tokenizers.Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    )
    return wrap(fast, template)


def llama2(template: str = "<s> $A") -> PreTrainedTokenizerBase:
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("h", "e"), ("▁", "he"), ("l", "o")]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", *(w for w in _WORDS if len(w) == 1)]
    tokens = list(dict.fromkeys([*tokens, *("".join(pair) for pair in merges)]))
    vocab = {token: i for i, token in enumerate(tokens)}
    fast = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(fast, template)


MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "smollm2": smollm2,
    "byte_level": byte_level,
    "metaspace": metaspace,
    "llama2": llama2,
}
every_tokenizer = pytest.mark.parametrize("name", MAKERS)
byte_fallback = pytest.mark.parametrize("name", ["metaspace", "llama2"])


@cache
def ours(name: str) -> Tokenizer:
    return Tokenizer(MAKERS[name]())


@cache
def theirs(name: str) -> PreTrainedTokenizerBase:
    """A separate instance, because transformers changes a tokenizer that it truncates with."""
    return MAKERS[name]()


def ids_of(name: str, *tokens: str) -> list[int]:
    ids = theirs(name).convert_tokens_to_ids(list(tokens))
    assert isinstance(ids, list)
    return ids


def utf8(name: str, text: str) -> list[int]:
    """The byte tokens of a text."""
    return ids_of(name, *(BYTES[byte] for byte in text.encode()))


_SNIPPETS = [" ", "  ", "\n", "\t", "0", "a.", "hello", " the", "he's ", "naïve", "<s>", "</s>"]
_SNIPPETS += ["日本語", "中", "한국", "नमस्ते", "e\u0301", "n\u0303\u0323", "\u200b", "<|im_end|>"]
_SNIPPETS += ["🙂", "🇺🇳", "\u200d".join("👩👩👧"), "👍🏽"]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters=HELD), max_size=20),
    st.lists(st.sampled_from(_SNIPPETS), max_size=12).map("".join),
)

# -- encode ---------------------------------------------------------------------------


@every_tokenizer
@pytest.mark.parametrize("special", [True, False])
@examples
@given(text=texts)
def test_encode_returns_the_ids_of_transformers(name: str, special: bool, text: str) -> None:
    expected = theirs(name)(text, add_special_tokens=special)["input_ids"]
    assert ours(name).encode(text, add_special_tokens=special) == expected


@every_tokenizer
@pytest.mark.parametrize("special", [True, False])
@examples
@given(text=texts, limit=st.integers(1, 30))
def test_truncate_keeps_the_tokens_that_transformers_keeps(
    name: str, special: bool, text: str, limit: int
) -> None:
    expected = theirs(name)(text, add_special_tokens=special, truncation=True, max_length=limit)
    assert ours(name).encode(text, limit, add_special_tokens=special) == expected["input_ids"]


@pytest.mark.parametrize("maker", [byte_level, metaspace, llama2])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 100])
def test_truncate_keeps_the_last_tokens_behind_bos(
    maker: Callable[[str], PreTrainedTokenizerBase], limit: int
) -> None:
    tokenizer = Tokenizer(maker("<s> $A"))
    whole = tokenizer.encode("hello the 中 hello you")
    assert whole[0] == 1
    assert 8 < len(whole) < 100
    cut = tokenizer.encode("hello the 中 hello you", limit)
    assert cut == [1, *whole[1:][max(len(whole) - limit, 0) :]]
    assert len(cut) == min(limit, len(whole))


@pytest.mark.parametrize("limit", [2, 3, 6, 100])
def test_truncate_keeps_special_tokens_after_the_text(limit: int) -> None:
    tokenizer = Tokenizer(byte_level("<s> $A </s>"))
    whole = tokenizer.encode("hello hello, you")
    cut = tokenizer.encode("hello hello, you", limit)
    assert len(cut) == min(limit, len(whole))
    assert (cut[0], cut[-1]) == (1, 2)
    assert cut[1:-1] == whole[1:-1][max(len(whole) - limit, 0) :]


@every_tokenizer
@pytest.mark.slow
def test_encode_from_many_threads_at_once(name: str) -> None:
    """Each call has its own truncation, or none."""
    tokenizer = ours(name)
    text = " ".join(f"hello {i} 中🙂 the" for i in range(40))
    calls = [(text[i % 7 :], [None, 1, 5, 37, 80][i % 5], i % 3 > 0) for i in range(300)]
    expected = [tokenizer.encode(*call) for call in calls]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda call: tokenizer.encode(*call), calls)) == expected


def test_truncation_configured_in_the_file_is_not_applied() -> None:
    fast = byte_level()
    fast.backend_tokenizer.enable_truncation(3)
    fast.backend_tokenizer.enable_padding(length=50)
    assert Tokenizer(fast).encode("hello you") == ours("byte_level").encode("hello you")


# -- facts ----------------------------------------------------------------------------


def test_special_ids_are_the_named_special_tokens_and_those_flagged_special() -> None:
    assert ours("byte_level").special_ids == {1, 2} | {theirs("byte_level").unk_token_id}
    assert ours("smollm2").special_ids == set(range(17))
    flagged = byte_level()
    flagged.add_tokens([tokenizers.AddedToken("<tool>", special=True)])
    flagged.add_tokens([tokenizers.AddedToken("<plain>", special=False)])
    ids = flagged.convert_tokens_to_ids(["<tool>", "<plain>"])
    assert isinstance(ids, list)
    tool, plain = ids
    assert tool in Tokenizer(flagged).special_ids
    assert plain not in Tokenizer(flagged).special_ids


@every_tokenizer
def test_token_text_decodes_the_token_alone_and_keeps_special_tokens(name: str) -> None:
    eos = theirs(name).eos_token_id
    assert ours(name).eos_token_id == eos
    for token_id in [eos, *range(0, len(theirs(name)), max(len(theirs(name)) // 500, 1))]:
        expected = theirs(name).decode([token_id], skip_special_tokens=False)
        assert ours(name).token_text(token_id) == expected


def test_token_text_of_a_sentencepiece_token_has_no_leading_space() -> None:
    [the] = ids_of("llama2", "▁the")
    assert ours("llama2").token_text(the) == "the"


# -- pieces ---------------------------------------------------------------------------


class TwoOffsets:
    """Text Generation Inference's `decode_token`, the first offset at 0 for short prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]):
        self.tokenizer = tokenizer
        self.ids = list(prompt_ids)
        self.prefix_offset = max(len(prompt_ids) - 5, 0)
        self.read_offset = len(prompt_ids)

    def decode(self, start: int, end: int | None = None) -> str:
        text = self.tokenizer.decode(self.ids[start:end], skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def push(self, token_id: int) -> str:
        self.ids.append(token_id)
        prefix = self.decode(self.prefix_offset, self.read_offset)
        new = self.decode(self.prefix_offset)
        if len(new) > len(prefix) and not new.endswith(HELD):
            self.prefix_offset, self.read_offset = self.read_offset, len(self.ids)
            return new[len(prefix) :]
        return ""

    def flush(self) -> str:
        """Return what is held when the sequence ends, which Text Generation Inference lacks."""
        return self.decode(self.prefix_offset)[
            len(self.decode(self.prefix_offset, self.read_offset)) :
        ]


def pieces(name: str, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[str]:
    stream = TextStream(ours(name), prompt_ids)
    return [*map(stream.push, token_ids), stream.flush()]


def expected_pieces(name: str, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[str]:
    stream = TwoOffsets(theirs(name), prompt_ids)
    return [*map(stream.push, token_ids), stream.flush()]


@st.composite
def generated(draw: st.DrawFn, name: str) -> list[int]:
    """Ids of texts, of fragments of texts, and any others, specials among them."""
    ids: list[int] = []
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            some = theirs(name)(draw(texts), add_special_tokens=False)["input_ids"]
            start = draw(st.integers(0, len(some)))
            ids += some[start : draw(st.integers(start, len(some)))]
        else:
            any_id = st.integers(0, len(theirs(name)) - 1)
            ids += draw(st.lists(any_id, min_size=1, max_size=6))
    return ids


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_of_a_stream_equal_those_of_tgis_decoder(name: str, data: st.DataObject) -> None:
    prompt_ids = theirs(name)(data.draw(texts) or "a")["input_ids"]
    token_ids = data.draw(generated(name))
    assert pieces(name, prompt_ids, token_ids) == expected_pieces(name, prompt_ids, token_ids)


@pytest.mark.parametrize("name", ["smollm2", "byte_level"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(name: str, data: st.DataObject) -> None:
    """For any ids of a byte-level tokenizer: nothing is lost or said twice."""
    prompt_ids = theirs(name)(data.draw(texts) or "a")["input_ids"]
    token_ids = data.draw(generated(name))
    whole = theirs(name).decode(prompt_ids + token_ids, skip_special_tokens=False)
    prompt = theirs(name).decode(prompt_ids, skip_special_tokens=False)
    assert "".join(pieces(name, prompt_ids, token_ids)) == whole[len(prompt) :]


@byte_fallback
@examples
@given(text=texts)
def test_pieces_of_a_text_join_to_it_with_byte_tokens_too(name: str, text: str) -> None:
    prompt_ids = theirs(name)("hello the")["input_ids"]
    token_ids = theirs(name)("the" + text, add_special_tokens=False)["input_ids"]
    whole = theirs(name).decode(prompt_ids + token_ids, skip_special_tokens=False)
    prompt = theirs(name).decode(prompt_ids, skip_special_tokens=False)
    assert "".join(pieces(name, prompt_ids, token_ids)) == whole[len(prompt) :]


def test_an_emoji_comes_with_its_last_token() -> None:
    prompt_ids = ours("smollm2").encode("Smile:")
    token_ids = ours("smollm2").encode(" 🫠!")
    got = pieces("smollm2", prompt_ids, token_ids)
    assert len(token_ids) > 3
    assert "".join(got) == " 🫠!"
    assert HELD not in "".join(got)
    assert "" in got[:-2]


def test_flush_gives_what_is_held_at_the_end_of_a_generation() -> None:
    prompt_ids, token_ids = ours("byte_level").encode("a"), ours("byte_level").encode("b中")[1:-1]
    assert pieces("byte_level", prompt_ids, token_ids) == ["b", "", "", HELD]
    assert TextStream(ours("byte_level"), prompt_ids).flush() == ""


def test_flush_before_any_piece_leaves_the_prompt_out() -> None:
    prompt_ids, token_ids = (
        ours("byte_level").encode("hello"),
        ours("byte_level").encode("中")[1:-1],
    )
    assert pieces("byte_level", prompt_ids, token_ids) == ["", "", HELD]


@byte_fallback
def test_a_leading_space_survives(name: str) -> None:
    assert pieces(name, theirs(name)("he")["input_ids"], ids_of(name, "▁the", "▁", "a")) == [
        " the",
        " ",
        "a",
        "",
    ]


# A prompt whose tail does not decode by itself is still no part of the answer.


@every_tokenizer
def test_a_prompt_that_ends_in_a_replacement_character_is_not_repeated(name: str) -> None:
    """The text of a file read with the wrong encoding ends like this."""
    prompt_ids = ours(name).encode("he said " + HELD)
    [a] = ours(name).encode("a", add_special_tokens=False)[-1:]
    assert pieces(name, prompt_ids, [a, a]) == ["a", "a", ""]


@byte_fallback
def test_a_prompt_that_ends_in_emoji_is_not_repeated(name: str) -> None:
    """Its last five tokens begin inside of a character, so no byte of them decodes."""
    prompt_ids = ours(name).encode("the🙂🙂")
    assert pieces(name, prompt_ids, ids_of(name, "▁he", "lo")) == [" he", "lo", ""]


@byte_fallback
def test_a_stray_byte_after_a_character_does_not_end_the_stream(name: str) -> None:
    """It takes back the character before it: four U+FFFD where "中" was said already."""
    prompt_ids = theirs(name)("a")["input_ids"]
    token_ids = [*utf8(name, "中"), *ids_of(name, "<0x80>", "a")]
    expected = ["", "", "中", "", HELD * 3 + "a", ""]
    assert expected_pieces(name, prompt_ids, token_ids) == expected
    assert pieces(name, prompt_ids, token_ids) == expected


# -- the whole answer -----------------------------------------------------------------


@every_tokenizer
@examples
@given(data=st.data())
@pytest.mark.slow
def test_generated_text_is_decoded_behind_one_prompt_token(name: str, data: st.DataObject) -> None:
    prompt_ids = theirs(name)(data.draw(texts) or "a")["input_ids"]
    token_ids = data.draw(generated(name))
    context = prompt_ids[-1:]
    before = theirs(name).decode(context, skip_special_tokens=True)
    assert isinstance(before, str)
    assume(not before.endswith(HELD))
    whole = theirs(name).decode(context + token_ids, skip_special_tokens=True)
    expected = whole[len(before) :]
    assert ours(name).generated_text(prompt_ids, token_ids) == expected


@every_tokenizer
def test_generated_text_has_no_special_tokens_and_keeps_its_leading_space(name: str) -> None:
    prompt_ids = theirs(name)("the")["input_ids"]
    both = theirs(name)("the hello", add_special_tokens=False)["input_ids"]
    eos = theirs(name).eos_token_id
    token_ids = both[len(theirs(name)("the", add_special_tokens=False)["input_ids"]) :]
    assert ours(name).generated_text(prompt_ids, [*token_ids, eos]) == " hello"
    assert ours(name).generated_text(prompt_ids, [eos, eos]) == ""


def test_generated_text_that_ends_within_a_character_is_not_empty() -> None:
    """Text Generation Inference answers "" then; we give the text that there is."""
    token_ids = ours("byte_level").encode("b中")[1:-1]
    assert ours("byte_level").generated_text([1], token_ids) == "b" + HELD


@byte_fallback
def test_generated_text_joins_the_pieces_after_a_prompt_that_ends_in_emoji(name: str) -> None:
    prompt_ids = ours(name).encode("he🙂")
    token_ids = [*utf8(name, "中"), *ids_of(name, "a")]
    assert "".join(pieces(name, prompt_ids, token_ids)) == "中a"
    assert ours(name).generated_text(prompt_ids, token_ids) == "中a"


# -- spans ----------------------------------------------------------------------------


def rows(spans: TokenSpans) -> list[tuple[int, int, int]]:
    """Return the id, the start and the stop of each token."""
    return list(zip(spans.ids, spans.starts, spans.stops, strict=True))


def test_spans_count_bytes_of_the_text() -> None:
    text = "naïve 🙂 日本"
    raw = text.encode()
    spans = rows(ours("smollm2").tokenize(text))
    assert [token_id for token_id, _, _ in spans] == ours("smollm2").encode(text)
    assert [raw[start:stop].decode() for _, start, stop in spans][:3] == ["na", "ïve", " 🙂"]
    assert spans[-1][2] == len(raw)


@every_tokenizer
@examples
@given(text=texts)
def test_spans_are_whole_characters_in_order(name: str, text: str) -> None:
    raw = text.encode()
    spans = rows(ours(name).tokenize(text, add_special_tokens=False))
    assert [token_id for token_id, _, _ in spans] == ours(name).encode(
        text, add_special_tokens=False
    )
    assert [start for _, start, _ in spans] == sorted(start for _, start, _ in spans)
    for _, start, stop in spans:
        assert 0 <= start <= stop <= len(raw)
        raw[start:stop].decode()


def test_special_tokens_around_a_text_have_no_span() -> None:
    assert rows(ours("byte_level").tokenize("he"))[0] == (1, 0, 0)
