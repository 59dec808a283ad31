"""The load generator: sends a workload to a server, and reports what `vllm bench serve` does.

    python -m bench.load --url http://127.0.0.1:8080 --api tgi --concurrency 16
    python -m bench.load --url http://127.0.0.1:8080 --vs http://127.0.0.1:8081 --rate 4

This module has the runs, the closed and the open loop, and the command line. `bench.workload`
makes the prompts; `bench.client` sends requests and reads responses.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import orjson
import uvloop

from bench.client import Client, LoadError, Request, Server
from bench.report import (
    RequestRecord,
    Summary,
    ratios,
    records_json,
    summarise,
    summary_json,
    summary_table,
    versus_table,
)
from bench.workload import APIS, LengthMix, LoadPlan, arrivals, make_prompts


@dataclass(frozen=True, slots=True)
class LoadResult:
    url: str
    plan: LoadPlan
    records: tuple[RequestRecord, ...]
    summary: Summary


async def run_load(url: str, plan: LoadPlan) -> LoadResult:
    """Put the load on the server. The result counts failed requests.

    Raises LoadError if the server cannot be reached, or a warm-up request fails.
    """
    client = Client(Server.parse(url), plan)
    warmups, requests = (client.prepare(prompts) for prompts in make_prompts(plan))
    try:
        await _warm_up(client, warmups, plan.concurrency or len(warmups))
        await client.open(plan.concurrency or 1)
        # The CPU time of this thread only: the caller may run the server in another thread.
        cpu_start_s, start_s = time.thread_time(), time.perf_counter()
        if plan.concurrency is not None:
            records = await _closed_loop(client, requests, plan.concurrency)
        else:
            records = await _open_loop(client, requests, arrivals(plan))
        duration_s = time.perf_counter() - start_s
        client_cpu_s = time.thread_time() - cpu_start_s
    finally:
        client.close()
    return LoadResult(url, plan, tuple(records), summarise(records, duration_s, client_cpu_s))


async def run_versus(
    url_a: str, url_b: str, plan: LoadPlan, num_rounds: int
) -> AsyncIterator[tuple[LoadResult, LoadResult]]:
    """Alternate between two servers, so that a drift of the machine affects both.

    Both servers get the same requests within a round, and new ones in the next round: prompts
    of an earlier round would come from the prefix cache.
    """
    for number in range(num_rounds):
        of_round = replace(plan, seed=plan.seed + number)
        yield await run_load(url_a, of_round), await run_load(url_b, of_round)


# The loops.


async def _warm_up(client: Client, requests: list[Request], concurrency: int) -> None:
    for record in await _closed_loop(client, requests, concurrency):
        if record.error is not None:
            raise LoadError(f"a warm-up request failed: {record.error}")


async def _closed_loop(
    client: Client, requests: list[Request], concurrency: int
) -> list[RequestRecord]:
    records: list[RequestRecord] = []
    remaining = iter(requests)

    async def slot() -> None:
        for request in remaining:
            records.append(await client.send(request))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(slot())
    return records


async def _open_loop(
    client: Client, requests: list[Request], send_times_s: Iterator[float]
) -> list[RequestRecord]:
    start_s = time.perf_counter()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for request, send_s in zip(requests, send_times_s, strict=True):
            wait_s = start_s + send_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(client.send(request)))
    return [task.result() for task in tasks]


# The command line.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return 0 if every request of every run succeeded, else 1."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        plan = _plan(options)
        for url in filter(None, (options.url, options.vs)):
            Server.parse(url)
    except ValueError as error:
        parser.error(str(error))
    try:
        results = uvloop.run(_versus(options, plan) if options.vs else _single(options, plan))
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    return int(any(result.summary.failed for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--url", required=True, help="server, as http://127.0.0.1:8080")
    add("--vs", "--url2", help="a second server, measured in turns with the first")
    add("--rounds", type=int, default=5, help="turns of each server, with --vs")
    add("--api", choices=APIS, default="tgi", help="the wire to speak")
    arrival = parser.add_mutually_exclusive_group(required=True)
    arrival.add_argument("--concurrency", type=int, help="closed loop: requests at once")
    arrival.add_argument("--rate", type=float, help="open loop: Poisson arrivals per second")
    add("--num-requests", type=int, default=100, help="requests measured")
    add("--input-len", default="128", help="128, 64:256 or 0.7*32:64+0.3*512")
    add("--output-len", default="128", help="written like --input-len; a model may stop earlier")
    add("--shared-prefix-len", type=int, default=0, help="words before each prompt")
    add("--shared-fraction", type=float, default=1.0, help="requests whose prefix is the same")
    add(
        "--seed", type=int, default=0, help="decides every random choice; change it for new prompts"
    )
    add("--warmup", type=int, default=0, help="requests before the clock starts")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--model", default="tgi", help="OpenAI's `model`; tgi is whatever is served")
    add("--timeout-s", type=float, default=600.0, help="for one request")
    add("--json", type=Path, help="write configuration, figures and raw times to this file")
    return parser


def _plan(options: argparse.Namespace) -> LoadPlan:
    if options.rounds < 1:
        raise ValueError("rounds must be 1 or more")
    values = {field.name: getattr(options, field.name) for field in fields(LoadPlan)}
    lengths = {name: LengthMix.parse(values[name]) for name in ("input_len", "output_len")}
    return LoadPlan(**values | lengths)


async def _single(options: argparse.Namespace, plan: LoadPlan) -> list[LoadResult]:
    result = await run_load(options.url, plan)
    print(summary_table(result.summary))
    _write_json(options.json, result_json(result))
    return [result]


async def _versus(options: argparse.Namespace, plan: LoadPlan) -> list[LoadResult]:
    pairs = []
    async for pair in run_versus(options.url, options.vs, plan, options.rounds):
        pairs.append(pair)
        print(f"round {len(pairs)} of {options.rounds} done", file=sys.stderr)
    rounds = [(a.summary, b.summary) for a, b in pairs]
    print(versus_table(options.url, options.vs, rounds))
    _write_json(
        options.json,
        {
            "rounds": [{"a": result_json(a), "b": result_json(b)} for a, b in pairs],
            "ratios": {name: asdict(ratio) for name, ratio in ratios(rounds).items()},
        },
    )
    return [result for pair in pairs for result in pair]


def result_json(result: LoadResult) -> dict[str, object]:
    """Return the configuration, figures and raw times, ready for a JSON writer."""
    lengths = {"input_len": result.plan.input_len.text, "output_len": result.plan.output_len.text}
    return {
        "url": result.url,
        "config": asdict(result.plan) | lengths,
        **summary_json(result.summary),
        **records_json(result.records),
    }


def _write_json(path: Path | None, content: dict[str, object]) -> None:
    if path is not None:
        path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    sys.exit(main())
