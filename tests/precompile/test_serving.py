"""No request waits for a compiler: the engine compiles what sampling needs before it is ready."""

import json
from pathlib import Path

import pytest

from tests.precompile.test_precompile import python


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [259, 512], ids=["rows not aligned", "aligned rows"])
def test_requests_of_every_kind_compile_nothing_once_the_engine_is_ready(
    vocab_size: int, tmp_path: Path
) -> None:
    arguments = "tests.precompile.serving", str(vocab_size), "bfloat16"
    assert json.loads(python(*arguments, cache=tmp_path)) == []
