"""Says which file of a model's folder is broken, and what to do about it.

Libraries report a broken file in their own ways, many without its name. So the small files are
looked at before anything is loaded, and the large ones when loading has failed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from engine.core.errors import LoadError
from engine.loading.reasons import is_out_of_memory, out_of_memory, reason

INDEX = "model.safetensors.index.json"
"""The file that names the shard of each tensor."""
_COPY_AGAIN = "copy or download it again"
_SETTINGS = ("generation_config.json", "tokenizer_config.json")
_LFS_POINTER = b"version https://git-lfs"
_PICKLES = (b"\x80", b"PK\x03\x04")
"""How the files of pickle and of torch.save begin."""


class _Fault(Exception):
    """What is wrong with a file, in words that begin with its path, and what to do."""


@contextmanager
def naming_the_fault(model_id: str, folder: Path, read: str) -> Iterator[None]:
    """Turn whatever goes wrong while a model is loaded from `folder` into LoadError, whose message
    names the file that is broken, or else `read`, the file that says what to load.
    """
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{model_id} cannot be loaded: {_why(error, folder, read)}") from error


def _why(error: Exception, folder: Path, read: str) -> str:
    if is_out_of_memory(error):
        return out_of_memory(error)
    return fault_in(folder) or (
        f"{reason(error)}; its files can be read, so a value in {folder / read} may be wrong, or "
        f"not made for transformers {transformers.__version__}"
    )


def check_settings(model_id: str, folder: Path) -> None:
    """Raise LoadError unless there is a config.json and every small file can be read."""
    try:
        _read_config(folder)
        for name in _SETTINGS:
            if (folder / name).exists():
                _read_object(folder / name)
        if (folder / "chat_template.jinja").exists():
            _read_text(folder / "chat_template.jinja")
    except _Fault as fault:
        raise LoadError(f"{model_id} cannot be loaded: {fault}") from None


def fault_in(folder: Path) -> str | None:
    """Return what is wrong with a file of the folder; None if all look well."""
    try:
        _check_type(folder)
        if (folder / "tokenizer.json").exists():
            _read_object(folder / "tokenizer.json")
        _check_weights(folder)
        if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            raise _Fault(f"no tokenizer.json in {folder}: copy the whole folder of the model")
    except _Fault as fault:
        return str(fault)
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    with _readable(path):
        if not path.exists():
            raise _Fault(f"no config.json in {folder}: name the folder of a whole model")
    return _read_object(path)


def _check_type(folder: Path) -> None:
    config, path = _read_config(folder), folder / "config.json"
    name = config.get("model_type")
    if "auto_map" in config and name not in CONFIG_MAPPING:
        raise _Fault(
            f"{path} needs Python code of the model's repository: if you trust it, run it with "
            "--trust-remote-code"
        )
    if not isinstance(name, str):
        raise _Fault(f"{path} has no model_type: name the folder of a transformers model")
    if name not in CONFIG_MAPPING:
        raise _Fault(f"{path} has model_type {name!r}, which transformers does not know")
    if CONFIG_MAPPING[name] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _Fault(f"{path} has model_type {name!r}, which is no language model")


def _check_weights(folder: Path) -> None:
    index = folder / INDEX
    if index.exists():
        for name in _shards(index):
            if not (folder / name).exists():
                raise _Fault(f"{index} names {name}, which is not there: copy all of the folder")
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        _check_safetensors(path)
    pickles = [] if files else sorted(folder.glob("*.bin"))
    for path in pickles:
        _check_torch_file(path)
    if not files and not pickles:
        raise _Fault(f"no weights in {folder}: copy its *.safetensors files, too")
    if files and not index.exists() and not (folder / "model.safetensors").exists():
        raise _Fault(f"neither model.safetensors nor {INDEX} is in {folder}: copy all of it")


def _shards(index: Path) -> list[str]:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _Fault(f"{index} has no weight_map: {_COPY_AGAIN}")
    return sorted({str(name) for name in weight_map.values()})


def _check_safetensors(path: Path) -> None:
    """Check what a file begins with: the header's length in 8 bytes, a JSON header, which says
    where each tensor ends, then the tensors.
    """
    size = _size(path)
    with _readable(path), path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        header = file.read(length) if length <= size - 8 else b""
    if start.startswith(_LFS_POINTER):
        raise _Fault(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull`")
    if start.startswith(_PICKLES):
        raise _Fault(f"{path} is a file of torch.save, not safetensors: convert it")
    if start and start[8:9] in (b"{", b"") and length > size - 8:
        raise _Fault(f"{path} is cut short, within its header: {_COPY_AGAIN}")
    try:
        ends = [v["data_offsets"][1] for k, v in json.loads(header).items() if k != "__metadata__"]
        end = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _Fault(f"{path} is no safetensors file ({size} bytes): {_COPY_AGAIN}") from None
    if size < end:
        raise _Fault(f"{path} is cut short: it has {size} of {end} bytes; {_COPY_AGAIN}")


def _check_torch_file(path: Path) -> None:
    with _readable(path), path.open("rb") as file:
        start = file.read(64)
    if start.startswith(_LFS_POINTER):
        raise _Fault(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull`")
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception:
        raise _Fault(
            f"{path} is no file of tensors alone, and nothing else is unpickled, since that could "
            "run any code: take the model's *.safetensors files"
        ) from None


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise _Fault(f"{path} is not JSON ({reason(error)}): {_COPY_AGAIN}") from None
    if not isinstance(value, dict):
        raise _Fault(f"{path} is JSON, but no object: {_COPY_AGAIN}")
    return value


def _read_text(path: Path) -> str:
    with _readable(path):
        content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise _Fault(f"{path} is not text in UTF-8: {_COPY_AGAIN}") from None


def _size(path: Path) -> int:
    with _readable(path):
        return path.stat().st_size


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Fault(f"{path} cannot be read: {error.strerror}") from None
