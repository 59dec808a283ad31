"""A stand-in for the Hugging Face hub: one model, from a folder, over HTTP on this machine.

    with serving_hub(folder) as hub: ...  # HF_ENDPOINT=hub.url

It records which files were requested, can hold a file back, and can cut one off in the middle.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL_ID = "org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The state of the stand-in, which a test may change.

    held   files that are sent only once their event is set
    cut    files of which only this many bytes are sent, at the next request alone
    asked  each request for a file: its name and its Range header
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[str, threading.Event] = {}
        self.cut: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.url = ""

    def hold(self, name: str) -> None:
        self.held[name] = threading.Event()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if "/tree/" in path:
            self._send_json(self._tree())
            return
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.hub.names()]
            self._send_json({"id": MODEL_ID, "sha": COMMIT, "siblings": siblings})
            return
        found = re.fullmatch(rf"/{MODEL_ID}/resolve/[^/]+/(.+)", path)
        if found is None or found[1] not in self.hub.names():
            self._send(404, b"", {"x-error-code": "EntryNotFound"}, with_body)
            return
        self._send_file(found[1], with_body)

    def _tree(self) -> list[dict[str, object]]:
        files = [self.hub.folder / name for name in self.hub.names()]
        return [
            {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _digest(f)}
            for f in files
        ]

    def _send_file(self, name: str, with_body: bool) -> None:
        content = (self.hub.folder / name).read_bytes()
        headers = {
            "etag": f'"{_digest(self.hub.folder / name)}"',
            "x-repo-commit": COMMIT,
            "accept-ranges": "bytes",
        }
        wanted = self.headers.get("range")
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        if with_body:
            self.hub.asked.append((name, wanted))
            if name in self.hub.held:
                self.hub.held[name].wait(60)
        if wanted:
            headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if wanted else 200, content[start:], headers, with_body, name)

    def _send_json(self, body: object) -> None:
        self._send(200, json.dumps(body).encode(), {"content-type": "application/json"}, True)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        with_body: bool,
        name: str | None = None,
    ) -> None:
        self.send_response(status)
        for header, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if not with_body:
            return
        end = self.hub.cut.pop(name, None) if name else None
        self.wfile.write(content[:end])
        self.close_connection = end is not None

    def log_message(self, *_: object) -> None:
        """Log nothing: tests read `asked`."""


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving_hub(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
