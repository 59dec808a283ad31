"""The stand-in's certificates are accepted and rejected where Vast's would be."""

import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.vast.certificates import Authority, RequestRefused
from tests.vast.signing_requests import rsa_key, signing_request


def server_context(folder: Path, certificate_pem: str) -> ssl.SSLContext:
    key = rsa_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "instance.crt").write_text(certificate_pem)
    (folder / "instance.key").write_bytes(key)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "instance.crt", folder / "instance.key")
    return context


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, address: str) -> None:
    """Perform a TLS handshake in memory. Raises the client's verification error."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=address)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for end in (ours, theirs):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def client(authority: Authority) -> ssl.SSLContext:
    """A client context like that of the vastai client."""
    context = ssl.create_default_context()
    context.load_verify_locations(cadata=authority.root_pem())
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def test_a_client_with_the_root_trusts_the_address_and_no_other(
    authority: Authority, client: ssl.SSLContext, tmp_path: Path
) -> None:
    server = server_context(tmp_path, authority.sign(signing_request(), "127.0.0.1"))
    shake_hands(server, client, "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        shake_hands(server, client, "127.0.0.2")


def test_a_strict_client_refuses_the_root_as_it_refuses_vasts(
    authority: Authority, client: ssl.SSLContext, tmp_path: Path
) -> None:
    server = server_context(tmp_path, authority.sign(signing_request(), "127.0.0.1"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client, "127.0.0.1")


def test_a_client_without_the_root_refuses(authority: Authority, tmp_path: Path) -> None:
    server = server_context(tmp_path, authority.sign(signing_request(), "127.0.0.1"))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, ssl.create_default_context(), "127.0.0.1")


UNLIKE_VASTS: list[tuple[dict[str, Any], str]] = [
    ({"key": ec.generate_private_key(ec.SECP256R1())}, "not RSA of 2048 bits"),
    ({"key": rsa_key(bits=3072)}, "not RSA of 2048 bits"),
    ({"key": rsa_key(exponent=3)}, "exponent is not 65537"),
    ({"hash_algorithm": hashes.SHA512()}, "not signed over SHA-256"),
    ({"ca": True}, "CA:FALSE"),
    ({"ca": None}, "CA:FALSE"),
    ({"non_repudiation": False}, "keyUsage is not"),
    ({"address": "127.0.0.1"}, "subjectAltName is not"),
    ({"address": None}, "subjectAltName is not"),
]


@pytest.mark.parametrize(("unlike", "told"), UNLIKE_VASTS, ids=[told for _, told in UNLIKE_VASTS])
def test_a_request_unlike_the_start_scripts_is_refused_with_the_reason(
    authority: Authority, unlike: dict[str, Any], told: str
) -> None:
    with pytest.raises(RequestRefused, match=told):
        authority.sign(signing_request(**unlike), "127.0.0.1")


def test_a_body_that_is_no_request_is_refused(authority: Authority) -> None:
    with pytest.raises(RequestRefused, match="no PEM certificate signing request"):
        authority.sign(b"<html>", "127.0.0.1")
