"""Finds compiled kernels in two folders: the one that Triton fills, and one that lies beside the
code and is only read.

An image has kernels that were compiled when it was built. What it compiles later is kept on the
volume of the models, which outlives the container. Triton alone reads one folder, and an entry
cannot be copied to another, since it names its files by absolute paths.
"""

from pathlib import Path

from triton.runtime.cache import FileCacheManager

SHIPPED = Path(__file__).parents[1] / ".triton"
"""Where `python -m precompile` writes if TRITON_CACHE_DIR is not set."""


class CompiledKernels(FileCacheManager):
    """The cache entry of one key, named to Triton by TRITON_CACHE_MANAGER."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        super().__init__(key, override, dump)
        self._shipped = _ShippedKernels(key)

    def get_file(self, filename: str) -> str | None:
        """Return the path of a file of this entry, None if neither folder has it."""
        return super().get_file(filename) or self._shipped.get_file(filename)

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Return the paths of the files of one kernel by name, None if neither folder has it."""
        return super().get_group(filename) or self._shipped.get_group(filename)


class _ShippedKernels(FileCacheManager):
    """An entry that is only read: unlike that of Triton, it makes no folder."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.cache_dir = str(SHIPPED / key)
