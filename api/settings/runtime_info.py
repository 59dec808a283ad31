"""Installed versions and hardware, printed by `--env` for bug reports."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "bitsandbytes", "fastapi", "uvicorn")


def runtime_info() -> str:
    """Return several lines, laid out as TGI's."""
    return "\n".join(
        [
            "Runtime environment:",
            f"Target: {platform.machine()}-{platform.system().lower()}",
            f"Platform: {platform.platform()}",
            f"Python version: {platform.python_version()}",
            *(f"{package} version: {_version_of(package)}" for package in _PACKAGES),
            f"nvidia-smi:\n   {_nvidia_smi()}",
        ]
    )


def _version_of(package: str) -> str:
    """Return a package's version without importing it, which can take seconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "N/A"


def _nvidia_smi() -> str:
    try:
        found = subprocess.run(
            ["nvidia-smi"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "N/A"
    return found.stdout.strip().replace("\n", "\n   ") or "N/A"
