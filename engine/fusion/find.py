"""Finds operations of a loaded model that one kernel can compute together, and fuses them.

No model is known by name. A forward is traced: which linears read the same tensor, which
modules compute what a known norm or activation computes, which kind of rotation the attention
modules apply. Each module that is recognised gets another forward, in this model only: other
models of the same class stay unchanged. `engine.fusion.deferred` describes how two operations
become one. Modules that are not recognised stay as they are.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from types import FunctionType, MethodType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.experts.interface import restore_experts, use_experts
from engine.fusion.deferred import (
    Activated,
    Deferred,
    Residual,
    Rotated,
    Rotation,
)
from engine.linear.merged import can_merge, merge
from engine.linear.replace import replace_linears
from kernels.activation import ACTIVATIONS, activate
from kernels.norm import NormForm, norm_torch
from kernels.ops import Ops
from kernels.store_kv import Rotary, rotate

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ROTATION = "apply_rotary_pos_emb"
_TABLES: tuple[Literal["halves", "repeated", "pairs"], ...] = ("halves", "repeated", "pairs")
_ROTARY_FORMS = [
    partial(Rotary, interleaved=interleaved, tables=tables, in_float32=in_float32)
    for tables in _TABLES
    for interleaved, in_float32 in product((False, True), repeat=2)
]
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


@dataclass(slots=True)
class ForwardTrace:
    """What was recorded about each module; None if one of its calls was not recognised.

    norms        the form of each norm
    activations  the name of each activation
    rotations    the form of each attention module's rotation
    inputs       the input of each call of a plain linear, in order
    """

    norms: dict[nn.Module, NormForm | None] = field(default_factory=dict)
    activations: dict[nn.Module, str | None] = field(default_factory=dict)
    rotations: dict[nn.Module, Callable[[Tensor, Tensor], Rotary] | None] = field(
        default_factory=dict
    )
    inputs: list[tuple[nn.Linear, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fusion:
    """One kind of fusion that was applied; `undo` restores the model."""

    name: str
    count: int
    undo: Callable[[], None]


def fuse(
    model: PreTrainedModel, trace: ForwardTrace, ops: Ops, problem: Callable[[], str | None]
) -> list[Fusion]:
    """Apply every fusion that the model has a place for and that keeps its logits.

    `problem` returns what is wrong with the logits of the changed model, None if nothing. If
    all fusions together change the logits, they are tried one after the other.
    """
    appliers: list[Callable[[], Fusion]] = [
        partial(_replace_experts, model, ops),
        partial(_merge_linears, model, trace),
        partial(_fuse_norms, model, trace, ops),
        partial(_fuse_activations, trace, ops),
        partial(_fuse_rotations, trace),
    ]
    fusions = [apply() for apply in appliers]
    if problem() is not None:
        for fusion in fusions:
            fusion.undo()
        fusions = [fusion for apply in appliers for fusion in _verified(apply(), problem)]
    fusions = [fusion for fusion in fusions if fusion.count]
    logger.info("fused: %s", ", ".join(f"{f.count} {f.name}" for f in fusions) or "nothing")
    return fusions


def _verified(fusion: Fusion, problem: Callable[[], str | None]) -> list[Fusion]:
    """Return the fusion, or undo it and return none if it changes the model's logits."""
    reason = problem()
    if reason is None:
        return [fusion]
    fusion.undo()
    logger.warning("%s are not fused: %s", fusion.name, reason)
    return []


# -- tracing a forward ---------------------------------------------------------------------


@contextmanager
def trace_forward(
    model: PreTrainedModel, attention_modules: list[nn.Module]
) -> Iterator[ForwardTrace]:
    """Record the forwards of the unchanged model that run in this context."""
    trace = ForwardTrace()
    hooks = []
    for module in model.modules():
        if type(module) is nn.Linear:
            hook = module.register_forward_pre_hook(partial(_record_linear, trace))
        elif next(module.children(), None) is None:
            hook = module.register_forward_hook(partial(_record_leaf, trace))
        else:
            continue
        hooks.append(hook)
    traced_rotations = []
    for module in dict.fromkeys(attention_modules):
        original = _rotation_of(module)
        if original is not None:
            _set_rotation(module, partial(_record_rotation, trace, module, original))
            traced_rotations.append(module)
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()
        _restore(traced_rotations)


def _record_linear(trace: ForwardTrace, module: nn.Module, args: tuple[Any, ...]) -> None:
    assert isinstance(module, nn.Linear)
    trace.inputs.append((module, args[0] if args else None))


def _record_leaf(
    trace: ForwardTrace, module: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    """Record a module without submodules if it is a norm or an activation.

    Both keep the shape and type of their input.
    """
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return
    x = args[0]
    if (x.shape, x.dtype) != (output.shape, output.dtype) or not x.is_floating_point():
        return
    if "Norm" in type(module).__name__:
        _record(trace.norms, module, _recognise_norm(module, x, output))
    elif next(module.parameters(), None) is None:
        name = next((name for name in ACTIVATIONS if torch.equal(activate(x, name), output)), None)
        _record(trace.activations, module, name)


def _record(seen: dict[nn.Module, Any], module: nn.Module, what: Any) -> None:
    """Record `what` for the module, or None if it differs between calls."""
    seen[module] = what if seen.get(module, what) == what else None


def _recognise_norm(module: nn.Module, x: Tensor, output: Tensor) -> NormForm | None:
    """Return the form that gives the module's output up to rounding, the closest of several."""
    eps = next((getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)), None)
    weight, bias = _weights(module)
    if not isinstance(eps, float) or any(
        w is not None and w.shape != x.shape[-1:] for w in (weight, bias)
    ):
        return None
    tolerance = 4 * torch.finfo(x.dtype).eps
    best: tuple[int, NormForm] | None = None
    for centred, offset, rounds_first in product((False, True), (0.0, 1.0), (True, False)):
        form = NormForm(eps, centred, offset, rounds_first)
        ours = norm_torch(x, weight, bias, form)
        if torch.allclose(ours, output, rtol=tolerance, atol=tolerance):
            differing = int((ours != output).sum())
            if best is None or differing < best[0]:
                best = differing, form
    return best[1] if best else None


def _weights(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return getattr(module, "weight", None), getattr(module, "bias", None)


def _record_rotation(
    trace: ForwardTrace, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    results = original(*args, **kwargs)
    known = _is_plain_call(args, kwargs) and isinstance(results, tuple) and len(results) == 2
    _record(trace.rotations, module, _recognise_rotation(args, results) if known else None)
    return results


def _is_plain_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the call is (q, k, cos, sin) over [1, heads, T, dim], as in most models."""
    if len(args) != 4 or kwargs.get("unsqueeze_dim", 1) != 1 or kwargs.keys() > {"unsqueeze_dim"}:
        return False
    q, k, cos, sin = args
    return bool(
        all(isinstance(x, Tensor) for x in args)
        and q.dim() == k.dim() == 4
        and cos.dim() == 3
        and q.shape[2] == k.shape[2] == cos.shape[1]
        and q.shape[0] == cos.shape[0] == 1
        and cos.shape == sin.shape
    )


def _recognise_rotation(
    args: tuple[Any, ...], results: tuple[Tensor, Tensor]
) -> Callable[[Tensor, Tensor], Rotary] | None:
    """Return the form that rotates query and key exactly as the model did, to the last bit."""
    *sources, cos, sin = args
    for form in _ROTARY_FORMS:
        rotary = form(cos[0], sin[0])
        if 2 * rotary.num_pairs <= sources[0].shape[-1] and all(
            torch.equal(rotate(source[0].transpose(0, 1), rotary), result[0].transpose(0, 1))
            for source, result in zip(sources, results, strict=True)
        ):
            return form
    return None


def _rotation_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return the rotation function that the module's forward finds among its globals."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or _ROTATION not in forward.__code__.co_names:
        return None
    return forward.__globals__.get(_ROTATION)


def _set_rotation(module: nn.Module, rotation: Callable[..., Any]) -> None:
    """Give this module, but not its class, a forward that finds `rotation` instead."""
    forward = type(module).forward
    assert isinstance(forward, FunctionType)
    copy = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTATION: rotation},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(copy, module)


# -- the fusions ---------------------------------------------------------------------------


def _replace_experts(model: PreTrainedModel, ops: Ops) -> Fusion:
    """Compute the experts of a mixture by kernels that do the same for all of them at once."""
    previous = use_experts(model, ops)
    return Fusion("mixtures of experts", len(previous), partial(restore_experts, previous))


def _merge_linears(model: PreTrainedModel, trace: ForwardTrace) -> Fusion:
    """Merge the linears of one parent that read the same tensor into one matrix product."""
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    readers: dict[tuple[nn.Module, int], list[nn.Linear]] = defaultdict(list)
    for linear, x in trace.inputs:
        readers[parents[linear], id(x)].append(linear)
    num_calls = Counter(linear for linear, _ in trace.inputs)
    num_joint_calls = Counter(tuple(dict.fromkeys(group)) for group in readers.values())
    groups = [
        group
        for group, times in num_joint_calls.items()
        if can_merge(group) and all(num_calls[linear] == times for linear in group)
    ]
    merged: dict[nn.Module, nn.Module] = {}
    for group in groups:
        merged |= merge(group)
    replace_linears(model, merged.get)
    originals = {replacement: linear for linear, replacement in merged.items()}
    return Fusion("GEMMs of one input", len(groups), partial(replace_linears, model, originals.get))


def _fuse_norms(model: PreTrainedModel, trace: ForwardTrace, ops: Ops) -> Fusion:
    """Compute norms by kernels that also do the residual addition before them."""
    norms = _known(trace.norms)
    for module, form in norms.items():
        module.forward = partial(_norm_forward, module, form, ops)
    layers = _layers(model) if norms else []
    for layer in layers:
        layer.forward = partial(_layer_forward, layer.forward, ops)
    return Fusion("norms", len(norms), partial(_restore, [*norms, *layers]))


def _norm_forward(module: nn.Module, form: NormForm, ops: Ops, x: Tensor | Deferred) -> Tensor:
    weight, bias = _weights(module)
    if isinstance(x, Residual):
        return x.norm(weight, bias, form)
    if isinstance(x, Deferred):
        x = x.materialize()
    return ops.norm(x, weight, bias, form)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers, which pass on the residual stream.

    They are the items of every list that has as many of them as the model has layers.
    """
    depth = model.config.get_text_config().num_hidden_layers
    return [
        layer
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList) and len(stack) == depth
        for layer in stack
    ]


def _layer_forward(
    original: Callable[..., Any], ops: Ops, hidden_states: Any, *args: Any, **kwargs: Any
) -> Any:
    if isinstance(hidden_states, Tensor):
        hidden_states = Residual(ops, hidden_states)
    return original(hidden_states, *args, **kwargs)


def _fuse_activations(trace: ForwardTrace, ops: Ops) -> Fusion:
    """Defer activations to the multiplication of a gated MLP."""
    activations = _known(trace.activations)
    for module, name in activations.items():
        module.forward = partial(_activation_forward, module.forward, name, ops)
    return Fusion("activations", len(activations), partial(_restore, activations))


def _activation_forward(
    original: Callable[..., Tensor], name: str, ops: Ops, x: Tensor | Deferred
) -> Activated:
    return Activated(ops, x.materialize() if isinstance(x, Deferred) else x, name, original)


def _fuse_rotations(trace: ForwardTrace) -> Fusion:
    """Defer rotations of query and key to the KV write."""
    rotations = _known(trace.rotations)
    for module, form in rotations.items():
        original = _rotation_of(module)
        assert original is not None
        _set_rotation(module, partial(_defer_rotation, original, form))
    return Fusion("rotations", len(rotations), partial(_restore, rotations))


def _defer_rotation(
    original: Callable[..., Any],
    form: Callable[[Tensor, Tensor], Rotary],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not _is_plain_call(args, kwargs):
        return original(*args, **kwargs)
    q, k, cos, sin = args
    rotation = Rotation(form(cos[0], sin[0]), partial(original, *args, **kwargs))
    return Rotated(q, rotation, 0), Rotated(k, rotation, 1)


def _known(seen: dict[nn.Module, T | None]) -> dict[nn.Module, T]:
    return {module: what for module, what in seen.items() if what is not None}


def _restore(modules: Iterable[nn.Module]) -> None:
    """Remove the forward that a module was given, so that its class's own is used again."""
    for module in modules:
        del module.forward
