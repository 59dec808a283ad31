"""The memory that a CPU's cache may take is what is free within the limits of its container."""

from pathlib import Path

import psutil
import pytest
import torch

from engine.core.config import BLOCK_SIZE, EngineConfig
from engine.device import memory
from engine.device.memory import HostMemory, device_memory, free_host_memory
from engine.loading.sizing import decide_limits
from tests.engine.models import family

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups, on a host that has 100 GiB free."""
    host = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    (tmp_path / "tree").mkdir()
    return tmp_path / "tree"


def own(cgroups: Path, line: str) -> Path:
    path = cgroups.parent / "own"
    path.write_text(f"9:cpu:/elsewhere\n{line}\n")
    return path


def group(folder: Path, limit: str, used: int, cached: int = 0, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def test_without_a_limit_the_host_s_free_memory_counts(cgroups: Path) -> None:
    group(cgroups / "box", "max", 3 * GIB)
    assert free_host_memory(cgroups, own(cgroups, "0::/box")) == 100 * GIB
    assert free_host_memory(cgroups, cgroups / "no such file") == 100 * GIB
    assert free_host_memory(cgroups, own(cgroups, "0::/gone")) == 100 * GIB


def test_the_limit_of_the_own_group_counts(cgroups: Path) -> None:
    group(cgroups / "box", str(4 * GIB), 3 * GIB)
    assert free_host_memory(cgroups, own(cgroups, "0::/box")) == GIB


def test_the_narrowest_group_above_counts(cgroups: Path) -> None:
    group(cgroups / "pod" / "box", "max", GIB)
    group(cgroups / "pod", str(2 * GIB), GIB + 300 * MIB)
    group(cgroups, str(50 * GIB), GIB)
    expected = GIB - 300 * MIB
    assert free_host_memory(cgroups, own(cgroups, "0::/pod/box")) == expected


def test_a_container_that_sees_its_group_as_the_root_is_limited(cgroups: Path) -> None:
    group(cgroups, str(4 * GIB), GIB)
    assert free_host_memory(cgroups, own(cgroups, "0::/docker/1234")) == 3 * GIB


def test_pages_of_files_are_given_up_and_count_as_free(cgroups: Path) -> None:
    group(cgroups, str(4 * GIB), 4 * GIB, cached=GIB)
    assert free_host_memory(cgroups, own(cgroups, "0::/")) == GIB


def test_version_1_has_limits_of_its_own(cgroups: Path) -> None:
    group(cgroups / "memory" / "box", str(4 * GIB), 3 * GIB, cached=MIB, version=1)
    assert free_host_memory(cgroups, own(cgroups, "4:memory:/box")) == GIB + MIB


def test_a_group_beyond_its_limit_leaves_nothing(cgroups: Path) -> None:
    group(cgroups, str(GIB), 2 * GIB)
    assert free_host_memory(cgroups, own(cgroups, "0::/")) == 0


def test_something_is_free_on_this_machine() -> None:
    assert 0 < free_host_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("asked", "free", "expected"),
    [
        (None, 10 * GIB, 3 * GIB),
        (None, 100 * GIB, 8 * GIB),
        (GIB, 10 * GIB, GIB),
        (20 * GIB, 100 * GIB, 20 * GIB),
        (20 * GIB, 10 * GIB, 8 * GIB),
    ],
)
def test_the_cache_gets_what_is_asked_for_or_a_part_of_what_is_free(
    asked: int | None, free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_host_memory", lambda: free)
    device = device_memory(torch.device("cpu"), 0.5, asked)
    assert isinstance(device, HostMemory)
    assert device.available() == pytest.approx(expected, abs=1)


def test_the_size_of_the_cache_on_a_cpu_is_the_configured_one() -> None:
    def num_tokens(asked: int) -> int:
        config = EngineConfig(max_batch_tokens=64, max_sequences=256, cpu_cache_bytes=asked)
        return decide_limits(family("llama"), config).num_blocks * BLOCK_SIZE

    assert num_tokens(MIB) > 0
    assert num_tokens(2 * MIB) == 2 * num_tokens(MIB)
