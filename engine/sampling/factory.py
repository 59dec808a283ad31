"""The choice between the samplers."""

import torch

from engine.sampling.sampler import Sampler
from engine.sampling.torch_sampler import TorchSampler
from engine.sampling.triton_sampler import TritonSampler
from kernels.ops import Ops


def make_sampler(ops: Ops, max_sequences: int, vocab_size: int, device: torch.device) -> Sampler:
    """Return the sampler that belongs to these kernels."""
    make = TritonSampler if ops.is_triton else TorchSampler
    return make(max_sequences, vocab_size, device)
