"""Starts workers as Vast does: Skiff itself, or Vast's stock worker in front of Skiff."""

import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from clients.server import MAX_TOTAL_TOKENS, PYTHON, ROOT, Server, command, started
from clients.vast.standin import StandIn

CONTAINER_ID, MASTER_TOKEN = "4242", "master-token"
STOCK = Path(__file__).parent / "stock_worker.py"


@dataclass
class Worker:
    """A running worker. `kind` is skiff or stock."""

    kind: str
    stand_in: StandIn
    url: str
    process: Server


def two_free_ports() -> int:
    """Return a free port whose successor is free too: Vast's stock worker uses both."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, ExitStack() as stack:
            port: int = first.getsockname()[1]
            try:
                stack.enter_context(socket.create_server(("127.0.0.1", port + 1)))
            except (OSError, OverflowError):
                continue
        return port


def environment(stand_in: StandIn, port: int, folder: Path, tls: bool) -> dict[str, str]:
    """Return the variables of Vast and its template, with the stand-in's addresses."""
    return {
        "CONTAINER_ID": CONTAINER_ID,
        "MASTER_TOKEN": MASTER_TOKEN,
        "PUBLIC_IPADDR": "127.0.0.1",
        "WORKER_PORT": str(port),
        f"VAST_TCP_PORT_{port}": str(port),
        "REPORT_ADDR": stand_in.url,
        "USE_SSL": "true" if tls else "false",
        "UNSECURED": "false",
        "VAST_CONSOLE_URL": stand_in.url,
        "TLS_DIRECTORY": str(folder),
        "BENCHMARK_CACHE": str(folder),
        "BENCHMARK_SECONDS": "8",
    }


@contextmanager
def skiff_worker(stand_in: StandIn, folder: Path, tls: bool = True) -> Iterator[Worker]:
    """Run Skiff as its image does, with only Vast's variables and lower limits."""
    port = two_free_ports()
    flags = ["--dtype", "float32", "--max-total-tokens", str(MAX_TOTAL_TOKENS)]
    variables = environment(stand_in, port, folder, tls)
    with started([str(PYTHON), "-m", "api", *flags], variables, ROOT) as process:
        stand_in.wait_until_ready(process)
        yield Worker("skiff", stand_in, f"http{'s' * tls}://127.0.0.1:{port}", process)
    process.check_clean_exit()


@contextmanager
def stock_worker(
    stand_in: StandIn, folder: Path, model_port: int, model_log: Path
) -> Iterator[Worker]:
    """Run Vast's stock worker in `folder`, since it stores its benchmark in the current folder.

    It runs without TLS, for which it would read the certificate in /etc.
    """
    port = two_free_ports()
    variables = environment(stand_in, port, folder, tls=False) | {
        "MODEL_SERVER_PORT": str(model_port),
        "MODEL_LOG": str(model_log),
    }
    with started([sys.executable, str(STOCK)], variables, folder) as process:
        stand_in.wait_until_ready(process)
        yield Worker("stock", stand_in, f"http://127.0.0.1:{port}", process)


@contextmanager
def model_by_its_output(model_log: Path) -> Iterator[int]:
    """Run Skiff as a plain Text Generation Inference server, with its output in the log file."""
    port = two_free_ports()
    starting = started(command("--json-output", port=str(port)), copy_to=model_log)
    with starting as model:
        yield port
    model.check_clean_exit()


@contextmanager
def model_behind_stock(stand_in: StandIn, folder: Path, model_log: Path) -> Iterator[int]:
    """Run Skiff on an instance whose template runs Vast's stock worker. Skiff must recognise that
    it is only the model server there.
    """
    port = two_free_ports()
    unused = two_free_ports()
    variables = environment(stand_in, unused, folder, tls=False) | {
        "BACKEND": "tgi",
        "MODEL_LOG": str(model_log),
    }
    with started(command(port=str(port)), variables) as model:
        yield port
    model.check_clean_exit()
