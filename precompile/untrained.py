"""A model whose weights are not there: it has the shapes and types of the real one, and launches
the same kernels.

Large tensors are memory that is never touched, so the model takes next to none. What would read
them, linears and embeddings, returns noise. Small tensors are noise, too: with all ones or zeros
norms that round in different places, which are different kernels, could not be told apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from engine.device.timer import Timer
from engine.loading.checkpoint import Checkpoint
from engine.loading.loader import LoadedModel, prepare_model
from engine.loading.placement import fill_places, layout_of
from engine.loading.probe import LogitsCheck
from engine.text.tokenizer import Tokenizer
from kernels.ops import Ops


def untrained(
    folder: Path, dtype: torch.dtype, ops: Ops, check: LogitsCheck, timer: Timer
) -> LoadedModel:
    """Return the model that a folder's config.json describes, prepared as the real one would be."""
    model = layout_of(AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype)
    fill_places(model, torch.device("cpu"))
    _fill_small_tensors(model)
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    with _noise_for_large_tensors():
        return prepare_model(model, tokenizer, Checkpoint(folder, str(folder)), ops, check, timer)


@torch.no_grad()
def _fill_small_tensors(model: PreTrainedModel) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() < 2:
            tensor.normal_() if tensor.is_floating_point() else tensor.zero_()


@contextmanager
def _noise_for_large_tensors() -> Iterator[None]:
    originals = {"linear": F.linear, "embedding": F.embedding}
    for name, noise in {"linear": _linear, "embedding": _embedding}.items():
        setattr(F, name, noise)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    del bias
    return input.new_empty(*input.shape[:-1], weight.shape[0]).normal_()


def _embedding(input: Tensor, weight: Tensor, *options: object) -> Tensor:
    del options
    return weight.new_empty(*input.shape, weight.shape[1]).normal_()
