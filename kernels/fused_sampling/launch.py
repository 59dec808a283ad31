"""The launches of sampling: two for greedy rows, three for rows with parameters."""

import triton
from torch import Tensor, float32, int32, int64

from kernels.fused_sampling.chunk_pass import chunk_kernel
from kernels.fused_sampling.greedy_passes import greedy_chunk_kernel, greedy_row_kernel
from kernels.fused_sampling.partials import FIELDS
from kernels.fused_sampling.row_pass import row_kernel
from kernels.fused_sampling.whole_row_pass import whole_row_kernel

CHUNK = 2048
"""Tokens of a row that one program reads: few enough that a row alone spreads over the GPU."""
KEPT = 128
"""Most candidates of a chunk: the tokens whose scores are stored for the second pass."""
HELD = 1024
"""Most candidates of a row that the second pass holds in registers."""
HELD_REGISTERS = 128
"""Registers of a thread of the second pass. Left to itself, the assembler spills to use fewer."""
BLOCK = 4096
"""Tokens of a row that the third pass holds in registers at a time."""


def greedy(logits: Tensor, want_logprobs: bool) -> tuple[Tensor, Tensor | None]:
    """Return each row's best token, the lowest id among equals, [rows] int64, and its logprob.

    logits  [rows, vocab_size], any float type and stride between rows

    Reads the logits once. The result is bit for bit that of `sample` for neutral parameters.
    """
    rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    assert logits.stride(1) == 1
    partials = logits.new_empty(rows, FIELDS.value, num_chunks, dtype=int64)
    ids = logits.new_empty(rows, dtype=int64)
    logprobs = logits.new_empty(rows, dtype=float32) if want_logprobs else None
    greedy_chunk_kernel[(num_chunks, rows)](
        logits, logits.stride(0), partials, vocab_size, want_logprobs, CHUNK, num_warps=8
    )
    greedy_row_kernel[(rows,)](
        partials, ids, logprobs, num_chunks, triton.next_power_of_2(num_chunks), num_warps=1
    )
    return ids, logprobs


def sample(
    logits: Tensor, parameters: Tensor, counts: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Apply penalties, temperature, top-k, top-p and typical-p, and sample, row by row.

    logits      [rows, vocab_size], any float type and stride between rows
    parameters  [rows, words] int32, contiguous: `ROW_PARAMETERS`
    counts      [slots, vocab_size] int32, contiguous: how often each token occurs in each slot,
                with the bit `GENERATED` where it was generated and `IN_PROMPT` where it is in a
                prompt that is not counted; the tokens chosen for rows with a penalty are added

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
    assert counts.is_contiguous()
    assert counts.shape[1] == vocab_size
    num_candidates = num_chunks * KEPT
    partials = logits.new_empty(rows, FIELDS.value, num_chunks, dtype=int64)
    # Each row's candidates, followed by room for those that are held, or for all of its scores.
    room = max(num_chunks * CHUNK, HELD)
    scores = logits.new_empty(rows, num_candidates + room, dtype=float32)
    candidate_ids = logits.new_empty(rows, num_candidates + HELD, dtype=int32)
    ids = logits.new_empty(rows, dtype=int64)
    logprobs = logits.new_empty(rows, dtype=float32)
    top_ids = top_logprobs = None
    if num_top:
        top_ids = logits.new_empty(rows, num_top, dtype=int64)
        top_logprobs = logits.new_empty(rows, num_top, dtype=float32)
    request = logits, logits.stride(0), parameters, counts
    scratch = partials, scores, scores.stride(0), candidate_ids, candidate_ids.stride(0)
    results = ids, logprobs, top_ids, top_logprobs
    sizes = vocab_size, num_chunks, num_top, triton.next_power_of_2(num_chunks), KEPT
    top_block = triton.next_power_of_2(num_top)
    chunk_kernel[(num_chunks, rows)](*request, *scratch, vocab_size, CHUNK, KEPT, num_warps=8)
    row_kernel[(rows,)](
        *request,
        *scratch,
        *results,
        *sizes,
        HELD,
        top_block,
        num_warps=4,
        maxnreg=HELD_REGISTERS,
    )
    whole_row_kernel[(rows,)](*request, *scratch, *results, *sizes, BLOCK, top_block, num_warps=8)
    return ids, logprobs, top_ids, top_logprobs
