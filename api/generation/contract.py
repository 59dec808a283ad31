"""The parts of TGI's contract that all routes share: its version, errors and numbers."""

from typing import Any

import numpy as np

from api.http.errors import ErrorResponse

TGI_VERSION = "3.3.6-dev0"
"""The release of TGI whose wire contract is followed. Clients read it from /info."""

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (422, 424, 429, 500)
}


def f32(value: float | None) -> float | None:
    """Return `value` as a float32, which orjson prints in its shortest form; a float would show the
    rounding.
    """
    return None if value is None else np.float32(value)  # type: ignore[return-value]
