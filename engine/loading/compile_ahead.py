"""Has this GPU's kernels compiled in a process of its own, while the weights are loaded.

A kernel that was never compiled for a shape of model takes a second or more when it is first
launched, and there are dozens. Another process has another interpreter lock, can begin before
the weights are downloaded, and leaves what it compiles in Triton's cache. It needs the model's
config.json and tokenizer, and no GPU: see `python -m precompile`, of which this package knows the
command line alone.
"""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import torch
from transformers import AutoConfig

from engine.core.config import EngineConfig, LoadConfig
from engine.loading.quantization import quantization_of
from engine.loading.served_type import own_type, served_type

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[2]


def compile_ahead(config: LoadConfig, sizes: EngineConfig, folder: Path) -> None:
    """Start to compile the kernels for the model in `folder`, if it is to run on a GPU.

    Nothing depends on it: kernels that are missing are compiled when they are launched. Models that
    are quantised or have code of their own are left to that.
    """
    if (config.device or "cuda") != "cuda" or not torch.cuda.is_available():
        return
    if config.quantize is not None or config.trust_remote_code or config.rope is not None:
        return
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # the loader says what is wrong with it
        return
    if quantization_of(model_config) is not None:
        return
    major, minor = torch.cuda.get_device_capability()
    dtype = served_type(config.dtype, own_type(model_config), torch.device("cuda"))
    command = [sys.executable, "-m", "precompile", str(folder.resolve()), "--config-only"]
    command += ["--targets", f"{major}{minor}", "--dtypes", str(dtype).removeprefix("torch.")]
    if sizes.max_total_tokens is not None:
        command += ["--max-total-tokens", str(sizes.max_total_tokens)]
    start_command(command)


def start_command(command: list[str]) -> threading.Thread:
    """Start a command, which must not outlive the thread that starts it. Return that thread, which
    waits for the command and logs how it ended.
    """
    waiting = threading.Thread(target=_run, args=(command,), name="skiff-compile", daemon=True)
    waiting.start()
    return waiting


def _run(command: list[str]) -> None:
    try:
        process = subprocess.run(
            command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        logger.info("kernels are compiled when they are first launched, not ahead: %s", error)
        return
    end = process.stdout.strip().splitlines()[-1:] or [""]
    if process.returncode == 0:
        logger.info("kernels are compiled: %s", end[0] or "they were before")
    else:
        logger.info("kernels are compiled when they are first launched, not ahead: %s", end[0])
