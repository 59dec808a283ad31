"""A server in this process, around an engine that is loaded already."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from api.app import create_app
from api.config import read_settings
from api.state import build_state
from engine.async_engine import AsyncEngine
from engine.engine import Engine

_START_S = 30


@contextmanager
def serving_engine(engine: Engine) -> Iterator[str]:
    """The URL. The engine is closed with the server."""
    settings = read_settings(["--max-concurrent-requests", "1024"])
    state = build_state(AsyncEngine(engine, settings.max_concurrent_requests), settings)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(
        create_app(state), host="127.0.0.1", port=port, loop="uvloop", log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="bench-server", daemon=True)
    thread.start()
    deadline = time.monotonic() + _START_S
    while not server.started:
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(_START_S)
