"""How long steps take at least: the bytes they have to read, the arithmetic they have to do.

Of each operation the longer of the two counts, at measured rates, and the operations add up:
one matrix product after the other, one attention call after the other. What passes between
them (activations, norms, logits) is left out, since it need not leave the chip; so are biases,
the weights of norms and the rows taken of embeddings, less than a thousandth of what is read.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from engine.attention.kv_cache import AttentionCall
from engine.attention.plan import StepSequences
from engine.linear.packed import PackedLinear
from engine.loading.loader import LoadedModel
from kernels.paged_attention.mask import MaskSpec


@dataclass(frozen=True, slots=True)
class Rates:
    """Of memory and of matrix products."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        """No implementation of one operation is faster."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True, slots=True)
class Matmul:
    """A product with a weight matrix, of all tokens or of those alone that are sampled.

    Of `num_experts` matrices a token takes `num_chosen`; `num_weights` and `num_bytes` are those
    of one.
    """

    num_weights: int
    num_bytes: int
    of_samples: bool = False
    num_experts: int = 1
    num_chosen: int = 1

    def moved(self, rows: int) -> float:
        """Bytes of the matrices that so many tokens take: what is to be expected where each
        token takes any of them with the same chance, as random routers do.
        """
        missed = (1 - self.num_chosen / self.num_experts) ** rows
        return self.num_bytes * self.num_experts * (1 - missed)

    def flops(self, rows: int) -> float:
        return 2.0 * rows * self.num_chosen * self.num_weights


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention call; `token_bytes` is what the cache holds of a token for it."""

    num_heads: int
    dims: int
    token_bytes: int
    mask: MaskSpec
    writes: bool = True

    @classmethod
    def of(cls, call: AttentionCall, itemsize: int) -> "Attention":
        dims = call.head_dim + call.value_dim
        token_bytes = call.num_kv_heads * dims * itemsize
        return cls(call.num_heads, dims, token_bytes, call.mask, call.shared_with is None)


@dataclass(frozen=True, slots=True)
class Work:
    """What a step moves and computes, and how long that takes at least."""

    seconds: float
    num_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A model's operations, each with how many there are of its kind."""

    matmuls: Counter[Matmul]
    attention: Counter[Attention]

    @classmethod
    def of(cls, loaded: LoadedModel, cache_itemsize: int) -> "ModelCost":
        return cls(
            matmuls_of(loaded.model, loaded.model.get_output_embeddings()),
            Counter(Attention.of(call, cache_itemsize) for call in loaded.calls),
        )

    @property
    def weight_bytes(self) -> int:
        """All that there are: of experts, a small step reads fewer."""
        return sum(
            count * matmul.num_experts * matmul.num_bytes for matmul, count in self.matmuls.items()
        )


def matmuls_of(model: nn.Module, head: nn.Module | None) -> Counter[Matmul]:
    """The matrix products of a model, `head` being the one that makes its logits."""
    itemsize = next(model.parameters()).dtype.itemsize
    text_config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    num_chosen = getattr(text_config, "num_experts_per_tok", 1)
    return Counter(
        matmul
        for module in model.modules()
        for matmul in _matmuls_in(module, itemsize, num_chosen, module is head)
    )


def _matmuls_in(
    module: nn.Module, itemsize: int, num_chosen: int, is_head: bool
) -> Iterator[Matmul]:
    """Of this module itself. Experts are matrices in one tensor, a router is a bare one."""
    if isinstance(module, nn.Linear | PackedLinear):
        size = module.in_features * module.out_features
        yield Matmul(size, size * itemsize, is_head)
    elif not isinstance(module, nn.Embedding):
        for weights in module.parameters(recurse=False):
            if weights.dim() == 3:
                num_experts, size = len(weights), weights[0].numel()
                yield Matmul(size, size * itemsize, False, num_experts, num_chosen)
            elif weights.dim() == 2:
                yield Matmul(weights.numel(), weights.numel() * itemsize)


def visible(mask: MaskSpec, positions: np.ndarray) -> np.ndarray:
    """How many keys a query at each position sees, itself included."""
    return np.minimum(np.minimum(positions + 1, mask.window), positions % mask.chunk + 1)


def step_work(cost: ModelCost, step: StepSequences, num_samples: int, rates: Rates) -> Work:
    """Weights are read once for the step; keys and values once for each sequence."""
    num_tokens = int(step.lengths.sum())
    parts: list[tuple[int, float, float]] = []
    for matmul, count in cost.matmuls.items():
        rows = num_samples if matmul.of_samples else num_tokens
        parts.append((count, matmul.moved(rows), matmul.flops(rows)))
    for call, count in cost.attention.items():
        moved = int((step.lengths - 1 + visible(call.mask, step.starts)).sum())
        moved += num_tokens if call.writes else 0
        pairs = int(visible(call.mask, step.positions).sum())
        parts.append((count, moved * call.token_bytes, 2.0 * pairs * call.num_heads * call.dims))
    return Work(
        seconds=sum(count * rates.seconds(b, f) for count, b, f in parts),
        num_bytes=sum(count * b for count, b, _ in parts),
        flops=sum(count * f for count, _, f in parts),
    )


def decode_work(cost: ModelCost, batch: int, context: int, rates: Rates) -> Work:
    """One token for each of `batch` sequences, which is the last of `context` tokens."""
    ones = np.ones(batch, dtype=np.int64)
    return step_work(
        cost, StepSequences(np.arange(batch), ones * (context - 1), ones), batch, rates
    )


def prefill_work(cost: ModelCost, batch: int, length: int, before: int, rates: Rates) -> Work:
    """`length` more tokens of `batch` prompts, of which `before` are in the cache."""
    ones = np.ones(batch, dtype=np.int64)
    step = StepSequences(np.arange(batch), ones * before, ones * length)
    return step_work(cost, step, batch, rates)


def ideal_seconds(cost: ModelCost, lengths: Sequence[tuple[int, int]], rates: Rates) -> float:
    """Of a workload of (tokens in, tokens out): every prompt at once, then all decode together.

    In a cache that holds them all; as if nothing but the device took time.
    """
    num_in, num_out = np.array(lengths, dtype=np.int64).T
    prompts = StepSequences(np.arange(len(lengths)), np.zeros_like(num_in), num_in)
    seconds = step_work(cost, prompts, len(lengths), rates).seconds
    for drawn in range(1, int(num_out.max())):
        starts = (num_in + drawn - 1)[num_out > drawn]
        step = StepSequences(np.arange(len(starts)), starts, np.ones_like(starts))
        seconds += step_work(cost, step, len(starts), rates).seconds
    return seconds
