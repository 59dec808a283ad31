"""Connections over real sockets, with and without TLS: what each may keep the server waiting for,
and what the server sends before it closes one.
"""

import asyncio
import datetime
import logging
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from api import server as server_module
from api.http.connections import Connections, Patience, Phase
from api.server import Server, server_config
from tests.api.client import until

pytestmark = pytest.mark.anyio

HURRIED = Patience(
    handshake_s=0.4,
    idle_s=1.0,
    head_s=0.4,
    body_s=0.4,
    unread_s=0.4,
    dropped_s=0.4,
    closing_s=0.4,
    least_rate=500,
)
BUSY_S = 2.5
"""Longer than any patience, and than two rounds in which the server looks for the overdue."""


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the length of the body. /early does not read it, /long answers 40 MB."""
    request = Request(scope, receive)
    match scope["path"]:
        case "/slow":
            await asyncio.sleep(BUSY_S)
        case "/long":
            pieces = (b"x" * 400_000 for _ in range(100))
            await StreamingResponse(_each(pieces))(scope, receive, send)
            return
        case "/early":
            await PlainTextResponse("too long", 413)(scope, receive, send)
            return
    await PlainTextResponse(str(len(await request.body())))(scope, receive, send)


async def _each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def certificate(folder: Path) -> tuple[Path, Path]:
    """Write a key and a certificate that it signed itself, and return their paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    (folder / "key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    (folder / "certificate").write_bytes(signed.public_bytes(pem))
    return folder / "key", folder / "certificate"


class Served:
    """A running server, and the way to open connections to it."""

    def __init__(self, server: Server, context: ssl.SSLContext | None) -> None:
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.connections: Connections = server._connections
        self._context = context

    @property
    def num_working(self) -> int:
        return len(self.connections._in_phase[Phase.ANSWER])

    async def open(self, sent: bytes = b"") -> "Client":
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, ssl=self._context))
        client.writer.write(sent)
        return client

    async def open_raw(self) -> "Client":
        """Open a connection that never begins the handshake."""
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def rest(self) -> bytes:
        """Return what the server sends until it closes the connection."""
        try:
            return await asyncio.wait_for(self.reader.read(), 10)
        except ConnectionError:
            return b"(reset)"

    async def answer(self) -> bytes:
        """Return the next answer's status line and body."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head.partition(b"\r\n")[0] + b" " + await self.reader.readexactly(length)

    async def is_open(self, path: str = "/") -> bool:
        self.writer.write(get(path))
        return (await self.answer()).endswith(b" 0")


def get(path: str = "/", headers: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n".encode()


def post(path: str, length: int, headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n{headers}\r\n"
    return head.encode()


@asynccontextmanager
async def serving(
    monkeypatch: pytest.MonkeyPatch, limit: int = 100, patience: Patience = HURRIED, **options: Any
) -> AsyncIterator[Served]:
    monkeypatch.setattr(server_module, "PATIENCE", patience)
    monkeypatch.setattr(server_module, "connection_limit", lambda: limit)
    server = Server(server_config(app, "127.0.0.1", 0, 1, lifespan="off", **options))
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started or task.done())
    context = None
    if options:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        yield Served(server, context)
    finally:
        server.should_exit = True
        await task


@pytest.fixture(params=["plain", pytest.param("tls", marks=pytest.mark.slow)])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The options of a server with TLS, or none."""
    if request.param == "plain":
        return {}
    key, signed = certificate(tmp_path)
    return {"ssl_keyfile": str(key), "ssl_certfile": str(signed)}


# -- clients that take too long ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"\r\n", b""),
        (b"GET / HTTP/1.1\r\nhost: x\r\nsome-he", b"HTTP/1.1 408 Request Timeout"),
        (post("/", 10) + b"abc", b"HTTP/1.1 408 Request Timeout"),
        (post("/early", 10) + b"abc", b"HTTP/1.1 413"),
    ],
    ids=["nothing", "empty line", "half a head", "half a body", "half a body, answered"],
)
async def test_a_client_that_stops_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, tls: dict[str, Any], sent: bytes, answered: bytes
) -> None:
    async with serving(monkeypatch, **tls) as served:
        client = await served.open(sent)
        assert (await client.rest()).startswith(answered)
        await until(lambda: len(served.connections) == 0)


@pytest.mark.slow
@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\nhost: x\r\nx: ", post("/", 100_000)])
async def test_a_client_that_sends_a_byte_at_a_time_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, tls: dict[str, Any], head: bytes
) -> None:
    async with serving(monkeypatch, **tls) as served:
        client = await served.open(head)
        answer = asyncio.create_task(client.answer())
        while not answer.done():
            client.writer.write(b"x")
            await asyncio.sleep(0.05)
        assert answer.result().startswith(b"HTTP/1.1 408 Request Timeout")
        await until(lambda: len(served.connections) == 0)


@pytest.mark.slow
async def test_a_body_may_take_long_if_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, tls: dict[str, Any]
) -> None:
    async with serving(monkeypatch, **tls) as served:
        client = await served.open(post("/", 25_000))
        for _ in range(25):
            client.writer.write(b"x" * 1000)
            await asyncio.sleep(0.1)
        assert await client.answer() == b"HTTP/1.1 200 OK 25000"


@pytest.mark.slow
async def test_an_answer_may_take_long(
    monkeypatch: pytest.MonkeyPatch, tls: dict[str, Any]
) -> None:
    async with serving(monkeypatch, **tls) as served:
        client = await served.open(get("/slow"))
        assert await client.is_open()
        assert await client.answer() == b"HTTP/1.1 200 OK 0"


async def test_a_client_that_does_not_read_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, tls: dict[str, Any]
) -> None:
    async with serving(monkeypatch, **tls) as served:
        client = await served.open(get("/long"))
        await until(lambda: len(served.connections) == 1)
        await until(lambda: len(served.connections) == 0)
        assert len(await client.rest()) < 39_000_000


async def test_a_client_may_read_an_answer_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as served:
        client = await served.open(get("/long", "connection: close\r\n"))
        size = 0
        while piece := await client.reader.read(1_000_000):
            size += len(piece)
            await asyncio.sleep(0.003)
        assert size > 40_000_000


async def test_a_handshake_that_is_not_finished_is_broken_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, signed = certificate(tmp_path)
    options: dict[str, Any] = {"ssl_keyfile": str(key), "ssl_certfile": str(signed)}
    async with serving(monkeypatch, **options) as served:
        clients = [await served.open_raw() for _ in range(3)]
        clients[1].writer.write(b"\x16\x03")
        clients[2].writer.write(b"GET / HTTP/1.1\r\n\r\n")
        for client in clients:
            assert b"HTTP" not in await client.rest()
        await until(lambda: len(served.connections) == 0)
        assert await (await served.open()).is_open()


# -- too many of them ---------------------------------------------------------------


@pytest.mark.slow
async def test_the_connection_that_is_idle_longest_is_closed_first(
    monkeypatch: pytest.MonkeyPatch, tls: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(monkeypatch, 5, Patience(), **tls) as served:
        clients = [await served.open() for _ in range(5)]
        await until(lambda: len(served.connections) == 5)
        assert await clients[0].is_open()  # so that the second is idle longest
        working = await served.open(get("/slow"))
        clients += [await served.open() for _ in range(3)]
        for closed in clients[1:5]:
            assert await closed.rest() == b""
        assert await clients[0].is_open()
        assert await working.answer() == b"HTTP/1.1 200 OK 0"
        assert len(served.connections) == 5
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "connections are open" in line] == [
        "5 connections are open, which is the limit: for each new one, the one that has been idle "
        "longest is closed"
    ]


async def test_an_unfinished_handshake_gives_way_to_a_new_connection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, signed = certificate(tmp_path)
    options: dict[str, Any] = {"ssl_keyfile": str(key), "ssl_certfile": str(signed)}
    async with serving(monkeypatch, 5, Patience(), **options) as served:
        stuck = [await served.open_raw() for _ in range(20)]
        finished = await served.open()
        assert await finished.is_open()
        for client in stuck[:15]:
            assert await client.rest() in (b"", b"(reset)")
        assert len(served.connections) == 5


@pytest.mark.slow
async def test_gets_are_answered_when_every_connection_is_at_work(
    monkeypatch: pytest.MonkeyPatch, tls: dict[str, Any]
) -> None:
    async with serving(monkeypatch, 3, Patience(), **tls) as served:
        working = []
        for num_before in range(5):
            working.append(await served.open(get("/slow")))
            await until(lambda: served.num_working > num_before)  # noqa: B023
        late = await served.open()
        assert await late.is_open()
        refused = await served.open(post("/", 0))
        assert await refused.answer() == (
            b"HTTP/1.1 503 Service Unavailable Too many connections are open."
        )
        for client in working:
            assert await client.answer() == b"HTTP/1.1 200 OK 0"


# -- requests that are too large ------------------------------------------------------


@pytest.mark.parametrize("headers", ["", "connection: close\r\n"])
async def test_a_client_that_still_sends_reads_the_answer(
    monkeypatch: pytest.MonkeyPatch, tls: dict[str, Any], headers: str
) -> None:
    async with serving(monkeypatch, patience=Patience(), **tls) as served:
        client = await served.open(post("/early", 40_000_000, headers))
        for _ in range(40):
            client.writer.write(b"x" * 1_000_000)
            await asyncio.wait_for(client.writer.drain(), 5)
        answer = await client.answer()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert answer.endswith(b" too long")
        if not headers:
            assert await client.is_open()


async def test_the_rest_of_an_answered_body_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, patience=Patience()) as served:
        client = await served.open(post("/early", 1 << 40))
        await until(lambda: len(served.connections) == 1)
        for _ in range(1000):
            client.writer.write(b"x" * 1_000_000)
            await asyncio.sleep(0)
            if not len(served.connections):
                break
        assert not len(served.connections)


@pytest.mark.parametrize(
    "headers",
    [
        "".join(f"x-{n}: y\r\n" for n in range(10_000)),
        "".join(f"x-{n}: y\r\n" for n in range(101)),
        "x: " + "y" * 1_000_000 + "\r\n",
        "y" * 1_000_000 + ": x\r\n",
        "".join(f"x-{n}: {'y' * 10_000}\r\n" for n in range(90)),
    ],
    ids=["10,000 headers", "101 headers", "a long value", "a long name", "1 MB of headers"],
)
async def test_too_many_or_too_long_headers_are_refused(
    monkeypatch: pytest.MonkeyPatch, tls: dict[str, Any], headers: str
) -> None:
    async with serving(monkeypatch, **tls) as served:
        client = await served.open(get("/", headers))
        assert await client.answer() == (
            b"HTTP/1.1 431 Request Header Fields Too Large The headers are too large."
        )
        await client.rest()
        await until(lambda: len(served.connections) == 0)


async def test_many_long_headers_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as served:
        headers = "".join(f"x-{n}: {'y' * 500}\r\n" for n in range(99))
        client = await served.open(get("/", headers) * 3)
        for _ in range(3):
            assert await client.answer() == b"HTTP/1.1 200 OK 0"


async def test_requests_that_follow_in_one_piece_are_answered_in_order(
    monkeypatch: pytest.MonkeyPatch, tls: dict[str, Any]
) -> None:
    bodies = [b"x" * size for size in (0, 5, 200_000, 1)]
    async with serving(monkeypatch, **tls) as served:
        client = await served.open(b"".join(post("/", len(body)) + body for body in bodies))
        for body in bodies:
            assert await client.answer() == b"HTTP/1.1 200 OK %d" % len(body)
        assert await client.is_open()


async def test_what_is_not_http_is_refused_without_a_log_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(monkeypatch) as served:
        client = await served.open(b"\x00\x01 not http\r\n\r\n")
        assert (await client.answer()).startswith(b"HTTP/1.1 400 Bad Request")
        await client.rest()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
