"""One row of a step's logits: what its parameters say, and its scores after penalties and
temperature.
"""

import triton
import triton.language as tl

from kernels import sampling
from kernels.fused_sampling.numbers import finite
from kernels.sampling import ROW_PARAMETERS

WORDS = tl.constexpr(ROW_PARAMETERS.itemsize // 4)
"""Words of 4 bytes that each row's parameters have."""
GENERATED = tl.constexpr(sampling.GENERATED)
_IN_PROMPT = tl.constexpr(sampling.IN_PROMPT)
_SMALL_TEMPERATURE = tl.constexpr(sampling.SMALL_TEMPERATURE)

_words = {
    name: tl.constexpr(offset // 4)
    for name, (_, offset, *_) in (ROW_PARAMETERS.fields or {}).items()
}
_TEMPERATURE = _words.pop("temperature")
_TOP_K = _words.pop("top_k")
_TOP_P = _words.pop("top_p")
_TYPICAL_P = _words.pop("typical_p")
_REPETITION = _words.pop("repetition_penalty")
_FREQUENCY = _words.pop("frequency_penalty")
_PRESENCE = _words.pop("presence_penalty")
_OUTPUT_FREQUENCY = _words.pop("output_frequency_penalty")
_DO_SAMPLE = _words.pop("do_sample")
_NOISE_KEY = _words.pop("noise_key")
_SLOT = _words.pop("slot")
_CONTEXT_LENGTH = _words.pop("context_length")
_TOP_N = _words.pop("top_n_tokens")
assert not _words, f"no kernel reads {', '.join(_words)}"


@triton.jit
def _float(words):
    return tl.load(words).to(tl.float32, bitcast=True)


@triton.jit
def has_penalty(words):
    return (
        (_float(words + _REPETITION) != 1.0)
        | (_float(words + _FREQUENCY) != 0.0)
        | (_float(words + _PRESENCE) != 0.0)
        | (_float(words + _OUTPUT_FREQUENCY) != 0.0)
    )


@triton.jit
def top_k_of(words, vocab_size):
    """Return the row's top-k, or 0 if it drops nothing."""
    k = tl.load(words + _TOP_K)
    return tl.where(k >= vocab_size, 0, k)


@triton.jit
def top_p_of(words):
    return _float(words + _TOP_P)


@triton.jit
def typical_p_of(words):
    return _float(words + _TYPICAL_P)


@triton.jit
def has_threshold(words, vocab_size):
    return (top_k_of(words, vocab_size) > 0) | (top_p_of(words) < 1.0) | (typical_p_of(words) < 1.0)


@triton.jit
def wants_top(words):
    return tl.load(words + _TOP_N) != 0


@triton.jit
def is_sampled(words):
    return tl.load(words + _DO_SAMPLE) != 0


@triton.jit
def noise_key_of(words):
    return tl.load(words + _NOISE_KEY), tl.load(words + _NOISE_KEY + 1)


@triton.jit
def _penalised(logits, counts_ptr, words, ids, vocab_size):
    """Return the scores of `ids` after penalties; -inf past the vocabulary."""
    mask = ids < vocab_size
    x = tl.load(logits + ids, mask=mask, other=float("-inf")).to(tl.float32)
    if has_penalty(words):
        slot = tl.load(words + _SLOT).to(tl.int64)
        marked = tl.load(counts_ptr + slot * vocab_size + ids, mask=mask, other=0)
        count = (marked & (_IN_PROMPT - 1)).to(tl.float32)
        repetition, frequency = _float(words + _REPETITION), _float(words + _FREQUENCY)
        repeated = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
        x = tl.where(marked > 0, repeated, x)
        length = tl.maximum(tl.load(words + _CONTEXT_LENGTH), 1).to(tl.float32)
        x -= frequency * tl.div_rn(count, length)
        x -= _float(words + _OUTPUT_FREQUENCY) * count
        x -= tl.where(marked >= GENERATED, _float(words + _PRESENCE), 0.0)
    return x


@triton.jit
def subtrahend(logits, counts_ptr, words, vocab_size, BLOCK: tl.constexpr):
    """Return what is subtracted from scores before they are divided by the temperature.

    It is the row's highest score where the temperature is small, else 0.
    """
    subtracted = tl.full([], 0.0, tl.float32)
    if _float(words + _TEMPERATURE) < _SMALL_TEMPERATURE:
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = _penalised(logits, counts_ptr, words, ids, vocab_size)
            highest = tl.maximum(highest, x)
        subtracted = finite(tl.max(highest, 0))
    return subtracted


@triton.jit
def processed(logits, counts_ptr, words, ids, vocab_size, subtracted):
    """Return the scores of `ids` after penalties and temperature; -inf past the vocabulary."""
    x = _penalised(logits, counts_ptr, words, ids, vocab_size)
    temperature = _float(words + _TEMPERATURE)
    if temperature != 1.0:
        x = tl.div_rn(x - subtracted, temperature)
    return tl.where(x == 0.0, 0.0, x)  # -0 is no lower than 0


@triton.jit
def count_token(counts_ptr, words, token, vocab_size):
    """Add the chosen token to the counts of a row with a penalty."""
    if has_penalty(words):
        tl.debug_barrier()  # all threads must have read the count before one changes it
        count_ptr = counts_ptr + tl.load(words + _SLOT).to(tl.int64) * vocab_size + token
        tl.store(count_ptr, (tl.load(count_ptr) + 1) | GENERATED)
