"""How much fits: the limits of the engine, each decided once and with its reason."""

from dataclasses import dataclass

import psutil
import torch

from engine.config import BLOCK_SIZE, EngineConfig
from engine.errors import LoadError
from engine.kv_cache import bytes_per_block
from engine.loader import LoadedModel

_CPU_BATCH_TOKENS = 256  # on a CPU a larger step only makes others wait longer
_CUDA_BATCH_TOKENS = 4096
_CPU_MAX_CACHE_BYTES = 8 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """The effective limits; `reasons` has one line for each, to be shown at start."""

    max_sequences: int
    max_batch_tokens: int
    max_total_tokens: int
    num_blocks: int
    reasons: tuple[str, ...]


def decide_limits(loaded: LoadedModel, config: EngineConfig) -> Limits:
    """Raises LoadError where what is asked for does not fit, naming what would."""
    on_cuda = loaded.model.device.type == "cuda"
    max_batch_tokens = config.max_batch_tokens or (
        _CUDA_BATCH_TOKENS if on_cuda else _CPU_BATCH_TOKENS
    )
    max_sequences = min(config.max_sequences, max_batch_tokens)
    block_bytes = bytes_per_block(loaded.calls, loaded.model.dtype)
    cache_bytes = _cache_bytes(loaded, config, max_batch_tokens)
    num_blocks = config.num_blocks or _useful_blocks(
        cache_bytes // block_bytes, max_sequences, config.max_total_tokens or loaded.max_positions
    )
    capacity = num_blocks * BLOCK_SIZE
    max_total_tokens = _max_total_tokens(loaded, config, capacity)
    return Limits(
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
        max_total_tokens=max_total_tokens,
        num_blocks=num_blocks,
        reasons=(
            f"max_total_tokens {max_total_tokens}: " + _why_total(loaded, config, max_total_tokens),
            f"KV cache {capacity} tokens ({num_blocks * block_bytes / 2**30:.2f} GiB): "
            + ("set" if config.num_blocks else f"fits in {cache_bytes / 2**30:.2f} GiB"),
            f"max_batch_tokens {max_batch_tokens}: "
            + ("set" if config.max_batch_tokens else f"default for {loaded.model.device.type}"),
            f"max_sequences {max_sequences}: at most one token of the budget each",
        ),
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
    """No more than every sequence at its longest could use, plus as much again to cache."""
    return min(fitting, 2 * max_sequences * -(-longest // BLOCK_SIZE))


def _cache_bytes(loaded: LoadedModel, config: EngineConfig, max_batch_tokens: int) -> int:
    if loaded.model.device.type == "cpu":
        return min(int(psutil.virtual_memory().available * 0.3), _CPU_MAX_CACHE_BYTES)
    free, total = torch.cuda.mem_get_info(loaded.model.device)
    reserved = (1 - config.memory_fraction) * total
    return int(free - reserved - _activation_bytes(loaded, config, max_batch_tokens))


def _activation_bytes(loaded: LoadedModel, config: EngineConfig, max_batch_tokens: int) -> int:
    """A generous estimate of what the largest step holds at once beside the cache."""
    text = loaded.model.config.get_text_config()
    width = 8 * text.hidden_size + 4 * getattr(text, "intermediate_size", 4 * text.hidden_size)
    logits = 4 * config.max_sequences * text.vocab_size * 4
    return max_batch_tokens * width * loaded.model.dtype.itemsize + logits
