"""Both passes of a step whose rows are all greedy, with every other parameter neutral."""

import triton
import triton.language as tl

from kernels.fused_sampling.numbers import logprob_of, packed_id, unordered
from kernels.fused_sampling.partials import FIELDS, merged_best, merged_mass, store_best


@triton.jit
def greedy_chunk_kernel(
    logits_ptr, row_stride, partials_ptr, vocab_size, LOGPROBS: tl.constexpr, CHUNK: tl.constexpr
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    partial = partials_ptr + row * FIELDS * tl.num_programs(0) + chunk
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * row_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    x = x.to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)
    store_best(partial, x, x, ids, vocab_size, LOGPROBS)


@triton.jit
def greedy_row_kernel(partials_ptr, ids_ptr, logprobs_ptr, num_chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    partials = partials_ptr + row * FIELDS * num_chunks
    best = merged_best(partials, num_chunks, CHUNKS)
    tl.store(ids_ptr + row, packed_id(best))
    if logprobs_ptr is not None:
        highest, mass = merged_mass(partials, num_chunks, CHUNKS)
        x = unordered((best >> 32).to(tl.int32))
        tl.store(logprobs_ptr + row, logprob_of(x, highest, mass))
