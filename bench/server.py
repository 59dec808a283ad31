"""Compare the server's tokens per second with those of the model alone, and of transformers.

    python -m bench.server --concurrency 1,8,32 --rounds 5

For each concurrency, these run in turn, several times, in one run on one machine:

    server      the whole worker, in its own process, under the load generator
    raw         the packed forward of the same batch in a bare loop: no scheduler, no HTTP
    generate    transformers' own `generate` of the same batch
    continuous  transformers' own continuous batching of the same requests

All of them read prompts of the same length and generate the same number of tokens, with a copy
of the model that never ends a sequence. Ratios are medians over the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import transformers
import uvloop
from transformers import AutoModelForCausalLM

from bench.load import run_load
from bench.workload import LengthMix, LoadPlan
from engine.attention.interface import ATTENTION_NAME
from engine.attention.kv_cache import bind_kv_cache
from engine.attention.plan import FixedTables, StepSequences
from engine.core.config import BLOCK_SIZE, DEFAULT_MODEL_ID, LoadConfig
from engine.loading.checkpoint import locate
from engine.loading.loader import LoadedModel, load
from engine.loading.probe import use_attention


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch of `concurrency` prompts, each with `input_len` tokens and `output_len` new ones."""

    concurrency: int
    input_len: int
    output_len: int

    @property
    def num_tokens(self) -> int:
        return self.concurrency * self.output_len

    def prompts(self, seed: int) -> list[list[int]]:
        rng = Random(seed)
        return [
            [rng.randrange(1000, 20000) for _ in range(self.input_len)]
            for _ in range(self.concurrency)
        ]


@contextmanager
def endless_copy(model_id: str) -> Iterator[Path]:
    """Yield a folder with a copy of the model in which no token ends a sequence."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in locate(model_id).path.iterdir():
            (Path(scratch) / file.name).symlink_to(file)
        config = Path(scratch) / "generation_config.json"
        config.unlink(missing_ok=True)
        config.write_text(json.dumps({"eos_token_id": []}))
        yield Path(scratch)


@contextmanager
def serving(model: Path, *flags: str) -> Iterator[str]:
    """Run `python -m api` in its own process, and yield its address when it is ready."""
    command = [sys.executable, "-m", "api", "--model-id", str(model), "--port", "0"]
    with subprocess.Popen(
        [*command, "--hostname", "127.0.0.1", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            ready = next((line for line in process.stdout if line.startswith("Ready on ")), None)
            if ready is None:
                raise RuntimeError("the server ended before it was ready")
            yield "http://" + ready.removeprefix("Ready on ").split(". ")[0]
        finally:
            process.terminate()


def time_server(url: str, shape: Shape, seed: int) -> float:
    plan = LoadPlan(
        api="tgi",
        num_requests=shape.concurrency,
        concurrency=shape.concurrency,
        input_len=LengthMix.parse(str(shape.input_len)),
        output_len=LengthMix.parse(str(shape.output_len)),
        seed=seed,
    )
    result = uvloop.run(run_load(url, plan))
    assert result.summary.total_output_tokens == shape.num_tokens, result.summary
    return result.summary.duration_s


@torch.inference_mode()
def time_raw(loaded: LoadedModel, shape: Shape, seed: int) -> float:
    """Time the packed forward and an argmax, over a cache of exactly the right size."""
    model, batch = loaded.model, shape.concurrency
    num_blocks = -(-(shape.input_len + shape.output_len) // BLOCK_SIZE)
    use_attention(model, ATTENTION_NAME)
    context = bind_kv_cache(loaded.calls, batch * num_blocks, model.dtype, model.device, loaded.ops)
    tables = np.arange(batch * num_blocks).reshape(batch, num_blocks)
    attention = FixedTables(loaded.ops, loaded.calls, tables, model.device)
    ids = torch.tensor(shape.prompts(seed)).view(1, -1)
    started, computed = time.perf_counter(), 0
    for _ in range(shape.output_len):
        length = ids.shape[1] // batch
        step = StepSequences(np.arange(batch), np.full(batch, computed), np.full(batch, length))
        context.begin(attention.metadata(step))
        computed += length
        logits = model(
            input_ids=ids,
            position_ids=torch.from_numpy(step.positions)[None],
            use_cache=False,
            logits_to_keep=torch.arange(1, batch + 1) * length - 1,
        ).logits
        ids = logits.argmax(-1)
    return time.perf_counter() - started


@torch.inference_mode()
def time_generate(model: Any, shape: Shape, seed: int) -> float:
    """Time `generate` of a model as transformers loads it by default.

    `generate` comes from a mixin, hence the type.
    """
    ids = torch.tensor(shape.prompts(seed))
    started = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=shape.output_len,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - started


def time_continuous(model: Any, shape: Shape, seed: int) -> float:
    """Time continuous batching without its set-up: the clock starts at the first request."""
    # The default is 60 % of all memory; 10 % is ample for these shapes.
    config = transformers.ContinuousBatchingConfig(max_memory_percent=0.1, max_batch_tokens=512)
    options = transformers.GenerationConfig(
        max_new_tokens=shape.output_len, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    with model.continuous_batching_context_manager(
        generation_config=options, continuous_batching_config=config
    ) as manager:
        started = time.perf_counter()
        manager.add_requests(shape.prompts(seed), max_new_tokens=shape.output_len)
        num_finished = 0
        while num_finished < shape.concurrency:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert len(result.generated_tokens) == shape.output_len, result.error
                num_finished += 1
        return time.perf_counter() - started


def measure(contestants: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contestant in each round, after a round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for seed in range(rounds + 1):
        for name, run in contestants.items():
            elapsed = run(seed)
            if seed:
                seconds[name].append(elapsed)
    return seconds


def report(shape: Shape, seconds: dict[str, list[float]]) -> dict[str, object]:
    """Print and return each contestant's tokens per second and the server's ratio to it.

    All figures are medians over the rounds.
    """
    rates = {name: shape.num_tokens / statistics.median(s) for name, s in seconds.items()}
    ratios = {
        name: statistics.median(
            other / own for own, other in zip(seconds["server"], s, strict=True)
        )
        for name, s in seconds.items()
        if name != "server"
    }
    cells = [f"{name} {rate:.1f} tok/s" for name, rate in rates.items()]
    cells += [f"server/{name} {ratio:.2f}" for name, ratio in ratios.items()]
    print(f"concurrency {shape.concurrency}: " + ", ".join(cells), flush=True)
    return {"concurrency": shape.concurrency, "tokens_per_s": rates, "server_ratio": ratios}


def main() -> None:
    options = _parse_options()
    transformers.logging.set_verbosity_error()
    rows = []
    with endless_copy(options.model_id) as folder, serving(folder) as url:
        loaded = load(LoadConfig(str(folder)))
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for concurrency in map(int, options.concurrency.split(",")):
            shape = Shape(concurrency, options.input_len, options.output_len)
            contestants: dict[str, Callable[[int], float]] = {
                "server": partial(time_server, url, shape),
                "raw": partial(time_raw, loaded, shape),
                "generate": partial(time_generate, plain, shape),
                "continuous": partial(time_continuous, plain, shape),
            }
            rows.append(report(shape, measure(contestants, options.rounds)))
    if options.json:
        Path(options.json).write_text(json.dumps(_environment(options) | {"rows": rows}, indent=1))


def _environment(options: argparse.Namespace) -> dict[str, object]:
    return {
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "options": vars(options),
    }


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-id", default=DEFAULT_MODEL_ID)
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
