"""Comparison of two answers. Everything must be equal, except that logprobs have a tolerance."""

import math
from collections.abc import Iterator
from typing import Any

LOGPROB_TOLERANCE = 2e-3
"""float32 results depend on the rest of the batch and on the machine's threads and vector units."""


def differences(expected: Any, actual: Any, path: str = "") -> Iterator[str]:
    """Yield a line for each difference. The order of keys counts."""
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


def assert_equal_answers(one: Any, other: Any) -> None:
    assert list(differences(one, other)) == []
