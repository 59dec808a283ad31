"""The experts of a mixture: products of rows with matrices that each row chooses for itself.

A token chooses `top_k` of `num_experts` matrices. Each choice is a pair: pair p is the choice
p % top_k of token p // top_k. `route` sorts the pairs by expert on the device and cuts each
expert's pairs into blocks of rows; `grouped_linear` multiplies each block by its expert's matrix;
`combine` sums the results of each token, weighted. The host knows only how many blocks there can
be: it launches programs for that many, and those without a block return at once. So nothing waits
for the device, and a captured step stays right whatever the tokens choose.

A step of few tokens mainly reads the matrices that it hits, each of them once: its tiles have 16
rows, the fewest that the matrix units take, and 48 KB of weights are in flight in each program.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import activate, activated_in_float32, exp_float32


@dataclass(frozen=True, slots=True)
class GateForm:
    """How a gated expert makes n numbers of its first product's 2 n: act(gate) * (up + shift).

    layout      gate and up are the halves of a row, or its even and its odd columns
    activation  a name of `kernels.activation.ACTIVATIONS`
    limit       gate is clamped from above and up from both sides at this number; None: neither
    slope       act(gate) is gate * sigmoid(slope * gate), whatever `activation` says; None: it
                is not
    shift       added to up, after it is clamped
    """

    layout: Literal["halves", "interleaved"]
    activation: str
    limit: float | None = None
    slope: float | None = None
    shift: float = 0.0


class Tiling(NamedTuple):
    """How a product is cut: a program computes `rows` x `columns` and adds up `inner` at a time.

    group   blocks of rows whose programs run side by side, so that they share weights in L2
    chunk   pairs that `route` looks at together
    stages  buffers of each operand, one of which is computed with while the others are loaded
    """

    rows: int
    columns: int
    inner: int
    group: int
    chunk: int
    warps: int
    stages: int


FEW, SOME, MANY = TILINGS = (
    Tiling(rows=16, columns=64, inner=128, group=1, chunk=1024, warps=4, stages=4),
    Tiling(rows=64, columns=128, inner=64, group=4, chunk=4096, warps=4, stages=3),
    Tiling(rows=128, columns=128, inner=64, group=8, chunk=4096, warps=8, stages=3),
)
"""For 16-bit weights; `inner` is half of it for float32. They fit the 99 KB of an RTX 5090."""
_BLOCK = 1024
"""Columns of a program that combines, and block entries that `route` writes together."""


def tiling_for(num_pairs: int, num_experts: int) -> Tiling:
    """Choose by how many rows an expert has on average."""
    mean = num_pairs / num_experts
    return FEW if mean <= FEW.rows else SOME if mean <= SOME.rows else MANY


@dataclass(frozen=True, slots=True)
class Routing:
    """Which expert computes which pairs.

    experts     [num_tokens, top_k] int64: the experts that each token chose. One that does not
                exist, from `num_experts` up, computes nothing.
    order       [num_pairs] int32: the pairs, sorted by expert
    blocks      [most blocks, 3] int32: each block's expert, its first place in `order`, and the
                place after its last
    num_blocks  [1] int32: how many blocks there are
    is_single   the step has one token, each of whose pairs is a block of its own; the other
                tensors are empty
    """

    experts: Tensor
    order: Tensor
    blocks: Tensor
    num_blocks: Tensor
    tiling: Tiling
    is_single: bool = False

    @property
    def num_pairs(self) -> int:
        return self.experts.numel()


def most_blocks(num_pairs: int, num_experts: int, rows: int) -> int:
    """Return how many blocks there are at most, whatever the tokens choose.

    Every expert that is hit has at most one block that is not full.
    """
    most_hit = min(num_pairs, num_experts)
    return most_hit + (num_pairs - most_hit) // rows


def _empty_routing(experts: Tensor, num_experts: int, tiling: Tiling) -> Routing:
    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=experts.device)

    num_pairs = experts.numel()
    blocks = empty(most_blocks(num_pairs, num_experts, tiling.rows), 3)
    return Routing(experts, empty(num_pairs), blocks, empty(1), tiling)


# -- in torch ------------------------------------------------------------------------------


def route_torch(experts: Tensor, num_experts: int, tiling: Tiling | None = None) -> Routing:
    """Sort the pairs by expert, those of one expert by their number, and cut them into blocks.

    experts  [num_tokens, top_k] int64
    """
    tiling = tiling or tiling_for(experts.numel(), num_experts)
    routing = _empty_routing(experts, num_experts, tiling)
    routing.order.copy_(experts.flatten().argsort(stable=True))
    first, blocks = 0, []
    for expert in range(num_experts):
        end = first + int((experts == expert).sum())
        blocks += [
            (expert, at, min(at + tiling.rows, end)) for at in range(first, end, tiling.rows)
        ]
        first = end
    routing.num_blocks.fill_(len(blocks))
    if blocks:
        routing.blocks[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return routing


def grouped_linear_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routing: Routing,
    transposed: bool = False,
    form: GateForm | None = None,
) -> Tensor:
    """Multiply the rows of each block by its expert's matrix, and gate them if `form` says how.

    x       [num_tokens, inputs], of which each pair takes its token's row, or [num_pairs, inputs]
    weight  [num_experts, outputs, inputs], or [num_experts, inputs, outputs] if `transposed`
    bias    [num_experts, outputs] or None

    Returns [num_pairs, outputs], or half as many outputs if gated, in x's type: the product and
    its bias are rounded once, and gated as `gated` does. Rows of pairs whose expert does not
    exist are not written.
    """
    outputs = weight.shape[2 if transposed else 1]
    output = x.new_empty(routing.num_pairs, outputs // 2 if form else outputs)
    per_row = routing.num_pairs // len(x)
    for expert, first, end in routing.blocks[: int(routing.num_blocks)].tolist():
        pairs = routing.order[first:end].long()
        matrix = weight[expert].T if transposed else weight[expert]
        product = F.linear(x[pairs // per_row], matrix, None if bias is None else bias[expert])
        output[pairs] = gated(product, form) if form else product
    return output


def gated(product: Tensor, form: GateForm) -> Tensor:
    """Return act(gate) * (up + shift), each operation rounded to the type of `product`.

    product  [..., 2 n]; the result is [..., n].
    """
    if form.layout == "halves":
        gate, up = product.chunk(2, dim=-1)
    else:
        gate, up = product[..., ::2], product[..., 1::2]
    if form.limit is not None:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    if form.slope is not None:
        gate = gate * torch.sigmoid(gate * form.slope)
    else:
        gate = activate(gate, form.activation)
    return gate * (up + form.shift if form.shift else up)


def combine_torch(x: Tensor, weights: Tensor, routing: Routing, num_experts: int) -> Tensor:
    """Sum the results of each token's experts, weighted.

    x        [num_pairs, outputs]
    weights  [num_tokens, top_k]

    Returns [num_tokens, outputs] in x's type. Products are rounded to the wider type of x and
    `weights`, as torch promotes them, and added in float32.
    """
    products = x.view(*weights.shape, -1) * weights[..., None]
    exists = (routing.experts < num_experts)[..., None]
    return products.where(exists, 0.0).sum(dim=1, dtype=torch.float32).to(x.dtype)


def sample_routings_torch(num_experts: int, device: torch.device) -> list[Routing]:
    """Return a routing of each kind that has kernels of its own: in torch, none has."""
    del num_experts, device
    return []


# -- in Triton -----------------------------------------------------------------------------


def route_triton(experts: Tensor, num_experts: int, tiling: Tiling | None = None) -> Routing:
    """Do what `route_torch` does, in one launch, or in none for a single token."""
    experts = experts.contiguous()
    tiling = tiling or tiling_for(experts.numel(), num_experts)
    if len(experts) == 1:
        none = torch.empty(0, dtype=torch.int32, device=experts.device)
        return Routing(experts, none, none, none, tiling, is_single=True)
    routing = _empty_routing(experts, num_experts, tiling)
    _route_kernel[(num_experts,)](
        experts,
        routing.order,
        routing.blocks,
        routing.num_blocks,
        routing.num_pairs,
        NUM_EXPERTS=num_experts,
        BINS=triton.next_power_of_2(num_experts + 1),
        ROWS=tiling.rows,
        CHUNK=tiling.chunk,
        BLOCK=_BLOCK // 8,
        num_warps=8,
    )
    return routing


def sample_routings_triton(num_experts: int, device: torch.device) -> list[Routing]:
    """Return a routing of each kind that has kernels of its own, of two tokens at most.

    What runs with each of them once is compiled for steps of any size.
    """
    experts = torch.zeros(2, 1, dtype=torch.int64, device=device)
    several = [route_triton(experts, num_experts, tiling) for tiling in TILINGS]
    return [route_triton(experts[:1], num_experts, FEW), *several]


def grouped_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routing: Routing,
    transposed: bool = False,
    form: GateForm | None = None,
) -> Tensor:
    """Do what `grouped_linear_torch` does, in one launch.

    Reads the matrices of the experts that are hit once for each of their blocks.
    """
    x, tiling = x.contiguous(), routing.tiling
    assert weight.is_contiguous()
    outputs, inputs = weight.shape[1:] if not transposed else weight.shape[:0:-1]
    num_outputs = outputs // 2 if form else outputs
    output = x.new_empty(routing.num_pairs, num_outputs)
    num_blocks = routing.num_pairs if routing.is_single else len(routing.blocks)
    num_groups = triton.cdiv(num_blocks, tiling.group)
    _grouped_linear_kernel[(num_groups * tiling.group * triton.cdiv(outputs, tiling.columns),)](
        output,
        x,
        weight,
        bias,
        routing.experts,
        routing.order,
        routing.blocks,
        routing.num_blocks,
        routing.num_pairs // len(x),
        weight.shape[0],
        IS_SINGLE=routing.is_single,
        INPUTS=inputs,
        OUTPUTS=outputs,
        TRANSPOSED=transposed,
        **gate_constants(form),
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        INNER=tiling.inner * 2 // x.dtype.itemsize,
        GROUP=tiling.group,
        PRECISION="ieee" if x.dtype == torch.float32 else None,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return output


def gate_constants(form: GateForm | None) -> dict[str, object]:
    """Return the constants of the kernel for a product that is gated so."""
    return {
        "LAYOUT": form.layout if form else None,
        "ACTIVATION": form.activation if form else None,
        "LIMIT": form.limit if form else None,
        "SLOPE": form.slope if form else None,
        "SHIFT": form.shift if form else 0.0,
    }


def combine_triton(x: Tensor, weights: Tensor, routing: Routing, num_experts: int) -> Tensor:
    """Do what `combine_torch` does, in one launch."""
    num_tokens, top_k = weights.shape
    outputs = x.shape[-1]
    output = x.new_empty(num_tokens, outputs)
    _combine_kernel[(num_tokens * triton.cdiv(outputs, _BLOCK),)](
        output,
        x,
        weights.contiguous(),
        routing.experts,
        NUM_EXPERTS=num_experts,
        OUTPUTS=outputs,
        TOP_K=top_k,
        ROUNDS=torch.promote_types(weights.dtype, x.dtype) != torch.float32,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return output


@triton.jit(do_not_specialize=["num_pairs"])
def _route_kernel(
    experts_ptr,
    order_ptr,
    blocks_ptr,
    num_blocks_ptr,
    num_pairs,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program counts all pairs, which says where those of its expert go, and places them."""
    expert = tl.program_id(0)
    counts = tl.zeros([BINS], tl.int32)
    for begin in range(0, num_pairs, CHUNK):
        counts += tl.histogram(_chosen(experts_ptr, begin, num_pairs, NUM_EXPERTS, CHUNK), BINS)
    bins = tl.arange(0, BINS)
    num_blocks = tl.where(bins < NUM_EXPERTS, (counts + ROWS - 1) // ROWS, 0)
    first = tl.sum(tl.where(bins < expert, counts, 0))
    count = tl.sum(tl.where(bins == expert, counts, 0))
    first_block = tl.sum(tl.where(bins < expert, num_blocks, 0))
    if expert == NUM_EXPERTS - 1:
        tl.store(num_blocks_ptr, tl.sum(num_blocks))
    for begin in range(0, (count + ROWS - 1) // ROWS, BLOCK):
        block = begin + tl.arange(0, BLOCK)
        entry = blocks_ptr + (first_block + block) * 3
        is_used = block * ROWS < count
        tl.store(entry, expert, is_used)
        tl.store(entry + 1, first + block * ROWS, is_used)
        tl.store(entry + 2, first + tl.minimum((block + 1) * ROWS, count), is_used)
    if count > 0:
        placed = first
        for begin in range(0, num_pairs, CHUNK):
            is_mine = _chosen(experts_ptr, begin, num_pairs, NUM_EXPERTS, CHUNK) == expert
            rank = tl.cumsum(is_mine.to(tl.int32)) - 1
            tl.store(order_ptr + placed + rank, begin + tl.arange(0, CHUNK), is_mine)
            placed += tl.sum(is_mine.to(tl.int32))


@triton.jit
def _chosen(experts_ptr, begin, num_pairs, NUM_EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """Return the experts of a chunk of pairs, `NUM_EXPERTS` where there is none."""
    pairs = begin + tl.arange(0, CHUNK)
    experts = tl.load(experts_ptr + pairs, pairs < num_pairs, NUM_EXPERTS)
    return tl.minimum(experts, NUM_EXPERTS).to(tl.int32)


@triton.jit(do_not_specialize=["pairs_per_row", "num_experts"])
def _grouped_linear_kernel(
    output_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    experts_ptr,
    order_ptr,
    blocks_ptr,
    num_blocks_ptr,
    pairs_per_row,
    num_experts,
    IS_SINGLE: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    SLOPE: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_tiles: tl.constexpr = (OUTPUTS + COLUMNS - 1) // COLUMNS
    in_group = tl.program_id(0) % (GROUP * num_tiles)
    block = tl.program_id(0) // (GROUP * num_tiles) * GROUP + in_group % GROUP
    tile = in_group // GROUP
    rows = tl.arange(0, ROWS)
    if IS_SINGLE:
        expert = tl.load(experts_ptr + block)
        if expert >= num_experts:
            return
        pairs, is_pair = block + tl.zeros([ROWS], tl.int32), rows == 0
    else:
        if block >= tl.load(num_blocks_ptr):
            return
        expert = tl.load(blocks_ptr + block * 3).to(tl.int64)
        places = tl.load(blocks_ptr + block * 3 + 1) + rows
        is_pair = places < tl.load(blocks_ptr + block * 3 + 2)
        pairs = tl.load(order_ptr + places, is_pair, 0)

    columns = tl.arange(0, COLUMNS)
    if LAYOUT == "halves":
        HALF: tl.constexpr = COLUMNS // 2
        is_column = tile * HALF + columns % HALF < OUTPUTS // 2
        columns = tile * HALF + columns % HALF + columns // HALF * (OUTPUTS // 2)
    else:
        columns += tile * COLUMNS
        is_column = columns < OUTPUTS
    inner = tl.arange(0, INNER)
    x_ptrs = x_ptr + (pairs // pairs_per_row).to(tl.int64)[:, None] * INPUTS + inner[None, :]
    matrix_ptr = weight_ptr + expert * (INPUTS * OUTPUTS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in tl.range(0, INPUTS, INNER):
        is_inner = inner < INPUTS - begin
        if TRANSPOSED:
            w_ptrs = matrix_ptr + (begin + inner)[:, None] * OUTPUTS + columns[None, :]
        else:
            w_ptrs = matrix_ptr + columns[None, :] * INPUTS + (begin + inner)[:, None]
        if INPUTS % INNER == 0:
            x = tl.load(x_ptrs + begin, is_pair[:, None], 0.0)
        else:
            x = tl.load(x_ptrs + begin, is_pair[:, None] & is_inner[None, :], 0.0)
        if INPUTS % INNER == 0 and OUTPUTS % COLUMNS == 0:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, is_inner[:, None] & is_column[None, :], 0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * OUTPUTS + columns, is_column, 0.0).to(tl.float32)

    result = acc.to(output_ptr.dtype.element_ty)
    if LAYOUT is None:
        out_ptrs = output_ptr + pairs.to(tl.int64)[:, None] * OUTPUTS + columns[None, :]
        tl.store(out_ptrs, result, is_pair[:, None] & is_column[None, :])
    else:
        WIDTH: tl.constexpr = OUTPUTS // 2
        if LAYOUT == "halves":
            halves = tl.permute(tl.reshape(result, [ROWS, 2, COLUMNS // 2]), (0, 2, 1))
        else:
            halves = tl.reshape(result, [ROWS, COLUMNS // 2, 2])
        gate, up = tl.split(halves)
        result = _gated(gate, up, ACTIVATION, LIMIT, SLOPE, SHIFT)
        outs = tile * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        out_ptrs = output_ptr + pairs.to(tl.int64)[:, None] * WIDTH + outs[None, :]
        tl.store(out_ptrs, result, is_pair[:, None] & (outs < WIDTH)[None, :])


@triton.jit
def _gated(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    SLOPE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Do what `gated` does to a gate and an up of the output's type."""
    kind: tl.constexpr = gate.dtype
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    if SLOPE is not None:
        scaled = (gate * SLOPE).to(kind).to(tl.float32)
        sigmoid = tl.div_rn(1.0, 1.0 + exp_float32(-scaled))
        gate *= sigmoid.to(kind).to(tl.float32)
    else:
        gate = activated_in_float32(gate, ACTIVATION)
    gate = gate.to(kind).to(tl.float32)
    if SHIFT != 0.0:
        up = (up + SHIFT).to(kind).to(tl.float32)
    return (gate * up).to(kind)


@triton.jit
def _combine_kernel(
    output_ptr,
    x_ptr,
    weights_ptr,
    experts_ptr,
    NUM_EXPERTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (OUTPUTS + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    kind: tl.constexpr = output_ptr.dtype.element_ty
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        exists = tl.load(experts_ptr + pair) < NUM_EXPERTS
        x = tl.load(x_ptr + pair * OUTPUTS + columns, (columns < OUTPUTS) & exists, 0.0)
        product = x.to(tl.float32) * tl.load(weights_ptr + pair).to(tl.float32)
        if ROUNDS:
            product = product.to(kind).to(tl.float32)
        total += product
    tl.store(output_ptr + token * OUTPUTS + columns, total.to(kind), columns < OUTPUTS)
