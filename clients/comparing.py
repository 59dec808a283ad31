"""Two answers beside each other: all of them exactly, but for the logprobs."""

import math
from collections.abc import Iterator
from typing import Any

LOGPROB_TOLERANCE = 2e-3
"""float32, whatever else was in the batch, and the threads and vector units of the machine."""


def differences(expected: Any, actual: Any, path: str = "") -> Iterator[str]:
    """Where two answers differ; the order of keys is part of an answer."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        if list(expected) != list(actual):
            yield f"{path}: keys {list(actual)}, not {list(expected)}"
            return
        for key, value in expected.items():
            yield from differences(value, actual[key], f"{path}.{key}")
    elif isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            yield f"{path}: {len(actual)} items, not {len(expected)}: {actual}"
        for number, (one, other) in enumerate(zip(expected, actual, strict=False)):
            yield from differences(one, other, f"{path}[{number}]")
    elif path.endswith(".logprob") and isinstance(expected, float) and isinstance(actual, float):
        if not math.isclose(expected, actual, abs_tol=LOGPROB_TOLERANCE):
            yield f"{path}: {actual}, not {expected}"
    elif expected != actual or type(expected) is not type(actual):
        yield f"{path}: {actual!r}, not {expected!r}"


def assert_alike(one: Any, other: Any) -> None:
    assert list(differences(one, other)) == []
