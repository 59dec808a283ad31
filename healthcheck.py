"""The image's HEALTHCHECK: exits with 0 if the server in this container is healthy, else with 1.

It requests /health from each server that may run here: a Vast worker (with or without TLS), a
plain server, and a server behind Vast's stock PyWorker. It runs every half a minute, so it imports
only the standard library and starts quickly.
"""

import os
import ssl
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

_TIMEOUT_S = 4
_PYWORKER_BACKEND_PORT = 5001

# The certificate is for the public address, so it cannot be verified at 127.0.0.1.
_UNVERIFIED = ssl._create_unverified_context()


def is_healthy() -> bool:
    return any(_answers(server) for server in _servers())


def _servers() -> Iterator[HTTPConnection]:
    # http.client is used because urllib would use a proxy from the environment.
    worker = int(os.environ.get("WORKER_PORT") or 3000)
    yield HTTPSConnection("127.0.0.1", worker, timeout=_TIMEOUT_S, context=_UNVERIFIED)
    yield HTTPConnection("127.0.0.1", worker, timeout=_TIMEOUT_S)
    plain = int(_port_flag() or os.environ.get("PORT") or 3000)
    for port in {plain, _PYWORKER_BACKEND_PORT} - {worker}:
        yield HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)


def _port_flag() -> str | None:
    """Return the --port flag of the container's first process. HEALTHCHECK sees the server's
    environment, but not its flags.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-p", "--port")
    command = Path("/proc/1/cmdline").read_bytes().decode(errors="replace").split("\0")
    return parser.parse_known_args(command)[0].port


def _answers(server: HTTPConnection) -> bool:
    """Whether /health is answered with 200."""
    try:
        server.request("GET", "/health")
        return server.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        server.close()


if __name__ == "__main__":
    sys.exit(not is_healthy())
