"""From a row's candidates to its token: thresholds, the draw, and the top tokens."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.fused_sampling.numbers import (
    MINUS_INFINITY,
    NOTHING,
    finite,
    gumbel,
    logprob_of,
    ordered,
    packed,
    unordered,
)
from kernels.fused_sampling.row import (
    has_threshold,
    is_sampled,
    noise_key_of,
    top_k_of,
    top_p_of,
    typical_p_of,
    wants_top,
)
from kernels.fused_sampling.tokens import block_of, near, search, survey, with_floor


class TopTokens(NamedTuple):
    """Where a row's top tokens go: `ids` [n] int64 and `logprobs` [n] float32; None for none."""

    ids: Any
    logprobs: Any
    n: Any


@triton.jit
def suffice(candidates, found, mass, words, vocab_size, num_top):
    """Return whether the candidates have every token that the row can need.

    `found` is their survey, and `mass` that of the row.
    """
    suffice = candidates.floor == MINUS_INFINITY
    if not suffice:
        top_k = top_k_of(words, vocab_size)
        if top_k > 0:
            suffice = found.count >= top_k
        elif top_p_of(words) < 1.0:
            suffice = found.mass >= _top_p_limit(words, mass)
        elif not (typical_p_of(words) < 1.0):
            suffice = found.count >= num_top
    return suffice


@triton.jit
def narrow(
    tokens,
    ids,
    found,
    best,
    mass,
    words,
    vocab_size,
    top,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Apply the row's thresholds, draw a token and list the top tokens.

    Returns the best token, packed, and the score and mass that its logprob refers to. `found` is
    the survey of the tokens; `best` is the best of the whole row, and `mass` the row's.
    """
    reference = tokens.highest
    if has_threshold(words, vocab_size):
        tokens, mass = _cut(tokens, found, mass, words, vocab_size, BLOCK)
        if typical_p_of(words) < 1.0:
            tokens, reference, mass = _cut_typical(tokens, words, BLOCK)
        drawn = _draw(tokens, ids, words, BLOCK)
        best = tl.where(drawn == NOTHING, best, drawn)
    if top.ids is not None and wants_top(words):
        num_listed = _list_top(tokens, ids, top, BLOCK)
        _sort_top(top, num_listed, reference, mass, TOP)
    return best, reference, mass


# -- thresholds -----------------------------------------------------------------------


@triton.jit
def _top_p_limit(words, mass):
    """Return the mass to keep: the dropped tokens may weigh 1 - p, in float32, of the mass."""
    dropped = (1.0 - top_p_of(words)).to(tl.float64) * mass.to(tl.float64)
    return tl.maximum(mass - dropped.to(tl.int64), 1)


@triton.jit
def _cut(tokens, found, mass, words, vocab_size, BLOCK: tl.constexpr):
    """Apply top-k and top-p; return the surviving tokens and their mass.

    `mass` is that of the whole row, of which top-p drops a share, even if `tokens` are a part of
    the row. After top-k, everything that is left is among `tokens`.
    """
    low, high = found.low, found.high
    top_k = top_k_of(words, vocab_size)
    if (top_k > 0) | (tokens.floor == MINUS_INFINITY):
        mass = found.mass
    if (top_k > 0) & (found.count > top_k):
        low = search(tokens, top_k, low, high, True, False, BLOCK)
        tokens = with_floor(tokens, low - 1)
        mass = survey(tokens, tokens.highest, BLOCK).mass
    if top_p_of(words) < 1.0:
        low = search(tokens, _top_p_limit(words, mass), low, high, False, False, BLOCK)
        tokens = with_floor(tokens, low - 1)
        mass = survey(tokens, tokens.highest, BLOCK).mass
    return tokens, mass


@triton.jit
def _cut_typical(tokens, words, BLOCK: tl.constexpr):
    """Apply typical-p; return the surviving tokens, their highest score, and their mass."""
    left = survey(tokens, tokens.highest, BLOCK)
    mass = tl.maximum(left.mass, 1)
    center = tl.div_rn(left.moment.to(tl.float32), mass.to(tl.float32))
    limit = typical_p_of(words).to(tl.float64) * mass.to(tl.float64)
    limit = tl.ceil(limit).to(tl.int64)
    low, high = tl.full([], MINUS_INFINITY, tl.int32), tl.full([], 0, tl.int32)
    tokens = near(tokens, center, tokens.nearest)
    nearest = search(tokens, limit, low, high, False, True, BLOCK)
    tokens = near(tokens, center, nearest)
    reference = finite(unordered(survey(tokens, tokens.highest, BLOCK).high))
    return tokens, reference, survey(tokens, reference, BLOCK).mass


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
    do_sample = is_sampled(words)
    key_0, key_1 = noise_key_of(words)
    best = tl.full([BLOCK], NOTHING, tl.int64)
    for start in range(0, survivors.n, BLOCK):
        index, x, _closeness, survives = block_of(survivors, start, BLOCK)
        token_ids = _token_ids(ids, index, survivors.n)
        if do_sample:
            x += gumbel(token_ids, key_0, key_1)
        best = tl.maximum(best, tl.where(survives, packed(x, token_ids), NOTHING))
    return tl.max(best, 0)


@triton.jit
def clear_top(top, TOP: tl.constexpr):
    place = tl.arange(0, TOP)
    tl.store(top.ids + place, tl.zeros([TOP], tl.int64), mask=place < top.n)
    tl.store(top.logprobs + place, float("-inf"), mask=place < top.n)
    tl.debug_barrier()


@triton.jit
def _list_top(survivors, ids, top, BLOCK: tl.constexpr):
    """Store the `top.n` best survivors, or all if there are fewer; return how many.

    They are stored in no order, their scores in place of logprobs: all those above the lowest
    score that has a place, and of those with that score the lowest ids.
    """
    left = survey(survivors, survivors.highest, BLOCK)
    last = left.low
    if left.count > top.n:
        last = search(survivors, top.n, left.low, left.high, True, False, BLOCK)
    num_equal = survey(with_floor(survivors, last), survivors.highest, BLOCK).count
    num_above = tl.full([], 0, tl.int32)
    for start in range(0, survivors.n, BLOCK):
        index, x, _closeness, survives = block_of(survivors, start, BLOCK)
        is_above, is_equal = survives & (ordered(x) > last), survives & (ordered(x) == last)
        # Both counts are packed in one integer: a block has fewer than 2^16 of either.
        so_far = tl.cumsum(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16), 0)
        above, equal = num_above + (so_far & 0xFFFF), num_equal + (so_far >> 16)
        place = tl.where(is_above, above, equal) - 1
        mask = (is_above | is_equal) & (place < top.n)
        tl.store(top.ids + place, _token_ids(ids, index, survivors.n).to(tl.int64), mask=mask)
        tl.store(top.logprobs + place, x, mask=mask)
        num_above += tl.sum(is_above.to(tl.int32), 0)
        num_equal += tl.sum(is_equal.to(tl.int32), 0)
    return tl.minimum(left.count, top.n)


@triton.jit
def _sort_top(top, num_listed, reference, mass, TOP: tl.constexpr):
    """Sort the top tokens: the place of each is the number of better ones."""
    tl.debug_barrier()
    index = tl.arange(0, TOP)
    ids, x = _load_top(top, index, num_listed)
    place = tl.zeros([TOP], tl.int32)
    for start in range(0, num_listed, 32):
        others, y = _load_top(top, start + tl.arange(0, 32), num_listed)
        is_better = packed(y, others)[None, :] > packed(x, ids)[:, None]
        place += tl.sum(is_better.to(tl.int32), 1)
    tl.debug_barrier()
    mask = index < num_listed
    tl.store(top.ids + place, ids, mask=mask)
    tl.store(top.logprobs + place, logprob_of(x, reference, mass), mask=mask)


@triton.jit
def _load_top(top, index, num_listed):
    mask = index < num_listed
    ids = tl.load(top.ids + index, mask=mask, other=0x7FFFFFFF)
    return ids, tl.load(top.logprobs + index, mask=mask, other=float("-inf"))
