"""Launches all that serving a model on an H100 launches, and prints for each kernel whether every
launch found it in the cache.

    python -m tests.precompile.finding FOLDER

This is a process of its own for the reasons of `tests.precompile.launching`.
"""

import json
import sys
from typing import Any

from triton import knobs

from precompile.compile import compile_kernels
from precompile.fake_driver import TARGETS


def main(folder: str) -> None:
    found: dict[str, bool] = {}

    def listen(src: Any, cache_hit: bool, **_: object) -> None:
        found[src.name] = found.get(src.name, True) and cache_hit

    knobs.compilation.listener = listen
    compile_kernels(folder, "bfloat16", TARGETS[90])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
