"""Sets of a row's tokens, and the one search that answers every threshold.

A token is kept if the tokens ranked above it weigh less than a limit. Top-k ranks by score and
counts them, top-p sums their probabilities, typical-p ranks by how near a token's surprise is to
the entropy. The question is answered exactly, by bisection over float32's ordered bits. Tied
tokens are kept or dropped together.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.fused_sampling.numbers import (
    ABOVE_ALL,
    LOWEST,
    UNIT,
    between,
    mass_of,
    ordered,
    share_of,
)


class Tokens(NamedTuple):
    """A set of a row's tokens, given by its thresholds.

    `scores` [n] float32 are those of some or all of the row's tokens: in memory, of which a block
    is read at a time, or one block in registers. The set has the tokens whose score is above
    the key `floor`, and whose gap, the distance of the score to the score `highest`, is so near to
    `center` that the closeness is at least the key `nearest`.
    """

    scores: Any
    n: Any
    floor: Any
    highest: Any
    center: Any
    nearest: Any


@triton.jit
def all_above(floor, scores, n, highest):
    center, nearest = tl.full([], 0.0, tl.float32), tl.full([], LOWEST, tl.int32)
    return Tokens(scores, n, floor, highest, center, nearest)


@triton.jit
def with_floor(tokens, floor):
    return Tokens(tokens.scores, tokens.n, floor, tokens.highest, tokens.center, tokens.nearest)


@triton.jit
def near(tokens, center, nearest):
    return Tokens(tokens.scores, tokens.n, tokens.floor, tokens.highest, center, nearest)


@triton.jit
def block_of(tokens, start, BLOCK: tl.constexpr):
    """Return indices, scores, keys of closeness, and which tokens are in the set, [BLOCK] each.

    A gap is a surprise up to a constant. The same constant separates the mean gap from the mean
    surprise, which is the entropy.
    """
    index = start + tl.arange(0, BLOCK)
    if tokens.scores.dtype.is_ptr():
        x = tl.load(tokens.scores + index, mask=index < tokens.n, other=float("-inf"))
    else:
        x = tokens.scores
    closeness = ordered(-tl.abs((tokens.highest - x) - tokens.center))
    return index, x, closeness, (ordered(x) > tokens.floor) & (closeness >= tokens.nearest)


class Survey(NamedTuple):
    """A set's lowest and highest key, its size, its mass, and its mass times gap."""

    low: Any
    high: Any
    count: Any
    mass: Any
    moment: Any


@triton.jit
def survey(tokens, reference, BLOCK: tl.constexpr):
    """Return the `Survey` of the set, masses being relative to the score `reference`."""
    low = tl.full([BLOCK], ABOVE_ALL, tl.int32)
    high = tl.full([BLOCK], LOWEST, tl.int32)
    count = tl.full([BLOCK], 0, tl.int32)
    mass = tl.full([BLOCK], 0, tl.int64)
    moment = tl.full([BLOCK], 0, tl.int64)
    for start in range(0, tokens.n, BLOCK):
        _index, x, _closeness, is_in = block_of(tokens, start, BLOCK)
        key = ordered(x)
        low = tl.minimum(low, tl.where(is_in, key, ABOVE_ALL))
        high = tl.maximum(high, tl.where(is_in, key, LOWEST))
        count += is_in.to(tl.int32)
        share = tl.where(is_in, share_of(x, reference), 0.0)
        mass += (share * UNIT).to(tl.int64)
        gap = tl.where(share > 0.0, tokens.highest - x, 0.0)
        moment += (share * gap * UNIT).to(tl.int64)
    return Survey(
        tl.min(low, 0), tl.max(high, 0), tl.sum(count, 0), tl.sum(mass, 0), tl.sum(moment, 0)
    )


@triton.jit
def search(
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
        pivot = between(low, high, step)
        weight = tl.full([BLOCK], 0, tl.int32 if BY_COUNT else tl.int64)
        next_above = tl.full([BLOCK], ABOVE_ALL, tl.int32)
        next_below = tl.full([BLOCK], LOWEST, tl.int32)
        for start in range(0, tokens.n, BLOCK):
            _index, x, closeness, is_in = block_of(tokens, start, BLOCK)
            key = closeness if BY_CLOSENESS else ordered(x)
            above, below = is_in & (key > pivot), is_in & (key <= pivot)
            if BY_COUNT:
                weight += above.to(tl.int32)
            else:
                weight += tl.where(above, mass_of(x, tokens.highest), 0)
            next_above = tl.minimum(next_above, tl.where(above, key, ABOVE_ALL))
            next_below = tl.maximum(next_below, tl.where(below, key, LOWEST))
        if tl.sum(weight, 0) >= limit:
            low = tl.minimum(tl.min(next_above, 0), high)
        else:
            high = tl.maximum(tl.max(next_below, 0), low)
        step += 1
    return low


@triton.jit
def bound_of(tokens, low, high, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Return a key between `low` and `high` with at most `MOST` of the tokens above it, and at
    least half as many unless tokens are tied.
    """
    bound, above, step = high, tl.full([], 0, tl.int32), 0
    while (low < bound) & (above <= MOST // 2):
        pivot = between(low, bound, step)
        num_above = tl.full([BLOCK], 0, tl.int32)
        for start in range(0, tokens.n, BLOCK):
            _index, x, _closeness, _is_in = block_of(tokens, start, BLOCK)
            num_above += (ordered(x) > pivot).to(tl.int32)
        num = tl.sum(num_above, 0)
        fits = num <= MOST
        bound = tl.where(fits, pivot, bound)
        above = tl.where(fits, num, above)
        low = tl.where(fits, low, pivot + 1)
        step += 1
    return bound
