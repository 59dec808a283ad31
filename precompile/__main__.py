"""`python -m precompile [MODEL_ID]` compiles Triton's kernels for GPUs that are not present.

They are written to TRITON_CACHE_DIR, by default to a folder beside the code (`kernels/compiled.py`),
where a server on such a GPU finds them.
"""

import multiprocessing
import os
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from itertools import product

from engine.core.config import DEFAULT_MODEL_ID
from kernels.compiled import SHIPPED
from precompile.compile import compile_kernels
from precompile.fake_driver import TARGETS, build_launcher


def main() -> None:
    parser = ArgumentParser("precompile", description=__doc__)
    parser.add_argument("model_id", nargs="?", default=DEFAULT_MODEL_ID)
    parser.add_argument("--targets", nargs="+", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-total-tokens", type=int)
    args = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(SHIPPED))
    build_launcher()
    # Each pair gets a process of its own, since kernels on the fake driver overwrite the model's
    # weights with zeros. Processes are spawned: in a forked one torch's threads would be missing.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, max_tasks_per_child=1) as pool:
        pairs = list(product(args.targets, args.dtypes))
        futures = [
            pool.submit(
                compile_kernels, args.model_id, dtype, TARGETS[target], args.max_total_tokens
            )
            for target, dtype in pairs
        ]
        for (target, dtype), future in zip(pairs, futures, strict=True):
            print(f"sm_{target} {dtype}: {future.result():.0f} s", flush=True)


if __name__ == "__main__":
    main()
