"""Sampling in two launches: no sort, no word to the host, every row by its own parameters.

The first launch has a program for each `CHUNK` tokens of each row. It penalises, divides by
the temperature, and leaves of its chunk the best token (its noise added, where the row is
sampled from all of its tokens), the mass, and, where the row needs them, its highest scores:
at most `KEPT`, and the bound above which there are no others. The second has a program for
each row, which merges the chunks and is done, unless the row has a threshold to be found.

All thresholds are one question. A token is kept if those ranked above it weigh less than a
limit; top-k ranks by score and counts them, top-p sums their probabilities, typical-p ranks
by how near a surprise is to the entropy. It is answered by bisection over float32's ordered
bits, exactly. Ties stay or go together.

Weights are integers: a probability relative to the best token's, in units of 2^-40. Their
sums have no order, so a row's result depends on no layout and no company. They stand for
real masses up to float32's error in an exponential: a token whose mass above it is within
1e-6 of a limit may fall on either side, as may one whose surprise is that near typical-p's.

Bytes, for V tokens of b bytes each: both paths read the logits once, V * b, and a row with
penalties its counts, V * 4, in the first launch. The candidates are V / 16 * 8 bytes, and
the search passes over them some ten times, in the L1 cache. A row whose threshold lies below
its candidates (flat distributions, top_k above KEPT / 2, typical_p alone) is processed once
more by its one program, which writes V * 4 bytes and passes over those instead.
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
"""Candidates of a chunk."""
BLOCK = 4096
"""Tokens of a row that its one program has in registers."""

_WORDS = tl.constexpr(ROW_PARAMETERS.itemsize // 4)
_FIELDS = tl.constexpr(4)
"""Of a chunk, int64 each: its best token, highest score, mass, and bound."""
_BEST, _HIGHEST, _MASS, _BOUND = (tl.constexpr(field) for field in range(4))

_UNIT = tl.constexpr(2.0**40)
_LOWEST = tl.constexpr(-(1 << 31))
_ABOVE_ALL = tl.constexpr((1 << 31) - 1)
_MINUS_INFINITY = tl.constexpr(-(0x7F800000 + 1))
"""Its place in the order of `_ordered`."""
_NOTHING = tl.constexpr(-(1 << 63))
_GENERATED = tl.constexpr(sampling.GENERATED)


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
_DO_SAMPLE = _words.pop("do_sample")
_NOISE_KEY = _words.pop("noise_key")
_SLOT = _words.pop("slot")
_CONTEXT_LENGTH = _words.pop("context_length")
_TOP_N = _words.pop("top_n_tokens")
assert not _words, f"no kernel reads {', '.join(_words)}"


def greedy(logits: Tensor, want_logprobs: bool) -> tuple[Tensor, Tensor | None]:
    """The best token of each row, of equals the lowest id: [rows] int64, and its logprob.

    logits  [rows, vocab_size], any float type and stride between rows

    Reads the logits once. A row comes out bit for bit as a neutral one does of `sample`.
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
    """Penalties, temperature, top-k, top-p, typical-p and a draw, as the parameters ask.

    logits      [rows, vocab_size], any float type and stride between rows
    parameters  [rows, words] int32, contiguous: `ROW_PARAMETERS`
    counts      [slots, vocab_size] int32, contiguous: each slot's tokens so far, those that were
                generated marked as `GENERATED`, to which the chosen ones of rows with a penalty
                are added; None where there are none

    Returns ids [rows] int64 and their logprobs [rows] float32; where `num_top` is not 0, also
    the ids and logprobs of that many tokens (or all there are), best first, of equals the
    lowest id. Tokens that were dropped are none of these: id 0, logprob -inf in their stead,
    as in all of a row whose `top_n_tokens` is 0.

    Scratch is 4 bytes a token and 8 a candidate, of which rows without a threshold use none.
    """
    rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    num_top = min(num_top, vocab_size)
    assert logits.stride(1) == 1
    assert parameters.is_contiguous()
    assert counts is None or (counts.is_contiguous() and counts.shape[1] == vocab_size)
    num_candidates = num_chunks * KEPT
    partials = logits.new_empty(rows, _FIELDS.value, num_chunks, dtype=torch.int64)
    # Each row's candidates, and behind them room for all of its scores.
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
    """float32 to int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _packed(x, ids):
    """One integer that is higher where x is, and of equals where the id is lower."""
    return (_ordered(x).to(tl.int64) << 32) + (0x7FFFFFFF - ids)


@triton.jit
def _packed_id(packed):
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF)


@triton.jit
def _finite(x):
    """Something to subtract: 0 for a row that has no probabilities."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _share(x, reference):
    """exp(x - reference), at most 1; 0 for NaN."""
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
    """`kernels.sampling.hash31`."""
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
    """`kernels.sampling.gumbel_noise`: its integers to the bit, its logarithms to about 2e-6.

    Below 1/4, -log(1 - u) is 2 atanh(u / (2 - u)) by its series, whose first term left out
    is 4e-10 of it: a logarithm near 1 that is good to 2^-22 leaves nothing of a small u.
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
    )


@triton.jit
def _top_k(words, vocab_size):
    """0 where it drops nothing."""
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
def _processed(logits_ptr, counts_ptr, words, ids, vocab_size):
    """Scores before any is dropped; -inf past the vocabulary."""
    mask = ids < vocab_size
    x = tl.load(logits_ptr + ids, mask=mask, other=float("-inf")).to(tl.float32)
    if counts_ptr is not None and _has_penalty(words):
        slot = tl.load(words + _SLOT).to(tl.int64)
        marked = tl.load(counts_ptr + slot * vocab_size + ids, mask=mask, other=0)
        count = marked & (_GENERATED - 1)
        repetition, frequency = _float(words + _REPETITION), _float(words + _FREQUENCY)
        repeated = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
        x = tl.where(count > 0, repeated, x)
        length = tl.maximum(tl.load(words + _CONTEXT_LENGTH), 1).to(tl.float32)
        x -= frequency * tl.div_rn(count.to(tl.float32), length)
        x -= tl.where(marked >= _GENERATED, _float(words + _PRESENCE), 0.0)
    temperature = _float(words + _TEMPERATURE)
    if temperature != 1.0:
        x = tl.div_rn(x, temperature)
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
    """Returns the highest score."""
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
    x = _processed(logits_ptr + row * row_stride, counts_ptr, words, ids, vocab_size)

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
    """A key with at most KEPT others above it, and no fewer than half as many but for ties."""
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
    """A key from low up to, not including, high: the middle of their values, or of their bits.

    The one is nearer the middle of the scores, the other is there in 32 steps whatever they are.
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
    """The row's highest score and the mass relative to it."""
    keys = _field(partials, _HIGHEST, num_chunks, _MINUS_INFINITY, CHUNKS).to(tl.int32)
    highest = _finite(_unordered(tl.max(keys, 0)))
    masses = _field(partials, _MASS, num_chunks, 0, CHUNKS).to(tl.float32)
    return highest, tl.sum((masses * _share(_unordered(keys), highest)).to(tl.int64), 0)


# Not compiled anew for another number of top tokens.
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

    reference = highest
    if has_threshold | wants_top:
        num_candidates = num_chunks * KEPT
        scores = scores_ptr + row * scores_stride
        # Below the highest bound of a chunk, the candidates are not all there is.
        bounds = _field(partials, _BOUND, num_chunks, _MINUS_INFINITY, CHUNKS)
        tokens = _all_above(tl.max(bounds, 0).to(tl.int32), scores, num_candidates, highest)
        are_listed = _suffice(tokens, mass, words, vocab_size, num_top, BLOCK)
        if not are_listed:
            scores += num_candidates
            _store_scores(scores, logits, counts_ptr, words, vocab_size, BLOCK)
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
    x = _processed(logits, counts_ptr, words, token, vocab_size)
    tl.store(ids_ptr + row, token)
    tl.store(logprobs_ptr + row, _logprob(x, reference, mass))
    if counts_ptr is not None and _has_penalty(words):
        tl.debug_barrier()  # all threads have read the count that one of them changes
        count_ptr = counts_ptr + tl.load(words + _SLOT).to(tl.int64) * vocab_size + token
        tl.store(count_ptr, (tl.load(count_ptr) + 1) | _GENERATED)


# -- what survives --------------------------------------------------------------------


class _Tokens(NamedTuple):
    """Some of a row: of `scores` [n] float32, its candidates or all there are, those above
    the key `floor` whose closeness to a gap of `center` is at least the key `nearest`.

    A gap is the distance to `highest`, a score.
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
    """Indices, scores, keys of closeness, and which are in the set: [BLOCK] each.

    A surprise is its gap and a constant, and so is the mean of surprises, the entropy.
    """
    index = start + tl.arange(0, BLOCK)
    x = tl.load(tokens.scores + index, mask=index < tokens.n, other=float("-inf"))
    closeness = _ordered(-tl.abs((tokens.highest - x) - tokens.center))
    return index, x, closeness, (_ordered(x) > tokens.floor) & (closeness >= tokens.nearest)


@triton.jit
def _survey(tokens, reference, BLOCK: tl.constexpr):
    """The set's lowest and highest key, number, mass, and mass times gap."""
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
    """The lowest key that is kept: those above it weigh less than `limit`, at no lower one.

    It is that of a token between `low` and `high`, which close in on it from token to token.
    They rank by score or by closeness, and weigh 1 or their mass.
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
    """What is dropped may weigh 1 - p, in float32, of the mass."""
    dropped = (1.0 - _float(words + _TOP_P)).to(tl.float64) * mass.to(tl.float64)
    return tl.maximum(mass - dropped.to(tl.int64), 1)


@triton.jit
def _suffice(candidates, mass, words, vocab_size, num_top, BLOCK: tl.constexpr):
    """Whether every token that will be asked for is among the candidates above the bound."""
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
def _store_scores(scores, logits, counts_ptr, words, vocab_size, BLOCK: tl.constexpr):
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = _processed(logits, counts_ptr, words, ids, vocab_size)
        tl.store(scores + ids, x, mask=ids < vocab_size)
    tl.debug_barrier()


@triton.jit
def _cut(tokens, mass, words, vocab_size, BLOCK: tl.constexpr):
    """Top-k and top-p: the survivors and their mass.

    `mass` is the row's, of which top-p drops a share, be it in the tokens or not. Behind
    top-k, all that is left is in the tokens.
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
    """Typical-p: the survivors, the highest score of them, and their mass."""
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


# -- what becomes of it ---------------------------------------------------------------


@triton.jit
def _token_ids(ids, index, n):
    """Candidates' are listed; of a whole row they are the indices."""
    candidate_ids, are_listed = ids
    listed = tl.load(candidate_ids + index, mask=(index < n) & are_listed, other=0)
    return tl.where(are_listed, listed, index)


@triton.jit
def _draw(survivors, ids, words, BLOCK: tl.constexpr):
    """The best of them, packed; with its noise, if the row is sampled."""
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
    """Store the num_top best, or all there are, in no order, and return how many.

    First those above the lowest that has a place; of that and its equals, the lowest ids.
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
        # Both numbers in one: a tile has fewer than 2^16 of either.
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
    """Each to the place that is the number of those better than it."""
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
