"""The cases in which the experts of a mixture are timed alone, beside those of transformers.

The bound counts the matrices of the experts that the tokens hit, each read once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from bench.gpu.kernel_cases import KernelCase, Setting
from engine.experts.interface import EXPERTS_NAME, bind


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """The experts of one layer of a model, and the type to time them in.

    dtype  None: the type of the run
    """

    model: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    dtype: torch.dtype | None = None


MIXTRAL_FP16 = ExpertsShape("Mixtral-8x7B", 8, 2, 4096, 14336, torch.float16)
QWEN3_30B = ExpertsShape("Qwen3-30B-A3B", 128, 8, 2048, 768)


def cases(
    setting: Setting, shapes: tuple[ExpertsShape, ...], batches: tuple[int, ...]
) -> list[KernelCase]:
    """Return each shape at each batch, computed by us and, where it can be captured, by torch."""
    return [
        case
        for shape in shapes
        for batch in batches
        for case in _of_shape(replace(setting, dtype=shape.dtype or setting.dtype), shape, batch)
    ]


def _of_shape(setting: Setting, shape: ExpertsShape, batch: int) -> list[KernelCase]:
    generator = torch.Generator().manual_seed(batch)
    scores = torch.rand(batch, shape.num_experts, generator=generator)
    weights, chosen = (x.to(setting.device) for x in scores.topk(shape.top_k))
    matrices = 3 * shape.hidden * shape.intermediate
    num_bytes = int(chosen.unique().numel()) * matrices + 2 * batch * shape.hidden
    names = {"": EXPERTS_NAME} | ({", torch's": "grouped_mm"} if _can_capture(setting) else {})
    return [
        KernelCase(
            f"experts of {shape.model}{suffix}",
            partial(_make, setting, shape, name, chosen, weights.to(setting.dtype)),
            num_bytes * setting.dtype.itemsize,
            2.0 * batch * shape.top_k * matrices,
            {"batch": batch},
        )
        for suffix, name in names.items()
    ]


def _can_capture(setting: Setting) -> bool:
    """Return whether torch's grouped product does not wait for the device.

    A capture of one that does cannot be repaired within the process.
    """
    if setting.device.type != "cuda":
        return True
    major, _ = torch.cuda.get_device_capability(setting.device)
    return setting.dtype == torch.bfloat16 and major in (9, 10)


def _make(
    setting: Setting,
    shape: ExpertsShape,
    implementation: str,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> Callable[[], object]:
    module = _experts(setting, shape)
    if implementation == EXPERTS_NAME:
        bind(module, setting.ops)
    else:
        module.config._experts_implementation_internal = implementation
    x = setting.randn(len(chosen), shape.hidden)
    return torch.inference_mode()(partial(module, x, chosen, weights))


def _experts(setting: Setting, shape: ExpertsShape) -> Any:
    """Return experts of this shape: Mixtral's code computes what Qwen3's does."""
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.num_experts,
    )
    with torch.device("meta"):
        module = MixtralExperts(config)
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(setting.randn(*parameter.shape) * 0.02, False))
    return module
