"""Says in one line why something failed, whatever library raised the error."""

import errno
import shutil
from pathlib import Path

_LONGEST = 300
_NO_SPACE = ("No space left on device", "Disk quota exceeded")
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "Cannot allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def reason(error: BaseException) -> str:
    """Return the error's message in one line, behind its type unless it is a sentence of words."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    if isinstance(error, OSError | ValueError) and " " in text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_out_of_space(error: BaseException) -> bool:
    """Whether a disk is full. Libraries raise errors of their own for it."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(t in str(error) for t in _NO_SPACE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is full, a device's or the host's. torch is not imported for its own type,
    and has none for the host's memory.
    """
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def out_of_memory(error: BaseException) -> str:
    """Return that a model does not fit, and what to do."""
    return (
        f"it does not fit in the device's memory ({reason(error)}): quantise it (--quantize "
        "bitsandbytes-nf4 takes a third), or take a device with more memory"
    )


def full_disk(folder: Path) -> str:
    """Return that there is no space left in the folder, and what to do."""
    present = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(present).free / 2**30
    return (
        f"no space left in {folder} ({free:.2f} GiB free): free some, or set HF_HOME to a folder "
        "with room"
    )
