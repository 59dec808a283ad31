"""Workers as Vast starts them: Skiff itself, or Vast's own worker in front of Skiff."""

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
    kind: str
    """skiff or stock."""
    stand_in: StandIn
    url: str
    process: Server


def two_free_ports() -> int:
    """The first of them: Vast's worker takes the next one too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, ExitStack() as stack:
            port: int = first.getsockname()[1]
            try:
                stack.enter_context(socket.create_server(("127.0.0.1", port + 1)))
            except (OSError, OverflowError):
                continue
        return port


def environment(stand_in: StandIn, port: int, folder: Path, tls: bool) -> dict[str, str]:
    """What Vast sets, what its template sets, and what leads Skiff to the stand-in."""
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
    """Started as its image starts it, with nothing that Vast does not set but its limits."""
    port = two_free_ports()
    flags = ["--dtype", "float32", "--max-total-tokens", str(MAX_TOTAL_TOKENS)]
    variables = environment(stand_in, port, folder, tls)
    with started([str(PYTHON), "-m", "api", *flags], variables, ROOT) as process:
        stand_in.wait_until_ready(process)
        yield Worker("skiff", stand_in, f"http{'s' * tls}://127.0.0.1:{port}", process)
    process.check_it_left_in_good_order()


@contextmanager
def stock_worker(
    stand_in: StandIn, folder: Path, model_port: int, model_log: Path
) -> Iterator[Worker]:
    """It has no folder of its own: its cached benchmark is in the one that it is started in.

    Not with TLS, for which it reads /etc.
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
    """Skiff as any Text Generation Inference server, its output sent to the log file."""
    port = two_free_ports()
    starting = started(command("--json-output", port=str(port)), copy_to=model_log)
    with starting as model:
        yield port
    model.check_it_left_in_good_order()


@contextmanager
def model_behind_stock(stand_in: StandIn, folder: Path, model_log: Path) -> Iterator[int]:
    """Skiff on an instance whose template runs Vast's worker: it must see by itself that it is
    the model server here, and the worker is another.
    """
    port = two_free_ports()
    unused = two_free_ports()
    variables = environment(stand_in, unused, folder, tls=False) | {
        "BACKEND": "tgi",
        "MODEL_LOG": str(model_log),
    }
    with started(command(port=str(port)), variables) as model:
        yield port
    model.check_it_left_in_good_order()
