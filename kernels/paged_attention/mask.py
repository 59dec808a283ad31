"""The masks of causal attention: which earlier keys a query may see."""

from dataclasses import dataclass

NO_LIMIT = 1 << 30
"""A window or chunk that restricts nothing."""


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """Which earlier keys a query at position q sees: k > q - window, and k in q's chunk."""

    window: int = NO_LIMIT
    chunk: int = NO_LIMIT
