"""Weights that are still on their way: what has come is loaded while the rest is downloaded.

transformers asks for a tensor's values when it is about to place it on the device. So it is given
tensors that know their shard, and wait for it.
"""

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
"""Names each tensor's shard."""
_AT_ONCE = 2
"""More would have the first shard wait for the others' share of the line."""


class Shards:
    """Of one model, downloaded in their order from the moment that this is made."""

    def __init__(self, model_id: str, revision: str, index: Path) -> None:
        weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        self._started = time.perf_counter()
        self._ended = self._started
        self._pool = ThreadPoolExecutor(_AT_ONCE, "skiff-download")
        self._paths: dict[str, Future[str]] = {
            name: self._pool.submit(self._download, model_id, name, revision)
            for name in sorted(set(weight_map.values()))
        }
        self.tensors = {
            name: LazyTensor(name, self._paths[shard]) for name, shard in weight_map.items()
        }

    def _download(self, model_id: str, name: str, revision: str) -> str:
        path = hf_hub_download(model_id, name, revision=revision)
        self._ended = max(self._ended, time.perf_counter())
        return path

    @property
    def seconds(self) -> float:
        """What the download took, once it has ended."""
        return self._ended - self._started

    @contextmanager
    def loading(self) -> Iterator[None]:
        """To load them in. What fails in it for want of a shard fails for the download's reason."""
        try:
            yield
        except Exception:
            for path in self._paths.values():
                if path.done():
                    path.result()
            raise
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self.wait()

    def wait(self) -> None:
        """Until all are here. Raises what kept one away."""
        for path in self._paths.values():
            path.result()


@dataclass(frozen=True)
class LazyTensor:
    """Stands for a tensor until it is sliced, as those of an open safetensors file do."""

    name: str
    path: "Future[str]"

    def __getitem__(self, index: Any) -> Tensor:
        with safe_open(self.path.result(), framework="pt") as shard:
            return shard.get_slice(self.name)[index]

    def get_dtype(self) -> str:
        """Asked for where weights are quantised already."""
        with safe_open(self.path.result(), framework="pt") as shard:
            return shard.get_slice(self.name).get_dtype()
