"""The shapes of the models that the kernels are made for."""

from dataclasses import dataclass, field

from kernels.paged_attention.mask import MaskSpec


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one model's layers. `norm_offset` is what it adds to the weights of its norms."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    activation: str = "silu"
    norm_offset: float = 0.0
    softcap: float | None = None
    mask: MaskSpec = field(default_factory=MaskSpec)


SHAPES = {
    "Llama-3.1-8B": Shape(4096, 14336, 32, 8, 128, 128256),
    "Qwen3-8B": Shape(4096, 12288, 32, 8, 128, 151936),
    "Gemma-2-9B": Shape(
        3584, 14336, 16, 8, 256, 256000, "gelu_tanh", 1.0, 50.0, MaskSpec(window=4096)
    ),
    "Mixtral-8x7B": Shape(4096, 14336, 32, 8, 128, 32000),
    "Phi-3-mini": Shape(3072, 8192, 32, 32, 96, 32064, mask=MaskSpec(window=2047)),
    "gpt2": Shape(768, 3072, 12, 12, 64, 50257),
}
