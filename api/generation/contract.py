"""What all dialects share of Text Generation Inference's contract: version, errors, numbers."""

from typing import Any

import numpy as np

from api.http.errors import ErrorResponse

TGI_VERSION = "3.3.6-dev0"
"""The release whose wire this is; clients read it from /info."""

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (422, 424, 429, 500)
}


def f32(value: float | None) -> float | None:
    """orjson prints numpy's float32 in its shortest form; a float would show the rounding."""
    return None if value is None else np.float32(value)  # type: ignore[return-value]
