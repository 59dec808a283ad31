"""The function that transformers calls for the experts of a mixture, and which models get it.

transformers lets a model's experts be computed by a function that is chosen by name. Its own wait
for the device, except on some GPUs in bfloat16, so that no step with them can be a graph. This one
finds what it needs on the module that calls it: an `ExpertsLayer`, bound at load.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from kernels.activation import ACTIVATIONS
from kernels.grouped_gemm import GateForm, Routing, gated
from kernels.ops import Ops

EXPERTS_NAME = "skiff"
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYOUTS: tuple[Literal["halves", "interleaved"], ...] = ("halves", "interleaved")


@dataclass(frozen=True, slots=True)
class ExpertsLayer:
    """What a module of experts needs: the kernels, and the form of its gate.

    form  None: the gate is none that the kernels know, and is computed by the module's own
          function between the two products
    """

    ops: Ops[Any]
    form: GateForm | None


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute each token's experts and sum their results, with transformers' signature.

    hidden_states               [num_tokens, hidden]
    top_k_index, top_k_weights  [num_tokens, top_k]

    Returns [num_tokens, hidden] in the type of `hidden_states`.
    """
    module: Any = self
    layer: ExpertsLayer = module.experts_layer
    routing = layer.ops.route(top_k_index, module.num_experts)
    results = _products(module, layer, hidden_states.to(module.down_proj.dtype), routing)
    combined = layer.ops.combine(results, top_k_weights, routing, module.num_experts)
    return combined.to(hidden_states.dtype)


def _products(module: Any, layer: ExpertsLayer, x: Tensor, routing: Routing) -> Tensor:
    """Return the result of each pair of a token and an expert of it, [num_pairs, hidden]."""
    linear, transposed = layer.ops.grouped_linear, module.is_transposed
    for name, form in ((_first(module), layer.form), ("down_proj", None)):
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        x = linear(x, getattr(module, name), bias, routing, transposed, form)
        if name != "down_proj" and form is None:
            x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


# -- at load -------------------------------------------------------------------------------


@torch.inference_mode()
def use_experts(model: PreTrainedModel, ops: Ops[Any]) -> dict[nn.Module, Any]:
    """Have the experts of the model be computed by `experts_forward`, where it can.

    Returns the modules that it is now called for, each with the implementation that its
    configuration named before: `restore_experts` undoes it. Modules that share a configuration
    change together or not at all: where some of them are quantised, as a checkpoint in 8-bit
    floats has them, all keep their own.
    """
    sharing: dict[int, list[Any]] = defaultdict(list)
    for module in model.modules():
        if _is_mixture(module):
            sharing[id(module.config)].append(module)
    previous: dict[nn.Module, Any] = {}
    for modules in sharing.values():
        if all(_is_known(module) for module in modules):
            previous |= {m: m.config._experts_implementation for m in modules}
    for module in previous:
        bind(module, ops)
    _compile_ahead(previous)
    return previous


def has_experts(model: nn.Module) -> bool:
    """Return whether any module of the model computes experts through transformers' interface."""
    return any(_is_mixture(module) for module in model.modules())


def _is_mixture(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def restore_experts(previous: dict[nn.Module, Any]) -> None:
    """Undo what `use_experts` did."""
    for untyped, name in previous.items():
        module: Any = untyped
        module.config._experts_implementation_internal = name
        del module.experts_layer


def _is_known(module: Any) -> bool:
    """Return whether the module has plain matrices, of the shapes that its flags tell."""
    matrices = [getattr(module, name, None) for name in (_first(module), "down_proj")]
    return all(
        isinstance(matrix, Tensor)
        and matrix.dim() == 3
        and matrix.dtype in _TYPES
        and matrix.is_contiguous()
        and len(matrix) == module.num_experts
        for matrix in matrices
    )


def bind(module: Any, ops: Ops[Any]) -> None:
    """Have one module of experts, and all that share its configuration, use our function."""
    module.experts_layer = ExpertsLayer(ops, gate_form(module) if module.has_gate else None)
    # Set directly, as `use_attention` does: the public call skips models that it does not know.
    module.config._experts_implementation_internal = EXPERTS_NAME


def gate_form(module: Any) -> GateForm | None:
    """Return the form that gates numbers exactly as the module does, to the last bit; or None."""
    width = module.gate_up_proj.shape[2 if module.is_transposed else 1]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, width, generator=generator) * 8).to(module.gate_up_proj)
    expected = module._apply_gate(x)
    return next((form for form in _forms(module) if torch.equal(gated(x, form), expected)), None)


def _forms(module: Any) -> Iterator[GateForm]:
    """Yield every form, with the module's own numbers for its limit and slope."""
    numbers = [None, *{value for value in vars(module).values() if type(value) is float}]
    for layout, limit, shift in product(_LAYOUTS, numbers, (0.0, 1.0)):
        for activation in ACTIVATIONS:
            yield GateForm(layout, activation, limit, None, shift)
        for slope in numbers[1:]:
            yield GateForm(layout, "silu", limit, slope, shift)


def _compile_ahead(modules: dict[nn.Module, Any]) -> None:
    """Run each kernel of the modules once: which of them a step needs depends on its size."""
    seen = set()
    for untyped in modules:
        module: Any = untyped
        layer, shape = module.experts_layer, module.down_proj.shape
        if (shape, layer.form) in seen:
            continue
        seen.add((shape, layer.form))
        hidden = shape[2 if module.is_transposed else 1]
        for routing in layer.ops.sample_routings(module.num_experts, module.down_proj.device):
            x = module.down_proj.new_zeros(len(routing.experts), hidden)
            _products(module, layer, x, routing)


ExpertsInterface.register(EXPERTS_NAME, experts_forward)
