"""`python -m precompile [MODEL_ID]`: fill TRITON_CACHE_DIR for GPUs that are not there."""

import multiprocessing
import os
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from itertools import product

from engine.core.config import DEFAULT_MODEL_ID
from precompile.compile import play
from precompile.fake_driver import TARGETS, build_launcher


def main() -> None:
    parser = ArgumentParser("precompile", description=__doc__)
    parser.add_argument("model_id", nargs="?", default=DEFAULT_MODEL_ID)
    parser.add_argument("--targets", nargs="+", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-total-tokens", type=int)
    asked = parser.parse_args()
    build_launcher()
    # Apart, since a model that was played with has no weights any more; and not forked, since
    # torch's threads would not come along.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, max_tasks_per_child=1) as pool:
        pairs = list(product(asked.targets, asked.dtypes))
        futures = [
            pool.submit(play, asked.model_id, dtype, TARGETS[target], asked.max_total_tokens)
            for target, dtype in pairs
        ]
        for (target, dtype), future in zip(pairs, futures, strict=True):
            print(f"sm_{target} {dtype}: {future.result():.0f} s", flush=True)


if __name__ == "__main__":
    main()
