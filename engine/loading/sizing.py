"""Decides the limits of the engine by the device's memory, each with its reason.

The memory that steps need beside the weights and the cache is measured: the largest step is run
over a cache of a few blocks, some steps are captured as graphs, and the device reports how much
memory they took.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from engine.attention.interface import ATTENTION_NAME
from engine.attention.kv_cache import bind_kv_cache, bytes_per_block, cache_dtype
from engine.attention.plan import FixedTables, StepSequences
from engine.core.config import BLOCK_SIZE, EngineConfig
from engine.core.errors import LoadError
from engine.device.memory import DeviceMemory, device_memory
from engine.loading.loader import LoadedModel
from engine.loading.probe import use_attention

_CPU_BATCH_TOKENS = 256  # on a CPU a larger step only makes others wait longer
_CUDA_BATCH_TOKENS = 8192
_CPU_PREFILL_TOKENS = 16
_CUDA_PREFILL_TOKENS = 512
"""Tokens of a prompt that are worth a step of their own. A GPU takes about as long for fewer, since
it waits for the launches of the kernels, or for the weights.
"""
_CUDA_MIXED_STEP_S = 0.05
"""Seconds that a GPU's step with tokens of prompts may take beside decodes: a pause that readers of
a stream hardly notice, in which a large GPU computes thousands of tokens. A CPU's decode takes
that long.
"""
_CUDA_STEP_MULTIPLE = 256
"""Tokens. Beside decodes, long prompts fill steps up to a multiple, as captured steps have."""
_PROBED_BLOCKS = 8
"""Blocks of the cache over which memory is measured. What they hold does not matter."""

GraphBytes = Callable[["Limits", DeviceMemory], int]
"""Measures the bytes that captured steps keep under these limits, with a cache of their size."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The effective limits. `reasons` has one line for each, which is logged at start.

    min_prefill_tokens  beside decodes a step has at least that many tokens of prompts, if there
                        are prompts; see `PrefillBudget`
    mixed_step_s        seconds that such a step may take in any case
    step_multiple       long prompts fill such a step up to a multiple of so many tokens
    """

    max_sequences: int
    max_batch_tokens: int
    min_prefill_tokens: int
    mixed_step_s: float
    step_multiple: int
    max_total_tokens: int
    num_blocks: int
    cache_dtype: torch.dtype
    reasons: tuple[str, ...]


def decide_limits(
    loaded: LoadedModel,
    config: EngineConfig,
    memory: DeviceMemory | None = None,
    why_blocks: str = "set",
    graph_bytes: GraphBytes | None = None,
) -> Limits:
    """Decide the limits. Raises LoadError if the configured ones do not fit, naming what would.

    `graph_bytes` measures what graphs keep. None: steps are not captured.
    """
    if config.num_blocks is not None:
        return _limits(loaded, config, config.num_blocks, why_blocks)
    memory = memory or device_memory(
        loaded.model.device, config.memory_fraction, config.cpu_cache_bytes
    )
    sizes = _sizes(loaded, config)
    try:
        step = memory.peak_of(lambda: run_largest_step(loaded, *sizes))
        limits = _limits_within(loaded, config, memory.available(), step, graphs=0)
        if graph_bytes is None:
            return limits
        graphs = graph_bytes(replace(limits, num_blocks=_PROBED_BLOCKS), memory)
        return _limits_within(loaded, config, memory.available(), step, graphs)
    except torch.OutOfMemoryError as error:
        raise LoadError(
            f"Not enough memory to handle {sizes.batch_tokens} prefill tokens. "
            "You need to decrease `--max-batch-prefill-tokens`"
        ) from error


class _Sizes(NamedTuple):
    batch_tokens: int
    sequences: int


def _sizes(loaded: LoadedModel, config: EngineConfig) -> _Sizes:
    on_cuda = loaded.model.device.type == "cuda"
    default = _CUDA_BATCH_TOKENS if on_cuda else _CPU_BATCH_TOKENS
    batch_tokens = config.max_batch_tokens or default
    return _Sizes(batch_tokens, min(config.max_sequences, batch_tokens))


def _limits_within(
    loaded: LoadedModel, config: EngineConfig, available: int, step: int, graphs: int
) -> Limits:
    """Return the limits with a cache of what is left of the available bytes."""
    left = max(available - step - graphs, 0)
    gib = 1 << 30
    reason = f"{left / gib:.2f} of {available / gib:.2f} GiB to use"
    if step or graphs:
        reason += f", {step / gib:.2f} for a step and {graphs / gib:.2f} for graphs kept, measured"
    block_bytes = bytes_per_block(loaded.calls, cache_dtype(config, loaded.model.dtype))
    longest = config.max_total_tokens or loaded.max_positions
    sequences = _sizes(loaded, config).sequences
    return _limits(loaded, config, _useful_blocks(left // block_bytes, sequences, longest), reason)


def _limits(loaded: LoadedModel, config: EngineConfig, num_blocks: int, why_blocks: str) -> Limits:
    """Return the limits with a cache of so many blocks."""
    kind = loaded.model.device.type
    on_cuda = kind == "cuda"
    sizes, dtype = _sizes(loaded, config), cache_dtype(config, loaded.model.dtype)
    capacity = num_blocks * BLOCK_SIZE
    cache_gib = num_blocks * bytes_per_block(loaded.calls, dtype) / 2**30
    max_total_tokens = _max_total_tokens(loaded, config, capacity)
    prefill = _CUDA_PREFILL_TOKENS if on_cuda else _CPU_PREFILL_TOKENS
    return Limits(
        max_sequences=sizes.sequences,
        max_batch_tokens=sizes.batch_tokens,
        min_prefill_tokens=min(prefill, sizes.batch_tokens),
        mixed_step_s=_CUDA_MIXED_STEP_S if on_cuda else 0.0,
        step_multiple=_CUDA_STEP_MULTIPLE if on_cuda else 1,
        max_total_tokens=max_total_tokens,
        num_blocks=num_blocks,
        cache_dtype=dtype,
        reasons=(
            f"max_total_tokens {max_total_tokens}: " + _why_total(loaded, config, max_total_tokens),
            f"KV cache {capacity} tokens ({cache_gib:.2f} GiB): {why_blocks}",
            f"max_batch_tokens {sizes.batch_tokens}: "
            + ("set" if config.max_batch_tokens else f"default for {kind}"),
            f"max_sequences {sizes.sequences}: at most one token of the budget each",
        ),
    )


def with_smaller_cache(loaded: LoadedModel, config: EngineConfig, limits: Limits) -> Limits:
    """Return limits with a smaller cache, for use when `limits` ran out of memory.

    Raises LoadError if the cache cannot be made smaller.
    """
    num_blocks = limits.num_blocks * 9 // 10
    if config.num_blocks is not None or num_blocks < 1:
        raise LoadError(
            f"out of memory with a KV cache of {limits.num_blocks * BLOCK_SIZE} tokens: "
            "ask for a smaller one, a smaller step or a quantised model"
        )
    return decide_limits(
        loaded, replace(config, num_blocks=num_blocks), why_blocks="a tenth less than ran out"
    )


def _max_total_tokens(loaded: LoadedModel, config: EngineConfig, capacity: int) -> int:
    wanted = config.max_total_tokens
    if wanted is None:
        wanted = min(capacity, loaded.max_positions)
    if wanted > capacity:
        raise LoadError(
            f"Not enough memory to handle `max_total_tokens={wanted}`: "
            f"the KV cache has room for {capacity}"
        )
    if wanted < 2:
        raise LoadError("no room for a prompt token and a generated one in the KV cache")
    return wanted


def _why_total(loaded: LoadedModel, config: EngineConfig, chosen: int) -> str:
    if config.max_total_tokens is not None:
        return "set"
    return "the model's maximum" if chosen == loaded.max_positions else "all of the KV cache"


def _useful_blocks(fitting: int, max_sequences: int, longest: int) -> int:
    """Return the blocks to use: at most twice what all sequences at their longest need.

    The second half is for prefix caching.
    """
    return min(fitting, 2 * max_sequences * -(-longest // BLOCK_SIZE))


@torch.inference_mode()
def run_largest_step(loaded: LoadedModel, num_tokens: int, num_sampled: int) -> None:
    """Run one prefill of the whole token budget, with logits for the most sequences there can be.

    All positions share a cache of a few blocks: the values that it holds do not matter.
    """
    model, num_blocks = loaded.model, _PROBED_BLOCKS
    use_attention(model, ATTENTION_NAME)
    context = bind_kv_cache(loaded.calls, num_blocks, model.dtype, model.device, loaded.ops)
    tables = np.arange(-(-num_tokens // BLOCK_SIZE))[None] % num_blocks
    attention = FixedTables(loaded.ops, loaded.calls, tables, model.device)
    step = StepSequences(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([num_tokens]))
    context.begin(attention.metadata(step))
    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device=model.device)
    logits = model(
        input_ids=ids,
        position_ids=torch.from_numpy(step.positions)[None].to(model.device),
        use_cache=False,
        logits_to_keep=ids[0, :num_sampled],
    ).logits[0]
    raw = logits.clone()  # whose logprobs may be reported when the logits were changed
    scores = raw.float().log_softmax(-1)
    torch.empty(scores.shape, dtype=torch.int32, device=scores.device)  # counts, for penalties
