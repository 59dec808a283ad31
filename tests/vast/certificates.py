"""A certificate authority that stands in for Vast's and signs the certificates of workers."""

import ipaddress
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

_LIFETIME = timedelta(days=2)
_WANTED_USAGES = {"content_commitment", "digital_signature", "key_encipherment"}
_USAGES = (
    *sorted(_WANTED_USAGES),
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
)


class RequestRefused(Exception):
    """The request differs from those of Vast's start script; the message names each difference."""


class Authority:
    """An authority whose root certificate is like Vast's: it has a path length and no keyCertSign,
    so clients with VERIFY_X509_STRICT reject it, as Python 3.13 does by default.
    """

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("Stand-in for Vast's root")
        self._root = (
            _builder(self._name, self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def root_pem(self) -> str:
        return self._root.public_bytes(Encoding.PEM).decode()

    def sign(self, request_pem: bytes, address: str) -> str:
        """Return a certificate for the request's key and for `address`. The names in the request
        are ignored, since nothing proves that they belong to it.
        """
        try:
            request = x509.load_pem_x509_csr(request_pem)
        except ValueError:
            raise RequestRefused("the body is no PEM certificate signing request") from None
        if reasons := faults_of(request):
            raise RequestRefused("; ".join(reasons))
        return self._certificate(request, address).public_bytes(Encoding.PEM).decode()

    def _certificate(
        self, request: x509.CertificateSigningRequest, address: str
    ) -> x509.Certificate:
        public_key = request.public_key()
        assert isinstance(public_key, rsa.RSAPublicKey)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        builder = _builder(request.subject, self._name, public_key)
        for extension in request.extensions:
            if not isinstance(extension.value, x509.SubjectAlternativeName):
                builder = builder.add_extension(extension.value, extension.critical)
        return builder.add_extension(names, critical=False).sign(self._key, hashes.SHA256())


def faults_of(request: x509.CertificateSigningRequest) -> list[str]:
    """Return the differences from a request of Vast's start script: RSA 2048, exponent 65537,
    SHA-256, not a CA, three key usages, and the address 0.0.0.0.
    """
    faults = []
    key = request.public_key()
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != 2048:
        faults.append("the key is not RSA of 2048 bits")
    elif key.public_numbers().e != 65537:
        faults.append("the public exponent is not 65537")
    if not request.is_signature_valid:
        faults.append("it is not signed by its own key")
    if not isinstance(request.signature_hash_algorithm, hashes.SHA256):
        faults.append("it is not signed over SHA-256")
    return [*faults, *_extension_faults(request.extensions)]


def _extension_faults(extensions: x509.Extensions) -> list[str]:
    found = {type(extension.value): extension.value for extension in extensions}
    faults = []
    match found.get(x509.BasicConstraints):
        case x509.BasicConstraints(ca=False):
            pass
        case _:
            faults.append("basicConstraints is not CA:FALSE")
    if _usages(found.get(x509.KeyUsage)) != _WANTED_USAGES:
        faults.append("keyUsage is not nonRepudiation, digitalSignature, keyEncipherment")
    names = found.get(x509.SubjectAlternativeName)
    if names != x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("0.0.0.0"))]):
        faults.append("subjectAltName is not the address 0.0.0.0")
    return faults


def _usages(usage: x509.ExtensionType | None) -> set[str]:
    return {name for name in _USAGES if usage is not None and getattr(usage, name)}


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + _LIFETIME)
    )
