"""Reads the bytes of tensors from a safetensors file.

The file begins with its header's length in 8 bytes, then has the header, JSON that says where each
tensor begins and ends behind it, then the tensors.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. `start` is where its bytes begin, counted from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open file, which any number of threads may read, closed when nothing refers to it.

    names    of all its tensors
    tensors  by name, those of types that can be read here

    Raises OSError or ValueError if it is no such file.
    """

    def __init__(self, path: Path | str):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed with this object)
        length = int.from_bytes(self._file.read(8), "little")
        if length > os.fstat(self._file.fileno()).st_size - 8:
            raise OSError(f"{path} is no safetensors file, or cut short")
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        self.names = list(header)
        self.tensors = {
            name: StoredTensor(
                _TYPES[entry["dtype"]],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if entry["dtype"] in _TYPES
        }

    def read(self, buffer: Tensor, position: int) -> None:
        """Fill `buffer` [n] uint8, on the host, with the n bytes from `position` on.

        Raises OSError if the file ends before.
        """
        rest = memoryview(buffer.numpy().data)
        while rest:
            num_read = os.preadv(self._file.fileno(), [rest], position)
            if num_read == 0:
                raise OSError(f"{self._file.name} ends at byte {position}: it is cut short")
            rest, position = rest[num_read:], position + num_read
