"""Lower bounds on the time of steps, from the bytes they must read and their arithmetic.

The bound of an operation is the longer of the two, at measured rates. The bound of a step is
the sum over its operations: every matrix product and every attention call. Data that passes
between operations (activations, norms, logits) is left out, since it need not leave the chip;
so are biases, the weights of norms and rows of embeddings, less than a thousandth of the reads.
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
    """The measured rates of memory and of matrix products."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        """Return the least time that any implementation of one operation can take."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True, slots=True)
class Matmul:
    """A product with a weight matrix, of all tokens or, `of_samples`, of the sampled ones only.

    A token uses `num_chosen` of `num_experts` matrices; `num_weights` and `num_bytes` are the
    size of one matrix.
    """

    num_weights: int
    num_bytes: int
    of_samples: bool = False
    num_experts: int = 1
    num_chosen: int = 1

    def moved(self, rows: int) -> float:
        """Return the expected bytes of all matrices that `rows` tokens use together.

        Each token uses any of the matrices with the same chance, as random routers do.
        """
        missed = (1 - self.num_chosen / self.num_experts) ** rows
        return self.num_bytes * self.num_experts * (1 - missed)

    def flops(self, rows: int) -> float:
        return 2.0 * rows * self.num_chosen * self.num_weights


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention call; `token_bytes` is the size of a token's key and value in its cache."""

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
    """The bytes and the arithmetic of a step, and the least time that they take."""

    seconds: float
    num_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class ModelCost:
    """The operations of a model, and how often each occurs."""

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
        """The size of all weights; a small step reads fewer experts."""
        return sum(
            count * matmul.num_experts * matmul.num_bytes for matmul, count in self.matmuls.items()
        )


def matmuls_of(model: nn.Module, head: nn.Module | None) -> Counter[Matmul]:
    """Return the matrix products of a model; `head` is the module that makes its logits."""
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
    """Yield the products of a module, without its children.

    Experts are matrices in one tensor of three dimensions; a router is a bare matrix.
    """
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
    """Return how many keys the query at each position sees, its own included."""
    return np.minimum(np.minimum(positions + 1, mask.window), positions % mask.chunk + 1)


def step_work(cost: ModelCost, step: StepSequences, num_samples: int, rates: Rates) -> Work:
    """Return the work of a step.

    Weights are read once for the step; keys and values once for each sequence.
    """
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
    """Return the work of decoding one token, the last of `context`, for `batch` sequences."""
    ones = np.ones(batch, dtype=np.int64)
    return step_work(
        cost, StepSequences(np.arange(batch), ones * (context - 1), ones), batch, rates
    )


def prefill_work(cost: ModelCost, batch: int, length: int, before: int, rates: Rates) -> Work:
    """Return the work of `length` tokens of `batch` prompts, after `before` cached ones."""
    ones = np.ones(batch, dtype=np.int64)
    step = StepSequences(np.arange(batch), ones * before, ones * length)
    return step_work(cost, step, batch, rates)


def ideal_seconds(cost: ModelCost, lengths: Sequence[tuple[int, int]], rates: Rates) -> float:
    """Return the ideal time of a workload, given as pairs of (tokens in, tokens out).

    All prompts are computed at once, then all sequences decode together, in a cache that holds
    them all, and nothing but the device takes time.
    """
    num_in, num_out = np.array(lengths, dtype=np.int64).T
    prompts = StepSequences(np.arange(len(lengths)), np.zeros_like(num_in), num_in)
    seconds = step_work(cost, prompts, len(lengths), rates).seconds
    for drawn in range(1, int(num_out.max())):
        starts = (num_in + drawn - 1)[num_out > drawn]
        step = StepSequences(np.arange(len(starts)), starts, np.ones_like(starts))
        seconds += step_work(cost, step, len(starts), rates).seconds
    return seconds
