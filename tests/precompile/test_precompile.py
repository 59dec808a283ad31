"""Kernels compiled without a GPU are the ones that Triton looks for on a GPU."""

import importlib
import json
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config
from triton.runtime import build
from triton.runtime.cache import get_cache_manager

import kernels
from tests.engine import models

ROOT = Path(__file__).parents[2]

OF_OTHER_MODELS = {
    "_route_kernel",
    "_grouped_linear_kernel",
    "_combine_kernel",
    "_invariant_linear_kernel",
}
"""Kernels of mixtures of experts and of --batch-invariant, which are compiled at load."""


def python(*arguments: str, cache: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=env | {"TRITON_CACHE_DIR": str(cache)},
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout


def launch(driver: str, cache: Path, *shipped: Path) -> dict[str, bool]:
    """Launch kernels through this driver; return for each whether it was in Triton's cache."""
    arguments = [driver, *map(str, shipped)]
    output = python("tests.precompile.launching", *arguments, cache=cache)
    found: dict[str, bool] = json.loads(output)
    return found


NAMES = {"_norm_kernel", "greedy_chunk_kernel", "greedy_row_kernel", "_mask_tokens_kernel"}


@pytest.mark.slow
def test_triton_s_own_driver_finds_the_kernels_compiled_ahead_of_time(tmp_path: Path) -> None:
    assert launch("fake", tmp_path) == dict.fromkeys(NAMES, False)
    assert launch("cuda", tmp_path) == dict.fromkeys(NAMES, True)


@pytest.mark.slow
def test_kernels_are_found_in_the_shipped_folder_and_new_ones_written_to_the_other(
    tmp_path: Path,
) -> None:
    shipped, kept = tmp_path / "shipped", tmp_path / "kept"
    launch("fake", shipped)
    (missing,) = (path.parent for path in shipped.glob("*/_norm_kernel.cubin"))
    shutil.rmtree(missing)
    before = sorted(shipped.rglob("*"))
    for found in (False, True):
        assert launch("cuda", kept, shipped) == dict.fromkeys(NAMES, True) | {"_norm_kernel": found}
    assert [path.stem for path in kept.glob("*/*.cubin")] == ["_norm_kernel"]
    assert sorted(shipped.rglob("*")) == before


@pytest.mark.slow
def test_kernels_are_not_found_in_a_cache_that_was_moved(tmp_path: Path) -> None:
    """This is why the image fills the cache in its final place."""
    launch("fake", tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert not any(launch("cuda", tmp_path / "there").values())


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
@pytest.mark.parametrize("linkage", ["", "ELF"], ids=["without file", "with file"])
def test_triton_finds_its_library_with_and_without_the_file_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linkage: str
) -> None:
    from precompile.fake_driver import build_launcher

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    build_launcher()
    looked_for: list[str | None] = []

    def remember(key: str) -> object:
        cache = get_cache_manager(key)
        looked_for.append(
            cache.get_file(f"cuda_utils{build.sysconfig.get_config_var('EXT_SUFFIX')}")
        )
        return cache

    monkeypatch.setattr(platform, "architecture", lambda: ("64bit", linkage))
    monkeypatch.setattr(build, "get_cache_manager", remember)
    monkeypatch.setattr(build, "_load_module_from_path", lambda *_: None)
    build.platform_key.cache_clear()
    source = Path(build.__file__).parents[1] / "backends/nvidia/driver.c"
    build.compile_module_from_src(source.read_text(), "cuda_utils")
    build.platform_key.cache_clear()
    assert looked_for[0] is not None


def save_model(folder: Path) -> None:
    """Save a model whose norms have weights of their own, as trained ones do."""
    model = models.build(Gemma2Config, **models.FAMILIES["gemma2"][1])
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    models.byte_tokenizer()._hf.save_pretrained(folder)


@pytest.mark.slow
def test_a_model_finds_all_kernels_that_were_compiled_without_its_weights(tmp_path: Path) -> None:
    complete, cache = tmp_path / "complete", tmp_path / "cache"
    save_model(complete)
    without_weights = shutil.copytree(
        complete, tmp_path / "downloading", ignore=shutil.ignore_patterns("*.safetensors")
    )
    command = ["precompile", str(without_weights), "--config-only", "--targets", "90"]
    command += ["--dtypes", "bfloat16"]
    assert python(*command, cache=cache).startswith("sm_90 bfloat16: ")
    found = json.loads(python("tests.precompile.finding", str(complete), cache=cache))
    assert found == dict.fromkeys(found, True)
    assert {"attend_kernel", "_norm_kernel", "_act_mul_kernel"} <= found.keys()
    assert python(*command, cache=cache) == ""  # it is done already


@pytest.mark.slow
def test_every_kernel_is_compiled(tmp_path: Path) -> None:
    python("precompile", "--targets", "90", "--dtypes", "bfloat16", cache=tmp_path)
    compiled = {path.stem for path in tmp_path.glob("*/*.cubin")}
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(kernels.__path__, "kernels.")
    ]
    launchable = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert compiled == launchable - OF_OTHER_MODELS
