"""Loads the weights of a model tensor by tensor, from shards that may still be downloading.

transformers reads a tensor's values when it is about to place them on the device. So it is given
lazy tensors: each waits, when it is read, until its shard has been downloaded.
"""

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import Tensor

from engine.loading.folder_faults import INDEX
from engine.loading.hub import download_errors
from engine.loading.placement import Placement
from engine.loading.tensor_file import TensorFile

_NUM_PARALLEL = 2
"""Shards downloaded at a time. With more, the first shard would get less of the bandwidth."""
_ONLY = "model.safetensors"
"""The name of the file where there is only one."""


class Shards:
    """The shards of one model, and which tensor is in which of them."""

    def __init__(self, weight_map: Mapping[str, str]) -> None:
        self._weight_map = weight_map
        self._ended = time.perf_counter()
        self._pool = ThreadPoolExecutor(_NUM_PARALLEL, "skiff-download")
        self._shards: dict[str, _Shard] = {}

    @classmethod
    def downloading(cls, model_id: str, revision: str, index: Path) -> "Shards":
        """Start to download the shards that the index names, in their order."""
        shards = cls(_weight_map(index))
        for name in sorted(set(shards._weight_map.values())):
            path = shards._pool.submit(shards._download, model_id, name, revision)
            shards._shards[name] = _Shard(path)
        return shards

    @classmethod
    def in_folder(cls, folder: Path) -> "Shards | None":
        """Return the shards of a folder that has all of them, None if it has no safetensors."""
        if (folder / _ONLY).exists():
            weight_map = dict.fromkeys(TensorFile(folder / _ONLY).names, _ONLY)
        elif (folder / INDEX).exists():
            weight_map = _weight_map(folder / INDEX)
        else:
            return None
        shards = cls(weight_map)
        for name in set(weight_map.values()):
            path: Future[str] = Future()
            path.set_result(str(folder / name))
            shards._shards[name] = _Shard(path)
        return shards

    def _download(self, model_id: str, name: str, revision: str) -> str:
        with download_errors(model_id):
            path = hf_hub_download(model_id, name, revision=revision)
        self._ended = max(self._ended, time.perf_counter())
        return path

    def tensors(self, placement: Placement | None = None) -> "dict[str, LazyTensor]":
        """Return all tensors by name, which are read to where `placement` says, or to the host."""
        return {
            name: LazyTensor(name, self._shards[shard], placement)
            for name, shard in self._weight_map.items()
        }

    def dtype(self) -> torch.dtype | None:
        """Return the type of the first weight of 16 bits or more, once its shard is there."""
        for shard in self._shards.values():
            for tensor in shard.file.tensors.values():
                if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
                    return tensor.dtype
        return None

    def seconds_since(self, start: float) -> float:
        """Return how long after `start` the download took, once it has ended."""
        return max(self._ended - start, 0.0)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Load the tensors within this context, which ends when all shards are downloaded.

        If loading fails because a shard could not be downloaded, that error is raised instead.
        """
        try:
            yield
        except Exception:
            for shard in self._shards.values():
                if shard.path.done():
                    shard.path.result()
            raise
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self.wait()

    def wait(self) -> None:
        """Wait until all shards are downloaded. Raises the error of one that failed."""
        for shard in self._shards.values():
            shard.path.result()


def _weight_map(index: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return weight_map


class _Shard:
    """A file that is opened when it is downloaded and first read."""

    def __init__(self, path: "Future[str]"):
        self.path = path

    @cached_property
    def file(self) -> TensorFile:
        return TensorFile(self.path.result())


class LazyTensor:
    """A tensor that is read when it is sliced, as the slices of a safetensors file are."""

    def __init__(self, name: str, shard: _Shard, placement: Placement | None):
        self._name = name
        self._shard = shard
        self._placement = placement

    def __getitem__(self, index: Any) -> Tensor:
        whole = index is Ellipsis
        if whole and self._placement is not None and self._name in self._shard.file.tensors:
            return self._placement.load(self._shard.file, self._name)
        with safe_open(self._shard.path.result(), framework="pt") as file:
            return file.get_slice(self._name)[index]

    def get_dtype(self) -> str:
        """Return the tensor's type, which transformers reads for quantised checkpoints."""
        with safe_open(self._shard.path.result(), framework="pt") as file:
            return file.get_slice(self._name).get_dtype()
