"""Verification of the autoscaler's signature over an envelope's `auth_data`.

The signature is RSA PKCS#1 v1.5 with SHA-256 over a JSON text of some fields of `auth_data`. Which
fields are signed has changed between generations of the protocol, so a signature is compared with
each form in turn. The digest is recovered from the signature once, with the public key, so trying
all forms costs no more than one verification.
"""

import base64
import hashlib
import json
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256

logger = logging.getLogger(__name__)

_HISTORY = 100
"""How many accepted messages are remembered, and how far a request number may lag behind."""


@dataclass(frozen=True, slots=True)
class Form:
    """The fields that one generation of the protocol signs. A form that signs the request number
    allows each request once.
    """

    generation: str
    fields: tuple[str, ...]

    def message(self, auth: Mapping[str, Any]) -> bytes | None:
        """Return the signed text, rebuilt from parsed values (`256` differs from `256.0`); None if
        a field is missing.
        """
        if not auth.keys() >= set(self.fields):
            return None
        return json.dumps({name: auth[name] for name in self.fields}, indent=4).encode()

    @property
    def has_request_number(self) -> bool:
        return "reqnum" in self.fields


OLDEST = Form("A", ("cost", "endpoint", "reqnum", "url"))
"""The `auth_data` of this form has no request_idx."""
FORMS = (
    Form("C", ("url",)),
    Form("B", ("cost", "endpoint", "reqnum", "request_idx", "url")),
    OLDEST,
)
"""Newest first. The fields are in the order in which they are signed."""


class ReplayGuard:
    """Admits each message once, and none whose number is far behind the newest.

    `accepted` are the digests of the newest messages that were admitted, the last one last.
    """

    def __init__(self) -> None:
        self._newest = -1
        self.accepted: deque[bytes] = deque(maxlen=_HISTORY)

    def admit(self, reqnum: object, message: bytes) -> bool:
        """Whether the message is new; if so, remember it. Call only with verified messages."""
        if not isinstance(reqnum, int) or reqnum < self._newest - _HISTORY:
            return False
        digest = hashlib.sha256(message).digest()
        if digest in self.accepted:
            return False
        self._newest = max(self._newest, reqnum)
        self.accepted.append(digest)
        return True


class Verifier:
    """Checks signatures and replays; `guard` knows of those before."""

    def __init__(self, guard: ReplayGuard | None = None) -> None:
        self._guard = guard or ReplayGuard()
        self._last_form: Form | None = None

    def find_form(self, auth: Mapping[str, Any], keys: list[RSAPublicKey]) -> Form | None:
        """Return the form whose message was signed with one of `keys`, or None."""
        digests = [d for d in (_digest(auth.get("signature"), key) for key in keys) if d]
        if not digests:
            return None
        for form in FORMS:
            message = form.message(auth)
            if message is not None and hashlib.sha256(message).digest() in digests:
                return form
        return None

    def is_fresh(self, auth: Mapping[str, Any], form: Form) -> bool:
        """Whether the request may be served by its form's rules against replay. The newest form
        signs only the worker's URL, so its signatures repeat and are always fresh.
        """
        if form is not self._last_form:
            self._last_form = form
            logger.info("envelopes are signed in form %s", form.generation)
        if not form.has_request_number:
            return True
        message = form.message(auth)
        assert message is not None
        return self._guard.admit(auth["reqnum"], message)


def _digest(signature: object, key: RSAPublicKey) -> bytes | None:
    """Return the digest that the owner of `key` signed; None if the signature is not theirs."""
    if not isinstance(signature, str):
        return None
    try:
        raw = base64.b64decode(signature)
        return key.recover_data_from_signature(raw, PKCS1v15(), SHA256())
    except (ValueError, InvalidSignature):
        return None
