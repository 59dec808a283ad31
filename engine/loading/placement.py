"""Decides where the weights of a model lie in the device's memory.

Linears that read the same input are merged into one, whose weights lie one behind the other
(`engine.linear.merged`). Weights that are loaded to such places need not be moved. Moving them
leaves holes between the weights that stay, which nothing else fits into: some gigabytes of an 8B
model's memory would be lost to the KV cache.

Which linears read the same input is known only after loading. In nearly every model they are
children of one module and follow one another, such as `q_proj`, `k_proj` and `v_proj`, so all
linears of that kind are placed together.
"""

import threading
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from engine.device.upload import Uploads
from engine.loading.tensor_file import StoredTensor, TensorFile


class Placement:
    """Loads tensors of a checkpoint to their places on the device, from any thread.

    `layout` is the model on the meta device, in the types it is served in. None: each tensor gets
    a place of its own, in the type it is stored in.
    """

    def __init__(self, layout: PreTrainedModel | None, device: torch.device, uploads: Uploads):
        self._device = device
        self._uploads = uploads
        self._types = _types(layout) if layout is not None else {}
        self._shared: dict[str, _Neighbours] = {}
        for neighbours in _neighbours(layout) if layout is not None else ():
            self._shared |= dict.fromkeys(neighbours, _Neighbours(neighbours))

    def load(self, file: TensorFile, name: str) -> Tensor:
        """Return the tensor of this name on the device."""
        stored = file.tensors[name]
        target = self._place(name, stored)

        def read(buffer: Tensor, offset: int) -> None:
            file.read(buffer, stored.start + offset)

        self._uploads.fill(target, stored.dtype, read)
        return target

    def _place(self, name: str, stored: StoredTensor) -> Tensor:
        dtype = self._types.get(name, stored.dtype)
        if not (dtype.is_floating_point and stored.dtype.is_floating_point):
            dtype = stored.dtype
        shared = self._shared.get(name)
        if shared is not None and shared.fits(name, stored.shape, dtype):
            return shared.place(name, self._device)
        return torch.empty(stored.shape, dtype=dtype, device=self._device)


def layout_of(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of this configuration on the meta device, where it needs no memory.

    Its class is transformers' own: no code of the model's repository is run.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=dtype, trust_remote_code=False
        )
    return model


def fill_places(layout: PreTrainedModel, device: torch.device) -> None:
    """Give each tensor of a model on the meta device its place, in the model itself. Values are not
    set, and no memory is touched.
    """
    places: dict[Tensor, Tensor] = {}
    for neighbours in _neighbours(layout):
        shared = _Neighbours(neighbours)
        places |= {tensor: shared.place(name, device) for name, tensor in neighbours.items()}
    for module in layout.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in places:
                places[parameter] = torch.empty_like(parameter, device=device)
            module.register_parameter(name, nn.Parameter(places[parameter], requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))


def _types(layout: PreTrainedModel) -> dict[str, torch.dtype]:
    """Return the type of each tensor, but of those that transformers may keep in float32."""
    kept = set[str]()
    for names in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        kept.update(getattr(layout, names, None) or ())
    return {
        name: tensor.dtype
        for name, tensor in layout.state_dict().items()
        if not any(part in name for part in kept)
    }


def _neighbours(layout: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """Yield the parameters, by name, that are to lie one behind the other, in their order."""
    for path, parent in layout.named_modules():
        prefix = f"{path}." if path else ""
        children = [(f"{prefix}{name}", child) for name, child in parent.named_children()]
        for _, group in groupby(children, lambda child: _kind(child[1])):
            linears = {name: child for name, child in group if type(child) is nn.Linear}
            if len(linears) > 1:
                yield {f"{name}.weight": linear.weight for name, linear in linears.items()}
                biases = {f"{name}.bias": linear.bias for name, linear in linears.items()}
                if None not in biases.values():
                    yield biases


def _kind(module: nn.Module) -> object:
    """Return what linears have in common that may be merged."""
    if type(module) is not nn.Linear:
        return None
    return module.in_features, module.weight.dtype, module.bias is None


class _Neighbours:
    """Parameters in one storage, which is allocated with the first of them."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._lock = threading.Lock()
        self._memory: Tensor | None = None
        self._dtype = next(iter(parameters.values())).dtype
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}

    def fits(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return self._shapes[name] == shape and self._dtype == dtype

    def place(self, name: str, device: torch.device) -> Tensor:
        """Return the place of this parameter, whose values are not there yet."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        with self._lock:
            if self._memory is None:
                self._memory = torch.empty(sum(sizes), dtype=self._dtype, device=device)
        index = list(self._shapes).index(name)
        return self._memory.split(sizes)[index].view(self._shapes[name])
