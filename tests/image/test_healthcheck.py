"""The image's health check, against servers of each kind."""

import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.image.dockerfile import ROOT

NOBODY = 1  # a port at which nothing answers


@contextmanager
def served(status: int, certificate: Path | None = None) -> Iterator[int]:
    """A server on loopback that answers so to /health; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """For some address that is not this one, signed by nobody that is known."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "203.0.113.7")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    ).sign(key, hashes.SHA256())
    path = tmp_path / "both.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


def healthcheck(worker_port: int = NOBODY, port: int = NOBODY) -> int:
    """Its exit code. A proxy of the environment is none of its business."""
    env = {"WORKER_PORT": f"{worker_port}", "PORT": f"{port}", "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, "-I", ROOT / "healthcheck.py"]
    return subprocess.run(command, env=env, timeout=30).returncode


def test_a_worker_behind_tls(certificate: Path) -> None:
    with served(200, certificate) as port:
        assert healthcheck(worker_port=port) == 0


def test_a_worker_without_tls() -> None:
    with served(200) as port:
        assert healthcheck(worker_port=port) == 0


def test_a_plain_server() -> None:
    with served(200) as port:
        assert healthcheck(port=port) == 0


def test_a_server_that_is_not_healthy(certificate: Path) -> None:
    with served(503) as plain, served(503, certificate) as worker:
        assert healthcheck(worker, plain) == 1


def test_nobody() -> None:
    assert healthcheck() == 1
