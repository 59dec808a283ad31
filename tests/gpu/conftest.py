"""These tests need a CUDA device, and are skipped without one."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_device = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(no_device)


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """After each test the device has as much free as before: nothing keeps a tensor."""
    yield
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
