"""The worker's TLS certificate: requested here, signed by Vast, checked before it is used.

Clients trust only Vast's root certificate. With a self-signed certificate the worker can listen
but no client accepts it, so that is reported as an error until Vast has signed one.
"""

import ipaddress
import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

_TIMEOUT_S = 30.0
_ATTEMPTS = 3
_MARGIN = timedelta(days=1)
_SELF_SIGNED_LIFE = timedelta(days=365)
_PLACEHOLDER = x509.IPAddress(ipaddress.ip_address("0.0.0.0"))
"""The address in a certificate request. Vast replaces it with the machine's public address."""
_SUBJECT = x509.Name(
    [
        x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
        x509.NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "CA"),
        x509.NameAttribute(NameOID.COMMON_NAME, "pyworker.vast.ai"),
    ]
)

logger = logging.getLogger(__name__)


class NotSigned(Exception):
    """Vast did not sign the certificate, or answered with something else."""


class CertificateFiles:
    """Key and certificate, in the files where Vast's own tools keep them. Those tools may have
    made them.
    """

    def __init__(self, directory: Path) -> None:
        self.key = directory / "instance.key"
        self.certificate = directory / "instance.crt"
        self._request = directory / "instance.csr"

    def is_usable(self) -> bool:
        """Whether there is a certificate for the key, not self-signed and valid for another day."""
        key, certificate = self._read_key(), self._read_certificate()
        if key is None or certificate is None or not _fits(certificate, key):
            return False
        now = datetime.now(UTC)
        valid = certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc - _MARGIN
        return valid and certificate.issuer != certificate.subject

    def make_request(self) -> bytes:
        """Write and return a certificate signing request (PEM). Makes a key if there is none."""
        key = self._read_key()
        if key is None:
            key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            _write_private(self.key, pem)
        request = _signing_request(key)
        self._request.write_bytes(request)
        return request

    def install(self, pem: bytes) -> None:
        """Install a certificate. Raises NotSigned and changes nothing if `pem` is not a certificate
        for the key.
        """
        key = self._read_key()
        try:
            certificate = x509.load_pem_x509_certificates(pem)[0]
        except (ValueError, IndexError):
            raise NotSigned("the answer is not a certificate") from None
        if key is None or not _fits(certificate, key):
            raise NotSigned("the certificate is for another key")
        self._replace_certificate(pem)

    def self_sign(self) -> None:
        """Install a self-signed certificate, so that the server can listen."""
        key = self._read_key()
        assert key is not None
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_SUBJECT)
            .issuer_name(_SUBJECT)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + _SELF_SIGNED_LIFE)
            .add_extension(x509.SubjectAlternativeName([_PLACEHOLDER]), critical=False)
            .sign(key, hashes.SHA256())
        )
        self._replace_certificate(certificate.public_bytes(Encoding.PEM))

    def _replace_certificate(self, pem: bytes) -> None:
        part = self.certificate.with_suffix(".part")
        part.write_bytes(pem)
        part.replace(self.certificate)

    def _read_key(self) -> rsa.RSAPrivateKey | None:
        try:
            key = load_pem_private_key(self.key.read_bytes(), password=None)
        except (OSError, ValueError, TypeError):
            return None
        return key if isinstance(key, rsa.RSAPrivateKey) else None

    def _read_certificate(self) -> x509.Certificate | None:
        try:
            return x509.load_pem_x509_certificate(self.certificate.read_bytes())
        except (OSError, ValueError):
            return None


async def obtain_certificate(
    files: CertificateFiles, http: httpx2.AsyncClient, console_url: str, container_id: int
) -> None:
    """Have Vast sign a certificate, and install it. Raises NotSigned, OSError."""
    request = files.make_request()
    reason = ""
    for _ in range(_ATTEMPTS):
        try:
            answer = await http.post(
                f"{console_url}/api/v0/sign_cert/",
                params={"instance_id": container_id},
                content=request,
                headers={"content-type": "application/octet-stream"},
                timeout=_TIMEOUT_S,
            )
            answer.raise_for_status()
            files.install(answer.content)
        except (httpx2.HTTPError, httpx2.InvalidURL, NotSigned) as error:
            reason = str(error) if isinstance(error, NotSigned) else type(error).__name__
            logger.warning("no certificate from %s: %s", console_url, reason)
        else:
            return
    raise NotSigned(reason)


def _signing_request(key: rsa.RSAPrivateKey) -> bytes:
    """Return a signing request with the extensions that Vast's own tools ask for."""
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=True,
        key_encipherment=True,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_SUBJECT)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=False)
        .add_extension(usage, critical=False)
        .add_extension(x509.SubjectAlternativeName([_PLACEHOLDER]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def _fits(certificate: x509.Certificate, key: rsa.RSAPrivateKey) -> bool:
    """Whether the certificate is for this key."""

    def plain(public: object) -> bytes:
        assert isinstance(public, rsa.RSAPublicKey)
        return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    theirs = certificate.public_key()
    return isinstance(theirs, rsa.RSAPublicKey) and plain(theirs) == plain(key.public_key())


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
