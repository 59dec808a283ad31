"""Run a server in this process, around an engine that is already loaded."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import LifespanType

from api.app import create_app
from api.generation.state import build_state
from api.settings.config import read_settings
from engine.async_engine import AsyncEngine
from engine.engine import Engine

_START_S = 30.0


@contextmanager
def serving_engine(engine: Engine, max_concurrent_requests: int) -> Iterator[str]:
    """Serve the engine, and yield the URL. The engine is closed with the server."""
    flags = {"--hostname": "127.0.0.1", "--max-concurrent-requests": str(max_concurrent_requests)}
    settings = read_settings([word for flag in flags.items() for word in flag])
    app = create_app(build_state(AsyncEngine(engine, max_concurrent_requests), settings))
    with running_server(app) as url:
        yield url


@contextmanager
def running_server(app: ASGIApp, lifespan: LifespanType = "on") -> Iterator[str]:
    """Run uvicorn with this application in a thread, and yield the URL."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan=lifespan,
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=5,
        )
    )
    thread = threading.Thread(target=server.run, name="bench-server", daemon=True)
    thread.start()
    try:
        _await_start(server, thread)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(_START_S)


def _await_start(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + _START_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the server does not start")
        time.sleep(0.01)
