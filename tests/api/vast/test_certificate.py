"""The worker's key and certificate: what Vast is asked to sign, and what is accepted from it."""

import datetime
import ipaddress
import ssl
import stat
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from api.vast.certificate import CertificateFiles, NotSigned, obtain_certificate

ADDRESS = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("203.0.113.7"))])
ISSUER = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the platform's root")])
ISSUER_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
DAY = datetime.timedelta(days=1)


def signed(request: bytes, key: rsa.RSAPublicKey | None = None, days: int = 90) -> bytes:
    """Sign like Vast, with the worker's address instead of the one in the request."""
    asked = x509.load_pem_x509_csr(request)
    public = asked.public_key() if key is None else key
    assert isinstance(public, rsa.RSAPublicKey)
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(asked.subject)
        .issuer_name(ISSUER)
        .public_key(public)
        .serial_number(1)
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY * days)
        .add_extension(ADDRESS, critical=False)
        .sign(ISSUER_KEY, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


async def ask(
    files: CertificateFiles, answer: Callable[[httpx2.Request], httpx2.Response]
) -> list[httpx2.Request]:
    asked: list[httpx2.Request] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return answer(request)

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(handle)) as http:
        await obtain_certificate(files, http, "https://console.example", 4242)
    return asked


@pytest.fixture
def files(tmp_path: Path) -> CertificateFiles:
    return CertificateFiles(tmp_path)


@pytest.mark.anyio
async def test_the_signing_request_has_the_form_that_vast_expects(files: CertificateFiles) -> None:
    (request,) = await ask(files, lambda r: httpx2.Response(200, content=signed(r.content)))
    assert str(request.url) == "https://console.example/api/v0/sign_cert/?instance_id=4242"
    assert request.headers["content-type"] == "application/octet-stream"
    assert "authorization" not in request.headers
    asked = x509.load_pem_x509_csr(request.content)
    assert asked.is_signature_valid
    assert asked.subject.rfc4514_string() == "CN=pyworker.vast.ai,ST=CA,C=US"
    names = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("0.0.0.0")]
    usage = asked.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.content_commitment, usage.key_encipherment) == (
        True,
        True,
        True,
    )


@pytest.mark.anyio
async def test_a_certificate_that_vast_signed_serves_tls(files: CertificateFiles) -> None:
    assert not files.is_usable()
    await ask(files, lambda r: httpx2.Response(200, content=signed(r.content)))
    assert files.is_usable()
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
        files.certificate, files.key
    )


@pytest.mark.anyio
async def test_the_private_key_is_readable_by_its_owner_only_and_is_kept(
    files: CertificateFiles,
) -> None:
    await ask(files, lambda r: httpx2.Response(200, content=signed(r.content)))
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    key = files.key.read_bytes()
    await ask(files, lambda r: httpx2.Response(200, content=signed(r.content)))
    assert files.key.read_bytes() == key


@pytest.mark.anyio
@pytest.mark.parametrize(
    "answer",
    [
        lambda _: httpx2.Response(200, text="<html>an error page</html>"),
        lambda _: httpx2.Response(500),
        lambda r: httpx2.Response(200, content=signed(r.content, ISSUER_KEY.public_key())),
    ],
    ids=["no certificate", "an error", "one for another key"],
)
async def test_an_invalid_answer_is_retried_and_not_installed(
    files: CertificateFiles, answer: Callable[[httpx2.Request], httpx2.Response]
) -> None:
    asked = []

    def counted(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return answer(request)

    with pytest.raises(NotSigned):
        await ask(files, counted)
    assert len(asked) == 3
    assert not files.certificate.exists()


def test_a_self_signed_certificate_can_listen_but_is_not_usable(
    files: CertificateFiles,
) -> None:
    files.make_request()
    files.self_sign()
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
        files.certificate, files.key
    )
    assert not files.is_usable()


@pytest.mark.anyio
async def test_a_certificate_about_to_expire_is_not_usable(files: CertificateFiles) -> None:
    await ask(files, lambda r: httpx2.Response(200, content=signed(r.content, days=0)))
    assert not files.is_usable()


@pytest.mark.anyio
async def test_a_certificate_for_another_key_is_not_usable(files: CertificateFiles) -> None:
    await ask(files, lambda r: httpx2.Response(200, content=signed(r.content)))
    files.key.unlink()
    files.make_request()
    assert not files.is_usable()
