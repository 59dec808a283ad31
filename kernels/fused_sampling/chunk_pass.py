"""The first pass: each program processes one chunk of one row."""

import triton
import triton.language as tl

from kernels.fused_sampling.numbers import ABOVE_ALL, MINUS_INFINITY, gumbel, ordered, unordered
from kernels.fused_sampling.partials import FIELDS, store_best, store_bound
from kernels.fused_sampling.row import (
    WORDS,
    has_threshold,
    is_sampled,
    noise_key_of,
    processed,
    subtrahend,
    wants_top,
)
from kernels.fused_sampling.tokens import all_above, bound_of


@triton.jit
def chunk_kernel(
    logits_ptr,
    row_stride,
    parameters_ptr,
    counts_ptr,
    partials_ptr,
    scores_ptr,
    scores_stride,
    candidate_ids_ptr,
    candidate_ids_stride,
    vocab_size,
    CHUNK: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Store the chunk's best token, with noise where the row is sampled from all of its tokens,
    and its mass; for rows that need them, also the chunk's highest scores.
    """
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    words = parameters_ptr + row * WORDS
    partial = partials_ptr + row * FIELDS * num_chunks + chunk
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = logits_ptr + row * row_stride
    subtracted = subtrahend(logits, counts_ptr, words, vocab_size, CHUNK)
    x = processed(logits, counts_ptr, words, ids, vocab_size, subtracted)

    keeps_part = has_threshold(words, vocab_size)
    noisy = x
    if is_sampled(words) & (not keeps_part):
        key_0, key_1 = noise_key_of(words)
        noisy = x + gumbel(ids, key_0, key_1)
    highest = store_best(partial, x, noisy, ids, vocab_size, True)

    if keeps_part | wants_top(words):
        bound = _find_bound(x, highest, KEPT, CHUNK)
        store_bound(partial, bound)
        candidates = scores_ptr + row * scores_stride + chunk * KEPT
        candidate_ids = candidate_ids_ptr + row * candidate_ids_stride + chunk * KEPT
        tl.store(candidates + tl.arange(0, KEPT), float("-inf"))
        tl.debug_barrier()
        is_candidate = ordered(x) > bound
        place = tl.cumsum(is_candidate.to(tl.int32), 0) - 1
        tl.store(candidates + place, x, mask=is_candidate)
        tl.store(candidate_ids + place, ids, mask=is_candidate)


@triton.jit
def _find_bound(x, highest, KEPT: tl.constexpr, CHUNK: tl.constexpr):
    """Return a key with at most KEPT keys above it, and at least KEPT / 2 unless keys are tied."""
    keys = ordered(x)
    exists = keys > MINUS_INFINITY
    bound = tl.full([], MINUS_INFINITY, tl.int32)
    if tl.sum(exists.to(tl.int32), 0) > KEPT:
        low = tl.min(tl.where(exists, keys, ABOVE_ALL), 0)
        tokens = all_above(bound, x, CHUNK, unordered(highest))
        bound = bound_of(tokens, low, highest, KEPT, CHUNK)
    return bound
