"""What each chunk of a row leaves for the pass that merges them."""

import triton
import triton.language as tl

from kernels.fused_sampling.numbers import (
    MINUS_INFINITY,
    NOTHING,
    finite,
    mass_of,
    ordered,
    packed,
    share_of,
    unordered,
)

FIELDS = tl.constexpr(4)
"""Values that a chunk leaves, int64 each: best token, highest score, mass, and bound."""
_BEST, _HIGHEST, _MASS, _BOUND = (tl.constexpr(field) for field in range(4))


@triton.jit
def store_best(partial, x, noisy, ids, vocab_size, WITH_MASS: tl.constexpr):
    """Store a chunk's best token, highest score and mass. Returns the highest score, ordered."""
    best = tl.max(tl.where(ids < vocab_size, packed(noisy, ids), NOTHING), 0)
    tl.store(partial + _BEST * tl.num_programs(0), best)
    highest = tl.max(ordered(x), 0)
    if WITH_MASS:
        tl.store(partial + _HIGHEST * tl.num_programs(0), highest.to(tl.int64))
        mass = tl.sum(mass_of(x, finite(unordered(highest))), 0)
        tl.store(partial + _MASS * tl.num_programs(0), mass)
    return highest


@triton.jit
def store_bound(partial, bound):
    """Store the key above which the chunk's candidates are all its tokens."""
    tl.store(partial + _BOUND * tl.num_programs(0), bound.to(tl.int64))


@triton.jit
def _field(partials, FIELD: tl.constexpr, num_chunks, other, CHUNKS: tl.constexpr):
    chunks = tl.arange(0, CHUNKS)
    mask = chunks < num_chunks
    return tl.load(partials + FIELD * num_chunks + chunks, mask=mask, other=other)


@triton.jit
def merged_best(partials, num_chunks, CHUNKS: tl.constexpr):
    """Return the row's best token, packed."""
    return tl.max(_field(partials, _BEST, num_chunks, NOTHING, CHUNKS), 0)


@triton.jit
def merged_mass(partials, num_chunks, CHUNKS: tl.constexpr):
    """Return the row's highest score and the row's mass relative to it."""
    keys = _field(partials, _HIGHEST, num_chunks, MINUS_INFINITY, CHUNKS).to(tl.int32)
    highest = finite(unordered(tl.max(keys, 0)))
    masses = _field(partials, _MASS, num_chunks, 0, CHUNKS).to(tl.float32)
    return highest, tl.sum((masses * share_of(unordered(keys), highest)).to(tl.int64), 0)


@triton.jit
def merged_bound(partials, num_chunks, CHUNKS: tl.constexpr):
    """Return the key above which the candidates of all chunks are all tokens of the row."""
    return tl.max(_field(partials, _BOUND, num_chunks, MINUS_INFINITY, CHUNKS), 0).to(tl.int32)
