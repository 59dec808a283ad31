"""Sampling in two launches: no sort, nothing sent to the host, each row by its own parameters.

The first launch has a program for each `CHUNK` tokens of each row. It applies penalties and the
temperature, and stores its chunk's best token (with noise added, if the row is sampled from
all of its tokens) and mass. For rows that need them it also stores the chunk's highest scores:
at most `KEPT`, and the bound above which there are no others. The second launch has a program
for each row, which merges the chunks. If the row has no threshold, that is all.

All thresholds are one question: a token is kept if the tokens ranked above it weigh less than
a limit. Top-k ranks by score and counts them, top-p sums their probabilities, typical-p ranks
by how near a token's surprise is to the entropy. The question is answered exactly, by
bisection over float32's ordered bits. Tied tokens are kept or dropped together.

Weights are integers: a probability relative to the best token's, in units of 2^-40. Integer
sums do not depend on their order, so a row's result depends neither on the layout nor on other
rows. Weights equal the real masses up to float32's error in an exponential: a token may fall on
either side of a limit if the mass above it is within 1e-6 of that limit, or if its surprise
is that near to typical-p's limit.

Bytes, for V tokens of b bytes each: both paths read the logits once, V * b, and for rows with
penalties their counts, V * 4, in the first launch. The candidates are V / 16 * 8 bytes, and
the search passes over them some ten times, in the L1 cache. If a row's threshold lies below
its candidates (flat distributions, top_k above KEPT / 2, typical_p alone), its one program
processes the row once more: it writes V * 4 bytes and passes over those instead. For a row
whose temperature is below `SMALL_TEMPERATURE`, each program first reads the whole row, to find
its highest score.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import sampling
from kernels.sampling import ROW_PARAMETERS

CHUNK = 2048
"""Tokens of a row that one program reads: few enough that a row alone spreads over the GPU."""
KEPT = 128
"""Most candidates of a chunk: the tokens whose scores are stored for the second launch."""
BLOCK = 4096
"""Tokens of a row that the second launch's program holds in registers at a time."""

_WORDS = tl.constexpr(ROW_PARAMETERS.itemsize // 4)
_FIELDS = tl.constexpr(4)
"""Values that a chunk leaves, int64 each: best token, highest score, mass, and bound."""
_BEST, _HIGHEST, _MASS, _BOUND = (tl.constexpr(field) for field in range(4))

_UNIT = tl.constexpr(2.0**40)
_LOWEST = tl.constexpr(-(1 << 31))
_ABOVE_ALL = tl.constexpr((1 << 31) - 1)
_MINUS_INFINITY = tl.constexpr(-(0x7F800000 + 1))
"""What `_ordered` makes of -inf."""
_NOTHING = tl.constexpr(-(1 << 63))
_GENERATED = tl.constexpr(sampling.GENERATED)
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


def greedy(logits: Tensor, want_logprobs: bool) -> tuple[Tensor, Tensor | None]:
    """Return each row's best token, the lowest id among equals, [rows] int64, and its logprob.

    logits  [rows, vocab_size], any float type and stride between rows

    Reads the logits once. The result is bit for bit that of `sample` for neutral parameters.
    """
    rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    assert logits.stride(1) == 1
    partials = logits.new_empty(rows, _FIELDS.value, num_chunks, dtype=torch.int64)
    ids = logits.new_empty(rows, dtype=torch.int64)
    logprobs = logits.new_empty(rows, dtype=torch.float32) if want_logprobs else None
    _greedy_chunk_kernel[(num_chunks, rows)](
        logits, logits.stride(0), partials, vocab_size, want_logprobs, CHUNK, num_warps=8
    )
    _greedy_row_kernel[(rows,)](
        partials, ids, logprobs, num_chunks, triton.next_power_of_2(num_chunks), num_warps=1
    )
    return ids, logprobs


def sample(
    logits: Tensor, parameters: Tensor, counts: Tensor | None, num_top: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Apply penalties, temperature, top-k, top-p and typical-p, and sample, row by row.

    logits      [rows, vocab_size], any float type and stride between rows
    parameters  [rows, words] int32, contiguous: `ROW_PARAMETERS`
    counts      [slots, vocab_size] int32, contiguous: how often each token occurs in each slot,
                with the bit `GENERATED` where it was generated and `IN_PROMPT` where it is in a
                prompt that is not counted; the tokens chosen for rows with a penalty are added.
                None if no row has a penalty

    Returns ids [rows] int64 and their logprobs [rows] float32. If `num_top` is not 0, also
    returns the ids and logprobs of that many tokens (or all there are), best first, the lowest id
    first among equals. Dropped tokens are not among them: their places have id 0 and logprob
    -inf, and so has all of a row whose `top_n_tokens` is 0.

    Scratch is 4 bytes per token and 8 per candidate; rows without a threshold use none of it.
    """
    rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    num_top = min(num_top, vocab_size)
    assert logits.stride(1) == 1
    assert parameters.is_contiguous()
    assert counts is None or (counts.is_contiguous() and counts.shape[1] == vocab_size)
    num_candidates = num_chunks * KEPT
    partials = logits.new_empty(rows, _FIELDS.value, num_chunks, dtype=torch.int64)
    # Each row's candidates, followed by room for all of its scores.
    scores = logits.new_empty(rows, num_candidates + num_chunks * CHUNK, dtype=torch.float32)
    candidate_ids = logits.new_empty(rows, num_candidates, dtype=torch.int32)
    ids = logits.new_empty(rows, dtype=torch.int64)
    logprobs = logits.new_empty(rows, dtype=torch.float32)
    top_ids = top_logprobs = None
    if num_top:
        top_ids = logits.new_empty(rows, num_top, dtype=torch.int64)
        top_logprobs = logits.new_empty(rows, num_top, dtype=torch.float32)
    _chunk_kernel[(num_chunks, rows)](
        logits,
        logits.stride(0),
        parameters,
        counts,
        partials,
        scores,
        scores.stride(0),
        candidate_ids,
        vocab_size,
        CHUNK,
        KEPT,
        num_warps=8,
    )
    _row_kernel[(rows,)](
        logits,
        logits.stride(0),
        parameters,
        counts,
        partials,
        scores,
        scores.stride(0),
        candidate_ids,
        ids,
        logprobs,
        top_ids,
        top_logprobs,
        vocab_size,
        num_chunks,
        num_top,
        triton.next_power_of_2(num_chunks),
        KEPT,
        triton.next_power_of_2(num_top),
        BLOCK,
        num_warps=16,
    )
    return ids, logprobs, top_ids, top_logprobs


# -- numbers --------------------------------------------------------------------------


@triton.jit
def _ordered(x):
    """Map float32 to int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _packed(x, ids):
    """Pack a score and its id in one integer that orders by score, then by lower id."""
    return (_ordered(x).to(tl.int64) << 32) + (0x7FFFFFFF - ids)


@triton.jit
def _packed_id(packed):
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF)


@triton.jit
def _finite(x):
    """Replace infinities and NaN by 0, so that x can be subtracted."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _share(x, reference):
    """Return exp(x - reference), at most 1; 0 for NaN."""
    share = tl.exp(tl.minimum(x - reference, 0.0))
    return tl.where(share <= 1.0, share, 0.0)


@triton.jit
def _mass(x, reference):
    return (_share(x, reference) * _UNIT).to(tl.int64)


@triton.jit
def _logprob(x, reference, mass):
    return (x - reference) - tl.log(tl.maximum(mass, 1).to(tl.float32) * (1.0 / _UNIT))


@triton.jit
def hash31(ids, key_0, key_1):
    """Compute what `kernels.sampling.hash31` does, for one key."""
    x = ids.to(tl.uint32) + key_0.to(tl.uint32, bitcast=True)
    x ^= x >> 17
    x *= 0xED5AD4BB
    x ^= x >> 11
    x += key_1.to(tl.uint32, bitcast=True)
    x *= 0xAC4C1B51
    x ^= x >> 15
    x *= 0x31848BAB
    x ^= x >> 14
    return x & 0x7FFFFFFF


@triton.jit
def _gumbel(ids, key_0, key_1):
    """Compute what `kernels.sampling.gumbel_noise` does, for one key.

    The integers agree to the bit, the logarithms to about 2e-6. For u below 1/4, -log(1 - u) is
    computed as 2 atanh(u / (2 - u)) by its series, whose first omitted term is 4e-10 of it: the
    hardware's logarithm near 1, which is good to 2^-22, would leave nothing of a small u.
    """
    uniform = (hash31(ids, key_0, key_1).to(tl.float32) + 0.5) * 2.0**-31
    uniform = tl.minimum(uniform, 1 - 2.0**-24)
    r = uniform / (2.0 - uniform)
    s = r * r
    series = 2.0 * r * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9)))))
    exponential = tl.where(uniform < 0.25, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def _float(words):
    return tl.load(words).to(tl.float32, bitcast=True)


@triton.jit
def _has_penalty(words):
    return (
        (_float(words + _REPETITION) != 1.0)
        | (_float(words + _FREQUENCY) != 0.0)
        | (_float(words + _PRESENCE) != 0.0)
        | (_float(words + _OUTPUT_FREQUENCY) != 0.0)
    )


@triton.jit
def _top_k(words, vocab_size):
    """Return the row's top-k, or 0 if it drops nothing."""
    k = tl.load(words + _TOP_K)
    return tl.where(k >= vocab_size, 0, k)


@triton.jit
def _has_threshold(words, vocab_size):
    return (
        (_top_k(words, vocab_size) > 0)
        | (_float(words + _TOP_P) < 1.0)
        | (_float(words + _TYPICAL_P) < 1.0)
    )


@triton.jit
def _penalised(logits_ptr, counts_ptr, words, ids, vocab_size):
    """Return the scores of `ids` after penalties; -inf past the vocabulary."""
    mask = ids < vocab_size
    x = tl.load(logits_ptr + ids, mask=mask, other=float("-inf")).to(tl.float32)
    if counts_ptr is not None and _has_penalty(words):
        slot = tl.load(words + _SLOT).to(tl.int64)
        marked = tl.load(counts_ptr + slot * vocab_size + ids, mask=mask, other=0)
        count = (marked & (_IN_PROMPT - 1)).to(tl.float32)
        repetition, frequency = _float(words + _REPETITION), _float(words + _FREQUENCY)
        repeated = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
        x = tl.where(marked > 0, repeated, x)
        length = tl.maximum(tl.load(words + _CONTEXT_LENGTH), 1).to(tl.float32)
        x -= frequency * tl.div_rn(count, length)
        x -= _float(words + _OUTPUT_FREQUENCY) * count
        x -= tl.where(marked >= _GENERATED, _float(words + _PRESENCE), 0.0)
    return x


@triton.jit
def _subtrahend(logits_ptr, counts_ptr, words, vocab_size, BLOCK: tl.constexpr):
    """Return what is subtracted from scores before they are divided by the temperature.

    It is the row's highest score where the temperature is small, else 0.
    """
    subtracted = tl.full([], 0.0, tl.float32)
    if _float(words + _TEMPERATURE) < _SMALL_TEMPERATURE:
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = _penalised(logits_ptr, counts_ptr, words, ids, vocab_size)
            highest = tl.maximum(highest, x)
        subtracted = _finite(tl.max(highest, 0))
    return subtracted


@triton.jit
def _processed(logits_ptr, counts_ptr, words, ids, vocab_size, subtracted):
    """Return the scores of `ids` after penalties and temperature; -inf past the vocabulary."""
    x = _penalised(logits_ptr, counts_ptr, words, ids, vocab_size)
    temperature = _float(words + _TEMPERATURE)
    if temperature != 1.0:
        x = tl.div_rn(x - subtracted, temperature)
    return tl.where(x == 0.0, 0.0, x)  # -0 is no lower than 0


# -- chunks ---------------------------------------------------------------------------


@triton.jit
def _greedy_chunk_kernel(
    logits_ptr, row_stride, partials_ptr, vocab_size, LOGPROBS: tl.constexpr, CHUNK: tl.constexpr
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    partial = partials_ptr + row * _FIELDS * tl.num_programs(0) + chunk
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * row_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    x = x.to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)
    _store_best(partial, x, x, ids, vocab_size, LOGPROBS)


@triton.jit
def _store_best(partial, x, noisy, ids, vocab_size, WITH_MASS: tl.constexpr):
    """Store a chunk's best token, highest score and mass. Returns the highest score, ordered."""
    best = tl.max(tl.where(ids < vocab_size, _packed(noisy, ids), _NOTHING), 0)
    tl.store(partial + _BEST * tl.num_programs(0), best)
    highest = tl.max(_ordered(x), 0)
    if WITH_MASS:
        tl.store(partial + _HIGHEST * tl.num_programs(0), highest.to(tl.int64))
        mass = tl.sum(_mass(x, _finite(_unordered(highest))), 0)
        tl.store(partial + _MASS * tl.num_programs(0), mass)
    return highest


@triton.jit
def _chunk_kernel(
    logits_ptr,
    row_stride,
    parameters_ptr,
    counts_ptr,
    partials_ptr,
    scores_ptr,
    scores_stride,
    candidate_ids_ptr,
    vocab_size,
    CHUNK: tl.constexpr,
    KEPT: tl.constexpr,
):
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    words = parameters_ptr + row * _WORDS
    partial = partials_ptr + row * _FIELDS * num_chunks + chunk
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = logits_ptr + row * row_stride
    subtracted = _subtrahend(logits, counts_ptr, words, vocab_size, CHUNK)
    x = _processed(logits, counts_ptr, words, ids, vocab_size, subtracted)

    has_threshold = _has_threshold(words, vocab_size)
    noisy = x
    if (tl.load(words + _DO_SAMPLE) != 0) & (not has_threshold):
        key_0, key_1 = tl.load(words + _NOISE_KEY), tl.load(words + _NOISE_KEY + 1)
        noisy = x + _gumbel(ids, key_0, key_1)
    highest = _store_best(partial, x, noisy, ids, vocab_size, True)

    if has_threshold | (tl.load(words + _TOP_N) != 0):
        bound = _find_bound(_ordered(x), highest, KEPT)
        tl.store(partial + _BOUND * num_chunks, bound.to(tl.int64))
        candidates = scores_ptr + row * scores_stride + chunk * KEPT
        candidate_ids = candidate_ids_ptr + (row * num_chunks + chunk) * KEPT
        tl.store(candidates + tl.arange(0, KEPT), float("-inf"))
        tl.debug_barrier()
        is_candidate = _ordered(x) > bound
        place = tl.cumsum(is_candidate.to(tl.int32), 0) - 1
        tl.store(candidates + place, x, mask=is_candidate)
        tl.store(candidate_ids + place, ids, mask=is_candidate)


@triton.jit
def _find_bound(keys, highest, KEPT: tl.constexpr):
    """Return a key with at most KEPT keys above it, and at least KEPT / 2 unless keys are tied."""
    exists = keys > _MINUS_INFINITY
    above = tl.sum(exists.to(tl.int32), 0)
    bound = tl.full([], _MINUS_INFINITY, tl.int32)
    if above > KEPT:
        low = tl.min(tl.where(exists, keys, _ABOVE_ALL), 0)
        bound = highest
        above = tl.full([], 0, tl.int32)
        step = 0
        while (low < bound) & (above <= KEPT // 2):
            pivot = _between(low, bound, step)
            num_above = tl.sum((keys > pivot).to(tl.int32), 0)
            fits = num_above <= KEPT
            bound = tl.where(fits, pivot, bound)
            above = tl.where(fits, num_above, above)
            low = tl.where(fits, low, pivot + 1)
            step += 1
    return bound


@triton.jit
def _between(low, high, step):
    """Return a key in [low, high): in turns the middle of their values and of their bits.

    The middle of the values is nearer to the middle of the scores. The middle of the bits ends
    any search within 32 steps.
    """
    value = _ordered(0.5 * _unordered(low) + 0.5 * _unordered(high))
    bits = (low & high) + ((low ^ high) >> 1)
    pivot = tl.where((step & 1) == 0, value, bits)
    return tl.minimum(tl.maximum(pivot, low), high - 1)


# -- rows -----------------------------------------------------------------------------


@triton.jit
def _greedy_row_kernel(partials_ptr, ids_ptr, logprobs_ptr, num_chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    partials = partials_ptr + row * _FIELDS * num_chunks
    best = tl.max(_field(partials, _BEST, num_chunks, _NOTHING, CHUNKS), 0)
    tl.store(ids_ptr + row, _packed_id(best))
    if logprobs_ptr is not None:
        highest, mass = _merge(partials, num_chunks, CHUNKS)
        x = _unordered((best >> 32).to(tl.int32))
        tl.store(logprobs_ptr + row, _logprob(x, highest, mass))


@triton.jit
def _field(partials, FIELD: tl.constexpr, num_chunks, other, CHUNKS: tl.constexpr):
    chunks = tl.arange(0, CHUNKS)
    mask = chunks < num_chunks
    return tl.load(partials + FIELD * num_chunks + chunks, mask=mask, other=other)


@triton.jit
def _merge(partials, num_chunks, CHUNKS: tl.constexpr):
    """Return the row's highest score and the row's mass relative to it."""
    keys = _field(partials, _HIGHEST, num_chunks, _MINUS_INFINITY, CHUNKS).to(tl.int32)
    highest = _finite(_unordered(tl.max(keys, 0)))
    masses = _field(partials, _MASS, num_chunks, 0, CHUNKS).to(tl.float32)
    return highest, tl.sum((masses * _share(_unordered(keys), highest)).to(tl.int64), 0)


# Another number of top tokens does not compile the kernel again.
@triton.jit(do_not_specialize=["num_top"])
def _row_kernel(
    logits_ptr,
    row_stride,
    parameters_ptr,
    counts_ptr,
    partials_ptr,
    scores_ptr,
    scores_stride,
    candidate_ids_ptr,
    ids_ptr,
    logprobs_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    vocab_size,
    num_chunks,
    num_top,
    CHUNKS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    words = parameters_ptr + row * _WORDS
    logits = logits_ptr + row * row_stride
    partials = partials_ptr + row * _FIELDS * num_chunks
    has_threshold = _has_threshold(words, vocab_size)
    best = tl.max(_field(partials, _BEST, num_chunks, _NOTHING, CHUNKS), 0)
    highest, mass = _merge(partials, num_chunks, CHUNKS)
    wants_top = False
    if top_ids_ptr is not None:
        wants_top = tl.load(words + _TOP_N) != 0
        top_ids = top_ids_ptr + row * num_top
        top_logprobs = top_logprobs_ptr + row * num_top
        _clear_top(top_ids, top_logprobs, num_top, TOP_BLOCK)

    subtracted = _subtrahend(logits, counts_ptr, words, vocab_size, BLOCK)
    reference = highest
    if has_threshold | wants_top:
        num_candidates = num_chunks * KEPT
        scores = scores_ptr + row * scores_stride
        # Below the highest bound of a chunk, some tokens are not among the candidates.
        bounds = _field(partials, _BOUND, num_chunks, _MINUS_INFINITY, CHUNKS)
        tokens = _all_above(tl.max(bounds, 0).to(tl.int32), scores, num_candidates, highest)
        are_listed = _suffice(tokens, mass, words, vocab_size, num_top, BLOCK)
        if not are_listed:
            scores += num_candidates
            _store_scores(scores, logits, counts_ptr, words, vocab_size, subtracted, BLOCK)
            tokens = _all_above(tl.full([], _MINUS_INFINITY, tl.int32), scores, vocab_size, highest)
        ids = (candidate_ids_ptr + row * num_candidates, are_listed)

        if has_threshold:
            tokens, mass = _cut(tokens, mass, words, vocab_size, BLOCK)
            if _float(words + _TYPICAL_P) < 1.0:
                tokens, reference, mass = _cut_typical(tokens, words, BLOCK)
            drawn = _draw(tokens, ids, words, BLOCK)
            best = tl.where(drawn == _NOTHING, best, drawn)
        if top_ids_ptr is not None and wants_top:
            num_listed = _list_top(tokens, ids, top_ids, top_logprobs, num_top, BLOCK)
            _sort_top(top_ids, top_logprobs, num_listed, reference, mass, TOP_BLOCK)

    token = _packed_id(best)
    x = _processed(logits, counts_ptr, words, token, vocab_size, subtracted)
    tl.store(ids_ptr + row, token)
    tl.store(logprobs_ptr + row, _logprob(x, reference, mass))
    if counts_ptr is not None and _has_penalty(words):
        tl.debug_barrier()  # all threads must have read the count before one changes it
        count_ptr = counts_ptr + tl.load(words + _SLOT).to(tl.int64) * vocab_size + token
        tl.store(count_ptr, (tl.load(count_ptr) + 1) | _GENERATED)


# -- thresholds -----------------------------------------------------------------------


class _Tokens(NamedTuple):
    """A set of a row's tokens, given by its thresholds.

    `scores` [n] float32 are those of the row's candidates, or of all its tokens. The set has the
    tokens whose score is above the key `floor`, and whose gap, the distance of the score to
    the score `highest`, is so near to `center` that the closeness is at least the key `nearest`.
    """

    scores: Any
    n: Any
    floor: Any
    highest: Any
    center: Any
    nearest: Any


@triton.jit
def _all_above(floor, scores, n, highest):
    center, nearest = tl.full([], 0.0, tl.float32), tl.full([], _LOWEST, tl.int32)
    return _Tokens(scores, n, floor, highest, center, nearest)


@triton.jit
def _with_floor(tokens, floor):
    return _Tokens(tokens.scores, tokens.n, floor, tokens.highest, tokens.center, tokens.nearest)


@triton.jit
def _tile(tokens, start, BLOCK: tl.constexpr):
    """Return indices, scores, keys of closeness, and which tokens are in the set, [BLOCK] each.

    A gap is a surprise up to a constant. The same constant separates the mean gap from the mean
    surprise, which is the entropy.
    """
    index = start + tl.arange(0, BLOCK)
    x = tl.load(tokens.scores + index, mask=index < tokens.n, other=float("-inf"))
    closeness = _ordered(-tl.abs((tokens.highest - x) - tokens.center))
    return index, x, closeness, (_ordered(x) > tokens.floor) & (closeness >= tokens.nearest)


@triton.jit
def _survey(tokens, reference, BLOCK: tl.constexpr):
    """Return the set's lowest and highest key, its size, its mass, and its mass times gap."""
    low = tl.full([BLOCK], _ABOVE_ALL, tl.int32)
    high = tl.full([BLOCK], _LOWEST, tl.int32)
    count = tl.full([BLOCK], 0, tl.int32)
    mass = tl.full([BLOCK], 0, tl.int64)
    moment = tl.full([BLOCK], 0, tl.int64)
    for start in range(0, tokens.n, BLOCK):
        _index, x, _closeness, is_in = _tile(tokens, start, BLOCK)
        key = _ordered(x)
        low = tl.minimum(low, tl.where(is_in, key, _ABOVE_ALL))
        high = tl.maximum(high, tl.where(is_in, key, _LOWEST))
        count += is_in.to(tl.int32)
        share = tl.where(is_in, _share(x, reference), 0.0)
        mass += (share * _UNIT).to(tl.int64)
        gap = tl.where(share > 0.0, tokens.highest - x, 0.0)
        moment += (share * gap * _UNIT).to(tl.int64)
    return tl.min(low, 0), tl.max(high, 0), tl.sum(count, 0), tl.sum(mass, 0), tl.sum(moment, 0)


@triton.jit
def _search(
    tokens,
    limit,
    low,
    high,
    BY_COUNT: tl.constexpr,
    BY_CLOSENESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the lowest key that is kept: the tokens above it weigh less than `limit`.

    The key is that of a token between `low` and `high`, which close in on it from token to
    token. Keys are scores or closeness; a token weighs 1 or its mass.
    """
    step = 0
    while low < high:
        pivot = _between(low, high, step)
        weight = tl.full([BLOCK], 0, tl.int64)
        next_above = tl.full([BLOCK], _ABOVE_ALL, tl.int32)
        next_below = tl.full([BLOCK], _LOWEST, tl.int32)
        for start in range(0, tokens.n, BLOCK):
            _index, x, closeness, is_in = _tile(tokens, start, BLOCK)
            key = closeness if BY_CLOSENESS else _ordered(x)
            above, below = is_in & (key > pivot), is_in & (key <= pivot)
            if BY_COUNT:
                weight += above.to(tl.int64)
            else:
                weight += tl.where(above, _mass(x, tokens.highest), 0)
            next_above = tl.minimum(next_above, tl.where(above, key, _ABOVE_ALL))
            next_below = tl.maximum(next_below, tl.where(below, key, _LOWEST))
        if tl.sum(weight, 0) >= limit:
            low = tl.minimum(tl.min(next_above, 0), high)
        else:
            high = tl.maximum(tl.max(next_below, 0), low)
        step += 1
    return low


@triton.jit
def _top_p_limit(words, mass):
    """Return the mass to keep: the dropped tokens may weigh 1 - p, in float32, of the mass."""
    dropped = (1.0 - _float(words + _TOP_P)).to(tl.float64) * mass.to(tl.float64)
    return tl.maximum(mass - dropped.to(tl.int64), 1)


@triton.jit
def _suffice(candidates, mass, words, vocab_size, num_top, BLOCK: tl.constexpr):
    """Return whether the candidates above the bound have every token that the row can need."""
    suffice = candidates.floor == _MINUS_INFINITY
    if not suffice:
        _low, _high, count, above, _moment = _survey(candidates, candidates.highest, BLOCK)
        top_k = _top_k(words, vocab_size)
        if top_k > 0:
            suffice = count >= top_k
        elif _float(words + _TOP_P) < 1.0:
            suffice = above >= _top_p_limit(words, mass)
        elif not (_float(words + _TYPICAL_P) < 1.0):
            suffice = count >= num_top
    return suffice


@triton.jit
def _store_scores(scores, logits, counts_ptr, words, vocab_size, subtracted, BLOCK: tl.constexpr):
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = _processed(logits, counts_ptr, words, ids, vocab_size, subtracted)
        tl.store(scores + ids, x, mask=ids < vocab_size)
    tl.debug_barrier()


@triton.jit
def _cut(tokens, mass, words, vocab_size, BLOCK: tl.constexpr):
    """Apply top-k and top-p; return the surviving tokens and their mass.

    `mass` is that of the whole row, of which top-p drops a share, even if `tokens` are a part of
    the row. After top-k, everything that is left is among `tokens`.
    """
    low, high, count, listed, _ = _survey(tokens, tokens.highest, BLOCK)
    top_k = _top_k(words, vocab_size).to(tl.int64)
    if (top_k > 0) | (tokens.floor == _MINUS_INFINITY):
        mass = listed
    if (top_k > 0) & (count > top_k):
        low = _search(tokens, top_k, low, high, True, False, BLOCK)
        tokens = _with_floor(tokens, low - 1)
        mass = _survey(tokens, tokens.highest, BLOCK)[3]
    if _float(words + _TOP_P) < 1.0:
        low = _search(tokens, _top_p_limit(words, mass), low, high, False, False, BLOCK)
        tokens = _with_floor(tokens, low - 1)
        mass = _survey(tokens, tokens.highest, BLOCK)[3]
    return tokens, mass


@triton.jit
def _cut_typical(tokens, words, BLOCK: tl.constexpr):
    """Apply typical-p; return the surviving tokens, their highest score, and their mass."""
    scores, n, floor, highest, _center, nearest = tokens
    _low, _high, _count, mass, moment = _survey(tokens, highest, BLOCK)
    mass = tl.maximum(mass, 1)
    center = tl.div_rn(moment.to(tl.float32), mass.to(tl.float32))
    limit = _float(words + _TYPICAL_P).to(tl.float64) * mass.to(tl.float64)
    limit = tl.ceil(limit).to(tl.int64)
    low, high = tl.full([], _MINUS_INFINITY, tl.int32), tl.full([], 0, tl.int32)
    tokens = _Tokens(scores, n, floor, highest, center, nearest)
    nearest = _search(tokens, limit, low, high, False, True, BLOCK)
    tokens = _Tokens(scores, n, floor, highest, center, nearest)
    reference = _finite(_unordered(_survey(tokens, highest, BLOCK)[1]))
    return tokens, reference, _survey(tokens, reference, BLOCK)[3]


# -- results --------------------------------------------------------------------------


@triton.jit
def _token_ids(ids, index, n):
    """Return the token ids at `index`: candidates have them listed, a whole row's are the index."""
    candidate_ids, are_listed = ids
    listed = tl.load(candidate_ids + index, mask=(index < n) & are_listed, other=0)
    return tl.where(are_listed, listed, index)


@triton.jit
def _draw(survivors, ids, words, BLOCK: tl.constexpr):
    """Return the best survivor, packed; noise is added first if the row is sampled."""
    do_sample = tl.load(words + _DO_SAMPLE) != 0
    key_0, key_1 = tl.load(words + _NOISE_KEY), tl.load(words + _NOISE_KEY + 1)
    best = tl.full([BLOCK], _NOTHING, tl.int64)
    for start in range(0, survivors.n, BLOCK):
        index, x, _closeness, survives = _tile(survivors, start, BLOCK)
        token_ids = _token_ids(ids, index, survivors.n)
        if do_sample:
            x += _gumbel(token_ids, key_0, key_1)
        best = tl.maximum(best, tl.where(survives, _packed(x, token_ids), _NOTHING))
    return tl.max(best, 0)


@triton.jit
def _clear_top(top_ids, top_logprobs, num_top, TOP_BLOCK: tl.constexpr):
    place = tl.arange(0, TOP_BLOCK)
    tl.store(top_ids + place, tl.zeros([TOP_BLOCK], tl.int64), mask=place < num_top)
    tl.store(top_logprobs + place, float("-inf"), mask=place < num_top)
    tl.debug_barrier()


@triton.jit
def _list_top(survivors, ids, top_ids, top_scores, num_top, BLOCK: tl.constexpr):
    """Store the `num_top` best survivors, or all if there are fewer; return how many.

    They are stored in no order: all those above the lowest score that has a place, and of those
    with that score the lowest ids.
    """
    low, high, count, _mass, _moment = _survey(survivors, survivors.highest, BLOCK)
    last = low
    if count > num_top:
        last = _search(survivors, num_top, low, high, True, False, BLOCK)
    num_equal = _survey(_with_floor(survivors, last), survivors.highest, BLOCK)[2]
    num_above = tl.full([], 0, tl.int32)
    for start in range(0, survivors.n, BLOCK):
        index, x, _closeness, survives = _tile(survivors, start, BLOCK)
        is_above, is_equal = survives & (_ordered(x) > last), survives & (_ordered(x) == last)
        # Both counts are packed in one integer: a tile has fewer than 2^16 of either.
        so_far = tl.cumsum(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16), 0)
        above, equal = num_above + (so_far & 0xFFFF), num_equal + (so_far >> 16)
        place = tl.where(is_above, above, equal) - 1
        mask = (is_above | is_equal) & (place < num_top)
        tl.store(top_ids + place, _token_ids(ids, index, survivors.n).to(tl.int64), mask=mask)
        tl.store(top_scores + place, x, mask=mask)
        num_above += tl.sum(is_above.to(tl.int32), 0)
        num_equal += tl.sum(is_equal.to(tl.int32), 0)
    return tl.minimum(count, num_top)


@triton.jit
def _sort_top(top_ids, top_logprobs, num_listed, reference, mass, TOP_BLOCK: tl.constexpr):
    """Sort the top tokens: the place of each is the number of better ones."""
    tl.debug_barrier()
    index = tl.arange(0, TOP_BLOCK)
    ids, x = _load_top(top_ids, top_logprobs, index, num_listed)
    place = tl.zeros([TOP_BLOCK], tl.int32)
    for start in range(0, num_listed, 32):
        others, y = _load_top(top_ids, top_logprobs, start + tl.arange(0, 32), num_listed)
        is_better = _packed(y, others)[None, :] > _packed(x, ids)[:, None]
        place += tl.sum(is_better.to(tl.int32), 1)
    tl.debug_barrier()
    mask = index < num_listed
    tl.store(top_ids + place, ids, mask=mask)
    tl.store(top_logprobs + place, _logprob(x, reference, mass), mask=mask)


@triton.jit
def _load_top(top_ids, top_scores, index, num_listed):
    mask = index < num_listed
    ids = tl.load(top_ids + index, mask=mask, other=0x7FFFFFFF)
    return ids, tl.load(top_scores + index, mask=mask, other=float("-inf"))
