"""Loads the weights of a model while its other shards are still being downloaded.

transformers reads a tensor's values when it is about to place them on the device. So it is given
lazy tensors: each waits, when it is read, until its shard has been downloaded.
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

from engine.loading.hub import download_errors

_NUM_PARALLEL = 2
"""Shards downloaded at a time. With more, the first shard would get less of the bandwidth."""


class Shards:
    """The shards of one model. Their download, in order, starts when this object is made."""

    def __init__(self, model_id: str, revision: str, index: Path) -> None:
        weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        self._ended = time.perf_counter()
        self._pool = ThreadPoolExecutor(_NUM_PARALLEL, "skiff-download")
        self._paths: dict[str, Future[str]] = {
            name: self._pool.submit(self._download, model_id, name, revision)
            for name in sorted(set(weight_map.values()))
        }
        self.tensors = {
            name: LazyTensor(name, self._paths[shard]) for name, shard in weight_map.items()
        }

    def _download(self, model_id: str, name: str, revision: str) -> str:
        with download_errors(model_id):
            path = hf_hub_download(model_id, name, revision=revision)
        self._ended = max(self._ended, time.perf_counter())
        return path

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
            for path in self._paths.values():
                if path.done():
                    path.result()
            raise
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self.wait()

    def wait(self) -> None:
        """Wait until all shards are downloaded. Raises the error of one that failed."""
        for path in self._paths.values():
            path.result()


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is sliced, as the slices of a safetensors file are."""

    name: str
    path: "Future[str]"

    def __getitem__(self, index: Any) -> Tensor:
        with safe_open(self.path.result(), framework="pt") as shard:
            return shard.get_slice(self.name)[index]

    def get_dtype(self) -> str:
        """Return the tensor's type, which transformers reads for quantised checkpoints."""
        with safe_open(self.path.result(), framework="pt") as shard:
            return shard.get_slice(self.name).get_dtype()
