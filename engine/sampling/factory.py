"""The choice between the samplers."""

import torch

from engine.sampling.sampler import Sampler
from engine.sampling.torch_sampler import TorchSampler
from engine.sampling.triton_sampler import TritonSampler
from kernels.ops import Ops


def make_sampler(
    ops: Ops, max_sequences: int, vocab_size: int, device: torch.device, max_top_tokens: int
) -> Sampler:
    """Return the sampler that belongs to these kernels.

    `max_top_tokens` is the most alternatives to a token that are asked for.
    """
    if ops.is_triton:
        return TritonSampler(max_sequences, vocab_size, device, max_top_tokens)
    return TorchSampler(max_sequences, vocab_size, device)
