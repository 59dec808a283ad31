"""Whether the server in this container is healthy: exit code 0 if so, for HEALTHCHECK.

Asks /health of a worker (over TLS if it speaks TLS), of a plain server and of one behind Vast's own
worker, whichever is there.
Of the standard library alone, and quick to start: it runs every half a minute.
"""

import os
import ssl
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

_TIMEOUT_S = 4
_BEHIND_PYWORKER = 5001

# The certificate is for the address that clients use, not for this one.
_ANY_CERTIFICATE = ssl._create_unverified_context()


def is_healthy() -> bool:
    return any(_answers(server) for server in _servers())


def _servers() -> Iterator[HTTPConnection]:
    # Not urllib, which would ask a proxy of the environment.
    worker = int(os.environ.get("WORKER_PORT") or 3000)
    yield HTTPSConnection("127.0.0.1", worker, timeout=_TIMEOUT_S, context=_ANY_CERTIFICATE)
    yield HTTPConnection("127.0.0.1", worker, timeout=_TIMEOUT_S)
    plain = int(_port_flag() or os.environ.get("PORT") or 3000)
    for port in {plain, _BEHIND_PYWORKER} - {worker}:
        yield HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)


def _port_flag() -> str | None:
    """Of the container's first process: HEALTHCHECK sees the environment, but no flags."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-p", "--port")
    command = Path("/proc/1/cmdline").read_bytes().decode(errors="replace").split("\0")
    return parser.parse_known_args(command)[0].port


def _answers(server: HTTPConnection) -> bool:
    try:
        server.request("GET", "/health")
        return server.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        server.close()


if __name__ == "__main__":
    sys.exit(not is_healthy())
