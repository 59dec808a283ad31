"""The second pass: each program merges the chunks of one row, in registers."""

import triton
import triton.language as tl

from kernels.fused_sampling.narrowing import TopTokens, clear_top, narrow, suffice
from kernels.fused_sampling.numbers import logprob_of, ordered, packed_id
from kernels.fused_sampling.partials import FIELDS, merged_best, merged_bound, merged_mass
from kernels.fused_sampling.row import (
    WORDS,
    count_token,
    has_threshold,
    processed,
    subtrahend,
    wants_top,
)
from kernels.fused_sampling.tokens import all_above, bound_of, survey

UNSETTLED = tl.constexpr(-1)
"""The id of a row that is left to the third pass."""


# Another number of top tokens does not compile the kernel again.
@triton.jit(do_not_specialize=["num_top"])
def row_kernel(
    logits_ptr,
    row_stride,
    parameters_ptr,
    counts_ptr,
    partials_ptr,
    scores_ptr,
    scores_stride,
    candidate_ids_ptr,
    candidate_ids_stride,
    ids_ptr,
    logprobs_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    vocab_size,
    num_chunks,
    num_top,
    CHUNKS: tl.constexpr,
    KEPT: tl.constexpr,
    HELD: tl.constexpr,
    TOP: tl.constexpr,
):
    """Store each row's token and logprob, or `UNSETTLED` where more than `HELD` tokens matter."""
    row = tl.program_id(0).to(tl.int64)
    words = parameters_ptr + row * WORDS
    partials = partials_ptr + row * FIELDS * num_chunks
    best = merged_best(partials, num_chunks, CHUNKS)
    highest, mass = merged_mass(partials, num_chunks, CHUNKS)
    top = TopTokens(None, None, num_top)
    if top_ids_ptr is not None:
        top = TopTokens(top_ids_ptr + row * num_top, top_logprobs_ptr + row * num_top, num_top)
        clear_top(top, TOP)

    reference, is_settled = highest, True
    if has_threshold(words, vocab_size) | (top.ids is not None and wants_top(words)):
        num_candidates = num_chunks * KEPT
        bound = merged_bound(partials, num_chunks, CHUNKS)
        candidates = all_above(bound, scores_ptr + row * scores_stride, num_candidates, highest)
        ids = candidate_ids_ptr + row * candidate_ids_stride
        held = _held(candidates, ids, HELD)
        found = survey(held, highest, HELD)
        is_settled = suffice(held, found, mass, words, vocab_size, num_top)
        if is_settled:
            held_ids = (ids + num_candidates, True)
            best, reference, mass = narrow(
                held, held_ids, found, best, mass, words, vocab_size, top, TOP, HELD
            )

    token = tl.where(is_settled, packed_id(best), UNSETTLED)
    tl.store(ids_ptr + row, token)
    if is_settled:
        logits = logits_ptr + row * row_stride
        subtracted = subtrahend(logits, counts_ptr, words, vocab_size, HELD)
        x = processed(logits, counts_ptr, words, token, vocab_size, subtracted)
        tl.store(logprobs_ptr + row, logprob_of(x, reference, mass))
        count_token(counts_ptr, words, token, vocab_size)


@triton.jit
def _held(candidates, ids, HELD: tl.constexpr):
    """Return the candidates above their floor in registers; their ids follow those of `ids`.

    If there are more than `HELD`, the floor is raised.
    """
    num_held = _compact(candidates, ids, HELD)
    if num_held > HELD:
        top = ordered(candidates.highest)
        floor = bound_of(candidates, candidates.floor, top, HELD, HELD)
        candidates = all_above(floor, candidates.scores, candidates.n, candidates.highest)
        num_held = _compact(candidates, ids, HELD)
    place = candidates.n + tl.arange(0, HELD)
    mask = tl.arange(0, HELD) < num_held
    x = tl.load(candidates.scores + place, mask=mask, other=float("-inf"))
    token_ids = tl.load(ids + tl.load(ids + place, mask=mask, other=0), mask=mask, other=0)
    tl.store(ids + place, token_ids, mask=mask)
    return all_above(candidates.floor, x, HELD, candidates.highest)


@triton.jit
def _compact(candidates, ids, HELD: tl.constexpr):
    """Write the candidates above their floor behind all of them, and behind the ids where each
    was; return how many.

    Their order is kept. Those beyond `HELD` are not written.
    """
    num_held = tl.full([], 0, tl.int32)
    tl.debug_barrier()  # what was written before may still be read
    for start in range(0, candidates.n, HELD):
        index = start + tl.arange(0, HELD)
        mask = index < candidates.n
        x = tl.load(candidates.scores + index, mask=mask, other=float("-inf"))
        is_held = ordered(x) > candidates.floor
        place = num_held + tl.cumsum(is_held.to(tl.int32), 0) - 1
        mask = is_held & (place < HELD)
        tl.store(candidates.scores + candidates.n + place, x, mask=mask)
        tl.store(ids + candidates.n + place, index, mask=mask)
        num_held += tl.sum(is_held.to(tl.int32), 0)
    tl.debug_barrier()
    return num_held
