"""Run whole workloads, from the first prompt to the last token, by the engine and its peers.

Every measurement stops at its deadline, and then reports what was done by then.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.core.request import (
    Request,
    SamplingParams,
    StoppingParams,
    TokenOutput,
)
from engine.engine import Engine
from engine.step.graphs import sizes_for

_ROOT = Path(__file__).parents[2]
_GREEDY = SamplingParams()
_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests with these (tokens in, tokens out), all present from the start."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    sampling: SamplingParams = _GREEDY

    @property
    def num_output(self) -> int:
        return sum(num_out for _, num_out in self.lengths)

    @property
    def longest(self) -> int:
        return max(map(sum, self.lengths))

    def requests(self, vocab_size: int) -> list[Request]:
        rng = random.Random(f"{self.name} requests")
        return [
            Request(
                f"{self.name}-{i}",
                [rng.randrange(vocab_size) for _ in range(num_in)],
                self.sampling,
                StoppingParams(num_out, ignore_eos=True),
            )
            for i, (num_in, num_out) in enumerate(self.lengths)
        ]


def uniform(count: int, num_in: int, num_out: int) -> Workload:
    return Workload(f"{count} x {num_in} in, {num_out} out", ((num_in, num_out),) * count)


def mixed(count: int, longest: int) -> Workload:
    """Return nano-vllm's own benchmark, with the lengths of its seed 0, at temperature 0.6."""
    rng, shortest = random.Random(0), min(100, longest)
    nums_in = []
    for _ in range(count):
        nums_in.append(rng.randint(shortest, longest))
        for _ in range(nums_in[-1]):
            rng.randint(0, 10000)  # draw its tokens, as they affect the following lengths
    lengths = tuple((num_in, rng.randint(shortest, longest)) for num_in in nums_in)
    name = f"{count} x {shortest} to {longest} in and out"
    return Workload(name, lengths, SamplingParams(do_sample=True, temperature=0.6))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a workload; `finished` is False if the deadline came first."""

    output_tokens: int
    seconds: float
    finished: bool = True

    def figures(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_s": self.output_tokens / self.seconds}


# -- the engine ----------------------------------------------------------------------------


def warm(engine: Engine, sampling: SamplingParams, vocab_size: int) -> None:
    """Run steps of every size that has a graph, twice: the first one captures it."""
    count = engine.limits.max_sequences
    sizes = sizes_for(count)
    lengths = [(8, 2 * sum(size > i for size in sizes) + 1) for i in range(count)]
    offline(engine, Workload("warm-up", tuple(lengths), sampling).requests(vocab_size))


def offline(engine: Engine, requests: Sequence[Request], deadline: float = float("inf")) -> Outcome:
    """Run the requests by calling `Engine.step`; `deadline` is a `time.perf_counter` time."""
    for request in requests:
        engine.add(request)
    num_tokens, finished, started = 0, True, time.perf_counter()
    while engine.has_work:
        events = engine.step()
        num_tokens += sum(isinstance(event, TokenOutput) for _, event in events)
        if finished and time.perf_counter() > deadline:
            finished = False
            engine.fail_all("out of time")
    return Outcome(num_tokens, time.perf_counter() - started, finished)


def over_http(engine: Engine, workload: Workload, deadline: float) -> dict[str, Any]:
    """Stream all requests at once, from a client in its own process.

    Closes the engine. Raises RuntimeError if no request succeeds.
    """
    from bench.http_engine import serving_engine  # imports packages that the rest does not need

    (num_in, num_out), count = workload.lengths[0], len(workload.lengths)
    options = {"input-len": num_in, "output-len": num_out}
    options |= dict.fromkeys(("concurrency", "num-requests"), count)
    with serving_engine(engine, count) as url, tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "bench.load", "--url", url, "--json", str(report)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        timeout_s = max(deadline - time.perf_counter(), 1.0)
        client = subprocess.run(
            command, cwd=_ROOT, timeout=timeout_s, capture_output=True, text=True, check=False
        )
        if not report.exists():
            raise RuntimeError(f"the load generator failed: {client.stderr.strip()[-500:]}")
        figures = json.loads(report.read_bytes())
    if not figures["completed"]:
        errors = next((error for error in figures["errors"] if error), "no reason given")
        raise RuntimeError(f"no request succeeded: {errors}")
    outcome = Outcome(figures["total_output_tokens"], figures["duration"], not figures["failed"])
    latencies = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")
    return outcome.figures() | {name: figures[name] for name in latencies}


# -- transformers --------------------------------------------------------------------------


@torch.inference_mode()
def generate(model: Any, workload: Workload, deadline: float) -> Outcome:
    """Run `model.generate` on all requests as one batch; they must have equal lengths."""
    requests = workload.requests(model.config.vocab_size)
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([request.prompt_ids for request in requests], device=model.device)
    num_out = workload.lengths[0][1]
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    model.generate(ids, max_new_tokens=2, **options)
    started = time.perf_counter()
    max_time = max(deadline - started, 1.0)
    output = model.generate(ids, max_new_tokens=num_out, max_time=max_time, **options)
    num_tokens = (output.shape[1] - ids.shape[1]) * len(requests)  # waits for the device
    output.cpu()
    return Outcome(num_tokens, time.perf_counter() - started, num_tokens == workload.num_output)


def continuous(
    model: Any, workload: Workload, deadline: float, memory_share: float | None = None
) -> Outcome:
    """Run transformers' continuous batching, which is set up before the clock starts.

    It reports finished requests only, so requests that are cut short count nothing. Unless
    `memory_share` is given, it decides how much memory to use.
    """
    requests = workload.requests(model.config.vocab_size)
    num_out = workload.lengths[0][1]
    options = transformers.GenerationConfig(
        max_new_tokens=num_out, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    config = _batching_by_sdpa(model, memory_share)
    with model.continuous_batching_context_manager(
        generation_config=options, continuous_batching_config=config, block=False
    ) as manager:
        started = time.perf_counter()
        manager.add_requests([request.prompt_ids for request in requests], max_new_tokens=num_out)
        try:
            num_tokens = _collect(manager, len(requests), deadline)
            seconds = time.perf_counter() - started
        finally:  # otherwise leaving the context would wait for unfinished requests
            manager.stop(block=True, timeout=_STOP_S, hard_stop=True)
    return Outcome(num_tokens, seconds, num_tokens == workload.num_output)


def _batching_by_sdpa(model: Any, memory_share: float | None) -> Any:
    """Make a configuration that uses sdpa even where flash attention is installed.

    Up to version 5.17 the name of the attention decides, later an option.
    """
    options: dict[str, Any] = {"max_memory_percent": memory_share}
    if "auto_switch_to_flash" in transformers.ContinuousBatchingConfig.__dataclass_fields__:
        model.set_attn_implementation("sdpa")
        options["auto_switch_to_flash"] = False
    else:
        model.set_attn_implementation("paged|sdpa")
    return transformers.ContinuousBatchingConfig(**options)


def _collect(manager: Any, num_requests: int, deadline: float) -> int:
    """Return the number of tokens of the requests that ended by the deadline."""
    num_ended, num_tokens = 0, 0
    while num_ended < num_requests and time.perf_counter() < deadline:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(result.error)
            num_ended += 1
            num_tokens += len(result.generated_tokens)
        elif not manager.is_running():
            raise RuntimeError("its generation loop ended early")
    return num_tokens
