"""Compare the GPU path with the limits of the GPU, and with transformers.

    python -m bench.gpu                         everything, within 8 minutes
    python -m bench.gpu --quick                 one model and fewer points, within 3 minutes
    python -m bench.gpu --only decode,prefill   some sections
    python -m bench.gpu --device cpu            tiny shapes, to test the run itself
    python -m bench.gpu --table                 write the tables in bench/README.md

The sections use models of real shapes with random weights, on one device, in one run:

    ceilings     memory bandwidth, rate of matrix products, cost of a launch (always measured)
    decode       decode steps as the engine runs them, and their bound: for each operation, the
                 longer of reading its data and doing its arithmetic, at the ceilings
    prefill      prefill steps, and their bound
    steady       the whole engine in steady decode, and how much of the time the device is idle
    first-token  time to the first token of a cached prompt
    offline      whole workloads, with the engine driven directly
    http         one of these workloads over HTTP, from a client in another process
    kernels      each kernel alone, at the first model's shapes
    peers        `generate` and continuous batching of transformers, on offline workloads
    models       decode and prefill steps of other models (all else uses the first model)
    cold-start   `python -m api` from the start of its process to its first token

If a section fails, the failure is recorded and the run goes on, in another process if the
device is lost. Sections that do not fit into the time are listed with the reason. The figures
are written after every section, to a new file: results/<date>-<device>.json. The end of the
output says which goals are met.
"""

import argparse
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.gpu import models
from bench.gpu.goals import goals_table
from bench.gpu.report import result_path, rewrite_table
from bench.gpu.run import DeviceLost, Run, new_figures
from bench.gpu.scales import (
    FULL,
    QUICK,
    TINY,
    Scale,
)
from bench.gpu.sections import SECTIONS, sections_of
from bench.gpu.supervisor import see_through

_HERE = Path(__file__).parents[1]
_DEVICE_LOST = 3
_OVERTIME_S = 30.0
"""How long the last section may go on after the scale's seconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return 0 if no section failed; a skipped section is not a failure."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    only = _names(parser, "--only", options.only, SECTIONS)
    if options.table:
        rewrite_table(_HERE / "README.md", options.out)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: there is no CUDA device; test the run with --device cpu", file=sys.stderr)
        return 1
    scale = TINY if options.device == "cpu" else QUICK if options.quick else FULL
    if options.models:
        first, *others = _names(parser, "--models", options.models, tuple(models.CONFIGS))
        scale = replace(scale, model=first, others=tuple(others))
    if options.resume:
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(1)
        )  # exit cleanly, to leave nothing behind
        return _go_on(resumed_run(options.resume, scale), set(only))
    run = new_run(torch.device(options.device), scale, options.out)
    run.write()
    if run.on_cuda:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the server's
        command = [sys.executable, "-m", "bench.gpu", *arguments, "--resume", str(run.path)]
        see_through(command, run.path, time.time() + scale.seconds + _OVERTIME_S)
        run.figures = json.loads(run.path.read_text())
    else:
        _go_on(run, set(only))
    print(_closing_report(run))
    return 1 if run.figures["errors"] else 0


def _go_on(run: Run, only: set[str]) -> int:
    """Measure the remaining sections. Return 0, or `_DEVICE_LOST` if a new process is needed."""
    with run.logged():
        try:
            run.measure(sections_of(run, only))
        except DeviceLost as error:
            print(f"the device is lost: {error}", flush=True)
            return _DEVICE_LOST
    return 0


def new_run(device: torch.device, scale: Scale, folder: Path) -> Run:
    figures = new_figures(device, scale)
    date = datetime.date.today().isoformat()
    path = result_path(folder, date, figures["device"], scale.name)
    return Run(device, _dtype(device), scale, path, figures)


def resumed_run(path: Path, scale: Scale) -> Run:
    figures = json.loads(path.read_text())
    device = torch.device("cpu" if figures["device"] == "cpu" else "cuda")
    return Run(device, _dtype(device), scale, path, figures)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _closing_report(run: Run) -> str:
    figures = run.figures
    lines = [f"figures in {run.path}"]
    lines += [f"not measured: {s['section']}: {s['reason']}" for s in figures["skipped"]]
    lines += [f"failed: {name}: {error}" for name, error in figures["errors"].items()]
    return "\n".join([*lines, "", goals_table(figures)])


def _names(
    parser: argparse.ArgumentParser, flag: str, text: str, known: tuple[str, ...]
) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            parser.error(f"{flag}: {name!r} is none of {', '.join(known)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one model, fewer points, within 3 minutes")
    add(
        "--only",
        default=",".join(SECTIONS),
        metavar="SECTION,...",
        help="measure only these sections",
    )
    add("--models", metavar="MODEL,...", help=f"some of {', '.join(models.CONFIGS)}")
    add("--out", type=Path, default=_HERE / "results", help="folder for the results")
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: tiny shapes, to test the run",
    )
    add("--resume", type=Path, metavar="FILE", help="continue an interrupted run")
    add("--table", action="store_true", help="only write the tables, from the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
