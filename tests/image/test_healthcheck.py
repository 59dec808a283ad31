"""The image's health check, against each kind of server."""

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

import healthcheck
from api.settings.vast_variables import PYWORKER_BACKEND
from tests.image.dockerfile import ROOT

CLOSED_PORT = 1  # nothing listens there


@contextmanager
def served(status: int, certificate: Path | None = None) -> Iterator[int]:
    """Serve /health with this status on loopback; yields the port."""

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
    """A self-signed certificate for another address."""
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


def exit_code(worker_port: int = CLOSED_PORT, port: int = CLOSED_PORT) -> int:
    """Run the health check, in an environment whose proxy it must ignore."""
    env = {"WORKER_PORT": f"{worker_port}", "PORT": f"{port}", "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, "-I", str(ROOT / "healthcheck.py")]
    return subprocess.run(command, env=env, timeout=30).returncode


def test_a_worker_with_tls_is_healthy(certificate: Path) -> None:
    with served(200, certificate) as port:
        assert exit_code(worker_port=port) == 0


def test_a_worker_without_tls_is_healthy() -> None:
    with served(200) as port:
        assert exit_code(worker_port=port) == 0


def test_a_plain_server_is_healthy() -> None:
    with served(200) as port:
        assert exit_code(port=port) == 0


def test_a_server_that_answers_503_is_unhealthy(certificate: Path) -> None:
    with served(503) as plain, served(503, certificate) as worker:
        assert exit_code(worker, plain) == 1


def test_no_server_at_all_is_unhealthy() -> None:
    assert exit_code() == 1


def test_the_port_behind_a_pyworker_is_that_of_the_settings() -> None:
    """The health check repeats the number, since it imports only the standard library."""
    assert PYWORKER_BACKEND[1] == healthcheck._PYWORKER_BACKEND_PORT
