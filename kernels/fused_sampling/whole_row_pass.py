"""The third pass: a row of which more tokens matter than the second pass can hold."""

import triton
import triton.language as tl

from kernels.fused_sampling.narrowing import TopTokens, narrow, suffice
from kernels.fused_sampling.numbers import MINUS_INFINITY, logprob_of, packed_id
from kernels.fused_sampling.partials import FIELDS, merged_best, merged_bound, merged_mass
from kernels.fused_sampling.row import WORDS, count_token, processed, subtrahend
from kernels.fused_sampling.row_pass import UNSETTLED
from kernels.fused_sampling.tokens import all_above, survey


# Another number of top tokens does not compile the kernel again.
@triton.jit(do_not_specialize=["num_top"])
def whole_row_kernel(
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
    BLOCK: tl.constexpr,
    TOP: tl.constexpr,
):
    """Store token and logprob of the rows that are `UNSETTLED`: by their candidates where those
    suffice, else by all of their scores, which are written first.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(ids_ptr + row) != UNSETTLED:
        return
    words = parameters_ptr + row * WORDS
    logits = logits_ptr + row * row_stride
    partials = partials_ptr + row * FIELDS * num_chunks
    best = merged_best(partials, num_chunks, CHUNKS)
    highest, mass = merged_mass(partials, num_chunks, CHUNKS)
    top = TopTokens(None, None, num_top)
    if top_ids_ptr is not None:
        top = TopTokens(top_ids_ptr + row * num_top, top_logprobs_ptr + row * num_top, num_top)
    subtracted = subtrahend(logits, counts_ptr, words, vocab_size, BLOCK)

    num_candidates = num_chunks * KEPT
    scores = scores_ptr + row * scores_stride
    bound = merged_bound(partials, num_chunks, CHUNKS)
    tokens = all_above(bound, scores, num_candidates, highest)
    found = survey(tokens, highest, BLOCK)
    are_listed = suffice(tokens, found, mass, words, vocab_size, num_top)
    if not are_listed:
        scores += num_candidates
        _store_scores(scores, logits, counts_ptr, words, vocab_size, subtracted, BLOCK)
        tokens = all_above(tl.full([], MINUS_INFINITY, tl.int32), scores, vocab_size, highest)
        found = survey(tokens, highest, BLOCK)
    ids = (candidate_ids_ptr + row * candidate_ids_stride, are_listed)
    best, reference, mass = narrow(
        tokens, ids, found, best, mass, words, vocab_size, top, TOP, BLOCK
    )

    token = packed_id(best)
    x = processed(logits, counts_ptr, words, token, vocab_size, subtracted)
    tl.store(ids_ptr + row, token)
    tl.store(logprobs_ptr + row, logprob_of(x, reference, mass))
    count_token(counts_ptr, words, token, vocab_size)


@triton.jit
def _store_scores(scores, logits, counts_ptr, words, vocab_size, subtracted, BLOCK: tl.constexpr):
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = processed(logits, counts_ptr, words, ids, vocab_size, subtracted)
        tl.store(scores + ids, x, mask=ids < vocab_size)
    tl.debug_barrier()
