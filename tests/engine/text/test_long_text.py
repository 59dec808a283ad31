"""Long texts: what a process of its own makes of them is what the tokenizer itself does."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from engine.text import encoding
from engine.text.long_text import LONG_BYTES, EncodingFailed, LongTexts, is_long
from engine.text.tokenizer import Tokenizer
from tests.engine.text.test_tokenizer import byte_level, llama2, metaspace, smollm2

T = TypeVar("T")

TEXTS = ["", "he", "the hello, 中文 🙂 <s> you\n", "a" * 3000, "é" * 1000]

every_tokenizer = pytest.mark.parametrize("maker", [smollm2, byte_level, metaspace, llama2])


@pytest.mark.parametrize("maker", [smollm2, llama2])
def test_a_process_gives_the_same_tokens(maker: Callable[[], PreTrainedTokenizerBase]) -> None:
    tokenizer = Tokenizer(maker())
    elsewhere = LongTexts(tokenizer.fast)
    text = "".join(TEXTS)
    for special in (True, False):
        assert elsewhere.tokenize(text, special) == tokenizer.tokenize(text, special)
        for truncate in (None, 7):
            ids = tokenizer.encode(text, truncate, special)
            assert elsewhere.encode(text, truncate, special) == ids
    assert elsewhere.encode("", None, False) == []


@every_tokenizer
@pytest.mark.parametrize("special", [True, False])
def test_spans_are_the_offsets_of_the_library(
    maker: Callable[[], PreTrainedTokenizerBase], special: bool
) -> None:
    fast = Tokenizer(maker()).fast
    for text in (text for text in TEXTS if text.isascii()):
        spans = encoding.tokenize(fast, text, special)
        assert list(zip(spans.starts, spans.stops, strict=True)) == (
            fast.encode(text, add_special_tokens=special).offsets
        )


def test_a_text_is_long_by_its_bytes() -> None:
    assert not is_long("a" * LONG_BYTES)
    assert is_long("a" * (LONG_BYTES + 1))
    assert not is_long("中" * (LONG_BYTES // 3))
    assert is_long("中" * (LONG_BYTES // 3 + 1))


def test_a_long_text_is_encoded_elsewhere_and_as_a_short_one_would_be() -> None:
    tokenizer = Tokenizer(smollm2())
    text = "The naïve 🙂 fox. " * 20_000
    assert is_long(text)
    assert tokenizer.encode(text, 10) == tokenizer.fast.encode(text).ids[-10:]
    assert tokenizer.tokenize(text) == encoding.tokenize(tokenizer.fast, text, True)


def longest_stop(work: Callable[[], T]) -> float:
    """Return for how many seconds at most `work` lets no other thread run."""
    stops = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            started = time.perf_counter()
            time.sleep(0.001)
            stops.append(time.perf_counter() - started)

    watching = threading.Thread(target=watch)
    watching.start()
    work()
    done.set()
    watching.join()
    return max(stops)


def test_other_threads_run_while_a_text_is_encoded() -> None:
    tokenizer = Tokenizer(smollm2())
    text = "The quick brown fox's 7 dogs. " * (LONG_BYTES // 30)
    tokenizer.encode(text)
    for work in (tokenizer.encode, tokenizer.tokenize):
        started = time.perf_counter()
        stopped = longest_stop(lambda: work(text))  # noqa: B023
        assert stopped < max(0.1, (time.perf_counter() - started) / 2)


def test_a_process_that_fails_is_an_error_with_its_last_words() -> None:
    elsewhere = LongTexts(Tokenizer(smollm2()).fast)
    elsewhere._tokenizer = b"no tokenizer"
    with pytest.raises(EncodingFailed, match="expected ident at line 1"):
        elsewhere.encode("x", None, True)


def test_a_tokenizer_of_python_code_encodes_long_texts_itself() -> None:
    class ByLines:
        def pre_tokenize(self, text: object) -> None:
            text.split(lambda _, part: part.split("\n", "isolated"))  # type: ignore[attr-defined]

    source = smollm2()
    fast = source.backend_tokenizer
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.PreTokenizer.custom(ByLines()), fast.pre_tokenizer]
    )
    tokenizer = Tokenizer(source)
    text = "hello\n" * (LONG_BYTES // 6 + 1)
    assert is_long(text)
    assert len(tokenizer.encode(text)) == 2 * text.count("\n")
