"""`python -m precompile [MODEL_ID]` compiles Triton's kernels for GPUs that are not present.

They are written to TRITON_CACHE_DIR, by default to a folder beside the code, where a server on such
a GPU finds them (`kernels/compiled.py`).

With --config-only, MODEL_ID is a folder with a config.json and a tokenizer, whose weights may still
be downloading. A server starts that for its own GPU, with its own cache. What was done before is
not done again. It ends with the thread that started it.
"""

import ctypes
import hashlib
import multiprocessing
import os
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

from engine.core.config import DEFAULT_MODEL_ID

_ROOT = Path(__file__).parents[1]
_NICE = 10
"""The server itself goes first."""
_SET_PDEATHSIG = 1
"""PR_SET_PDEATHSIG of prctl(2): the signal to a process when the thread that started it ends."""


def main() -> None:
    parser = ArgumentParser("precompile", description=__doc__)
    parser.add_argument("model_id", nargs="?", default=DEFAULT_MODEL_ID)
    parser.add_argument("--targets", nargs="+", type=int)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-total-tokens", type=int)
    parser.add_argument("--config-only", action="store_true")
    args = parser.parse_args()
    if not args.config_only:
        # `kernels.compiled.SHIPPED`, which is not imported here since that takes a second.
        os.environ.setdefault("TRITON_CACHE_DIR", str(_ROOT / ".triton"))
        _compile(args)
        return
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    own = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    done = Path(own) / f"{_identity(args)}.done"
    if not done.exists():
        os.nice(_NICE)
        _compile(args)
        done.touch()


def _compile(args: Namespace) -> None:
    """Compile for all pairs of a GPU and a type."""
    from precompile.compile import compile_kernels
    from precompile.fake_driver import TARGETS, build_launcher

    if unknown := set(args.targets or ()) - TARGETS.keys():
        raise SystemExit(f"{unknown} are none of the GPUs {list(TARGETS)}")
    build_launcher()
    jobs = {
        f"sm_{target} {dtype}": partial(
            compile_kernels,
            args.model_id,
            dtype,
            TARGETS[target],
            args.max_total_tokens,
            args.config_only,
        )
        for target, dtype in product(args.targets or TARGETS, args.dtypes)
    }
    for name, seconds in _seconds(jobs):
        print(f"{name}: {seconds:.0f} s", flush=True)


def _seconds(jobs: Mapping[str, Callable[[], float]]) -> Iterator[tuple[str, float]]:
    """Do all jobs, and yield the seconds that each took.

    Each of several gets a process of its own, since kernels on the fake driver overwrite the
    model's weights with zeros. Processes are spawned: in a forked one torch's threads would be
    missing.
    """
    if len(jobs) == 1:
        yield from ((name, job()) for name, job in jobs.items())
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, max_tasks_per_child=1) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        for name, future in futures.items():
            yield name, future.result()


def _identity(args: Namespace) -> str:
    """Return a name for all that decides which kernels are compiled."""
    digest = hashlib.blake2b(repr(sorted(vars(args).items())).encode(), digest_size=12)
    for part in _parts(Path(args.model_id)):
        digest.update(part)
    return digest.hexdigest()


def _parts(folder: Path) -> Iterator[bytes]:
    yield (folder / "config.json").read_bytes()
    for package in ("torch", "triton", "transformers"):
        yield version(package).encode()
    for room in ("kernels", "engine", "precompile"):
        for path in sorted((_ROOT / room).rglob("*.py")):
            yield path.read_bytes()


if __name__ == "__main__":
    main()
