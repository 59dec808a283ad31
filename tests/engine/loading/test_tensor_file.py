"""The bytes of tensors are read from safetensors files; other and broken files are told apart."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.loading.tensor_file import TensorFile

TYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
SHAPES = [(), (1,), (0, 3), (7, 5), (2, 3, 4)]


def test_every_tensor_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = {
        f"{dtype} {shape}": torch.randn(shape).mul(9).to(dtype)
        for dtype in TYPES
        for shape in SHAPES
    }
    save_file(written, tmp_path / "some.safetensors", {"format": "pt"})
    file = TensorFile(tmp_path / "some.safetensors")
    assert set(file.names) == file.tensors.keys() == written.keys()
    for name, expected in written.items():
        stored = file.tensors[name]
        assert (stored.dtype, stored.shape) == (expected.dtype, tuple(expected.shape))
        buffer = torch.empty(expected.nbytes, dtype=torch.uint8)
        file.read(buffer, stored.start)
        actual = buffer.view(stored.dtype).view(stored.shape)
        assert torch.equal(actual.to(torch.float64), expected.to(torch.float64))


def test_types_that_torch_lacks_are_named_and_not_read(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    path = tmp_path / "new.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    file = TensorFile(path)
    assert (file.names, file.tensors) == (["a"], {})


def test_a_file_that_is_cut_short_is_told(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    file = TensorFile(path)
    with pytest.raises(OSError, match=r"some\.safetensors ends at byte \d+: it is cut short"):
        file.read(torch.empty(4000, dtype=torch.uint8), file.tensors["a"].start)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"PK\x03\x04" + bytes(100),
        (2).to_bytes(8, "little") + b"{",
        (4).to_bytes(8, "little") + b"nope",
    ],
)
def test_another_file_is_no_reason_to_ask_for_memory(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        TensorFile(path)
