"""Certificate signing requests, by default like those of Vast's start script."""

import ipaddress
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@cache
def rsa_key(exponent: int = 65537, bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(exponent, bits)


def signing_request(
    key: Key | None = None,
    hash_algorithm: Any = None,
    ca: bool | None = False,
    non_repudiation: bool = True,
    address: str | None = "0.0.0.0",
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pyworker.vast.ai")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=False)
    builder = builder.add_extension(_usage(non_repudiation), critical=False)
    if address is not None:
        names = [x509.IPAddress(ipaddress.ip_address(address))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    signed = builder.sign(key or rsa_key(), hash_algorithm or hashes.SHA256())
    return signed.public_bytes(Encoding.PEM)


def _usage(non_repudiation: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=non_repudiation,
        key_encipherment=True,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
