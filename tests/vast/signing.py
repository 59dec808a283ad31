"""The autoscaler's signatures, in the form of each generation of the protocol."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

SIGNED_FIELDS = {
    "A": ("cost", "endpoint", "reqnum", "url"),
    "B": ("cost", "endpoint", "reqnum", "request_idx", "url"),
    "C1": ("url",),
    "C2": ("url",),
}
"""Signed fields by form. C1 and C2 differ only in what workers send to /delete_requests/."""


def canonical_message(form: str, fields: Mapping[str, Any]) -> str:
    """Return the signed JSON text. Values keep their JSON type: 256 is not 256.0."""
    return json.dumps({name: fields[name] for name in SIGNED_FIELDS[form]}, indent=4)


def new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


class Signer:
    """Signs with RSA PKCS#1 v1.5 over SHA-256, which is deterministic."""

    def __init__(self, key: rsa.RSAPrivateKey | None = None) -> None:
        self._key = key or new_key()

    def sign(self, form: str, fields: Mapping[str, Any]) -> str:
        message = canonical_message(form, fields).encode()
        signature = self._key.sign(message, padding.PKCS1v15(), hashes.SHA256())
        return base64.b64encode(signature).decode()

    def public_pem(self) -> str:
        spki = serialization.PublicFormat.SubjectPublicKeyInfo
        return self._key.public_key().public_bytes(serialization.Encoding.PEM, spki).decode()
