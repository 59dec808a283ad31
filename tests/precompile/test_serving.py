"""No request waits for a compiler: the engine compiles what sampling needs before it is ready."""

import json
from pathlib import Path

import pytest

from tests.precompile.test_precompile import python


@pytest.mark.slow
def test_requests_of_every_kind_compile_nothing_once_the_engine_is_ready(tmp_path: Path) -> None:
    """The vocabulary is such that some rows of logits are aligned for vector loads, others not."""
    arguments = "tests.precompile.serving", "259", "bfloat16"
    assert json.loads(python(*arguments, cache=tmp_path)) == []
