"""A folder that cannot be loaded is refused in one sentence that names the broken file."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core.config import LoadConfig
from engine.core.errors import LoadError
from engine.loading import loader
from engine.loading.checkpoint import _convert_gguf
from engine.loading.folder_faults import INDEX, fault_in
from engine.loading.loader import load
from engine.loading.reasons import reason
from tests.engine.models import byte_tokenizer, reference

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
SECOND_SHARD = "model-00002-of-00002.safetensors"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    reference("llama").save_pretrained(folder)
    byte_tokenizer()._hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("sharded"), reference("llama")
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size * 6 // 10)
    byte_tokenizer()._hf.save_pretrained(folder)
    return folder


def written(name: str, content: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, part: float) -> Break:
    def cut_file(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * part)])

    return cut_file


def gone(pattern: str) -> Break:
    def remove(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return remove


def changed(name: str, **values: object) -> Break:
    def change(folder: Path) -> None:
        content: dict[str, Any] = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return change


def as_folder(name: str) -> Break:
    def replace_file(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return replace_file


def only_a_bin(content: bytes) -> Break:
    def replace_weights(folder: Path) -> None:
        gone("*.safetensors")(folder)
        (folder / "pytorch_model.bin").write_bytes(content)

    return replace_weights


def saved_by_torch(folder: Path) -> None:
    torch.save({"weight": torch.ones(3)}, folder / WEIGHTS)


BROKEN: dict[str, tuple[Break, str]] = {
    "weights of random bytes": (written(WEIGHTS, os.urandom(5000)), f"{WEIGHTS} is no safetensors"),
    "weights cut short": (cut(WEIGHTS, 0.5), f"{WEIGHTS} is cut short"),
    "weights without their last byte": (cut(WEIGHTS, 0.999_999), f"{WEIGHTS} is cut short"),
    "weights cut in the header": (cut(WEIGHTS, 0.001), f"{WEIGHTS} is cut short"),
    "empty weights": (written(WEIGHTS, b""), f"{WEIGHTS} is no safetensors"),
    "a pickle as weights": (written(WEIGHTS, pickle.dumps({"a": 1})), f"{WEIGHTS} is a file of"),
    "torch.save as weights": (saved_by_torch, f"{WEIGHTS} is a file of torch.save"),
    "a pointer of Git LFS": (written(WEIGHTS, LFS_POINTER), f"{WEIGHTS} is a pointer of Git LFS"),
    "a bin that runs code": (only_a_bin(pickle.dumps(os.getcwd)), "pytorch_model.bin is no file"),
    "a bin of random bytes": (only_a_bin(os.urandom(999)), "pytorch_model.bin is no file"),
    "no weights": (gone("*.safetensors"), "no weights in"),
    "no config": (gone(CONFIG), "no config.json in"),
    "an empty folder": (gone("*"), "no config.json in"),
    "a config cut short": (cut(CONFIG, 0.5), f"{CONFIG} is not JSON"),
    "a config that is a list": (written(CONFIG, b"[]"), f"{CONFIG} is JSON, but no object"),
    "a config that is null": (written(CONFIG, b"null"), f"{CONFIG} is JSON, but no object"),
    "a binary config": (written(CONFIG, b"\xff\xfe\x00"), f"{CONFIG} is not text in UTF-8"),
    "a deep config": (written(CONFIG, b"[" * 99_999), f"{CONFIG} is not JSON"),
    "a folder as config": (as_folder(CONFIG), f"{CONFIG} cannot be read: Is a directory"),
    "an empty config": (written(CONFIG, b"{}"), f"{CONFIG} has no model_type"),
    "an unknown type": (changed(CONFIG, model_type="new"), "model_type 'new', which transformers"),
    "a type of images": (changed(CONFIG, model_type="vit"), "'vit', which is no language model"),
    "a type with code": (
        changed(CONFIG, model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "--trust-remote-code",
    ),
    "a size that is text": (changed(CONFIG, hidden_size="many"), CONFIG),
    "a negative size": (changed(CONFIG, hidden_size=-4), CONFIG),
    "no heads": (changed(CONFIG, num_attention_heads=0), CONFIG),
    "another size": (changed(CONFIG, intermediate_size=77), "do not fit its config.json"),
    "one layer more": (changed(CONFIG, num_hidden_layers=9), "lack 45 tensors"),
    "an unknown dtype": (changed(CONFIG, dtype="float7"), CONFIG),
    "no tokenizer": (gone("token*"), "no tokenizer.json in"),
    "a tokenizer cut short": (cut(TOKENIZER, 0.5), f"{TOKENIZER} is not JSON"),
    "a tokenizer that is a list": (written(TOKENIZER, b"[]"), f"{TOKENIZER} is JSON, but"),
    "an unknown tokenizer": (changed(TOKENIZER, model={"type": "New"}), TOKENIZER),
    "a broken tokenizer_config": (written("tokenizer_config.json", b"{"), "tokenizer_config.json"),
    "a broken generation_config": (cut("generation_config.json", 0.5), "generation_config.json is"),
    "a generation_config of null": (written("generation_config.json", b"null"), "generation_con"),
    "a binary template": (written(TEMPLATE, b"\xff\xfe"), f"{TEMPLATE} is not text"),
}
BROKEN_SHARDS: dict[str, tuple[Break, str]] = {
    "no second shard": (gone(SECOND_SHARD), f"{INDEX} names {SECOND_SHARD}, which is not there"),
    "a shard cut short": (cut(SECOND_SHARD, 0.5), f"{SECOND_SHARD} is cut short"),
    "an index cut short": (cut(INDEX, 0.5), f"{INDEX} is not JSON"),
    "an index that is a list": (written(INDEX, b"[]"), f"{INDEX} is JSON, but no object"),
    "an empty index": (written(INDEX, b"{}"), f"{INDEX} has no weight_map"),
    "an index of nothing": (written(INDEX, b'{"weight_map": {}}'), f"{INDEX} has no weight_map"),
    "no index": (gone(INDEX), f"neither {WEIGHTS} nor {INDEX}"),
}


def check_refused(folder: Path, expected: str) -> None:
    with pytest.raises(LoadError) as caught:
        load(LoadConfig(str(folder)))
    message = str(caught.value)
    assert expected in message
    assert message.startswith(f"{folder} cannot be loaded: ")
    assert "\n" not in message
    assert len(message) < 1000


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused(case: str, good: Path, tmp_path: Path) -> None:
    break_it, expected = BROKEN[case]
    folder = shutil.copytree(good, tmp_path / "model")
    break_it(folder)
    check_refused(folder, expected)


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_a_broken_sharded_folder_is_refused(case: str, sharded: Path, tmp_path: Path) -> None:
    break_it, expected = BROKEN_SHARDS[case]
    folder = shutil.copytree(sharded, tmp_path / "model")
    break_it(folder)
    check_refused(folder, expected)


def test_no_fault_is_found_in_a_whole_folder(good: Path, sharded: Path) -> None:
    assert fault_in(good) is None
    assert fault_in(sharded) is None


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: no memory")])
def test_a_model_that_does_not_fit_is_refused_with_what_to_do(
    error: Exception, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("_load_weights", "prepare_model"):
        with monkeypatch.context() as patched:

            def fail(*_: object) -> None:
                raise error

            patched.setattr(loader, part, fail)
            check_refused(good, "does not fit in the device's memory")
            check_refused(good, "--quantize")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64), st.integers(0, 80))
def test_no_bytes_make_the_search_for_the_fault_fail(
    good: Path, tmp_path: Path, start: bytes, length: int
) -> None:
    folder = shutil.copytree(good, tmp_path / "model", dirs_exist_ok=True)
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b"{" + start)
    fault = fault_in(folder)
    assert fault is not None
    assert str(folder / WEIGHTS) in fault
    (folder / TOKENIZER).write_bytes(start)
    fault = fault_in(folder)
    assert fault is not None
    assert str(folder / TOKENIZER) in fault


def test_a_gguf_file_that_cannot_be_unpacked_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(os.urandom(5000))
    with pytest.raises(LoadError, match=r"model\.gguf cannot be unpacked") as caught:
        load(LoadConfig(str(gguf)))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "home" / "skiff").iterdir()) == []


def test_a_full_disk_is_named_when_a_gguf_file_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("engine.loading.checkpoint._unpack_gguf", fail)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"")
    with pytest.raises(LoadError, match=r"no space left in .*home.*set HF_HOME to a folder"):
        _convert_gguf(gguf)


def test_a_reason_is_one_short_line() -> None:
    assert reason(ValueError("first\n  second")) == "first second"
    assert reason(KeyError("key")) == "KeyError: 'key'"
    assert reason(RuntimeError()) == "RuntimeError"
    assert len(reason(ValueError("long " * 1000))) < 400
