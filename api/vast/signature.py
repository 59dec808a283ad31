"""Who may ask: signatures of the autoscaler over an envelope's `auth_data`.

RSA PKCS#1 v1.5 with SHA-256 over a JSON text made of some of its values, which of them has
changed with the protocol's generations. So a signature is held against each form in turn;
recovering its digest once with the public key makes that as cheap as one.
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
"""How many accepted messages are remembered, and by how much a number may lag behind."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a generation signs. Those that sign a request's number take each one once."""

    generation: str
    fields: tuple[str, ...]

    def message(self, auth: Mapping[str, Any]) -> bytes | None:
        """Rebuilt from the parsed values, so `256` is not `256.0`. None: fields are missing."""
        if not auth.keys() >= set(self.fields):
            return None
        return json.dumps({name: auth[name] for name in self.fields}, indent=4).encode()

    @property
    def counts(self) -> bool:
        return "reqnum" in self.fields


OLDEST = Form("A", ("cost", "endpoint", "reqnum", "url"))
"""Its `auth_data` has no request_idx."""
FORMS = (
    Form("C", ("url",)),
    Form("B", ("cost", "endpoint", "reqnum", "request_idx", "url")),
    OLDEST,
)
"""Newest first. Their fields in the order in which they are signed."""


class ReplayGuard:
    """Each message once, and none that is much older than the newest."""

    def __init__(self) -> None:
        self._newest = -1
        self._accepted: deque[bytes] = deque(maxlen=_HISTORY)

    def admit(self, reqnum: object, message: bytes) -> bool:
        """To be asked of messages whose signature is good, and of no others."""
        if not isinstance(reqnum, int) or reqnum < self._newest - _HISTORY:
            return False
        if message in self._accepted:
            return False
        self._newest = max(self._newest, reqnum)
        self._accepted.append(message)
        return True


class Verifier:
    """Holds signatures against keys; a key that was replaced may be among them for a while."""

    def __init__(self) -> None:
        self._guard = ReplayGuard()
        self._last_form: Form | None = None

    def form_of(self, auth: Mapping[str, Any], keys: list[RSAPublicKey]) -> Form | None:
        """The form whose message was signed with one of `keys`, if any was."""
        digests = [d for d in (_digest(auth.get("signature"), key) for key in keys) if d]
        if not digests:
            return None
        for form in FORMS:
            message = form.message(auth)
            if message is not None and hashlib.sha256(message).digest() in digests:
                return form
        return None

    def admits(self, auth: Mapping[str, Any], form: Form) -> bool:
        """By the rules against replay of the generation that signs so. Newer ones sign a worker's
        address and repeat themselves.
        """
        if form is not self._last_form:
            self._last_form = form
            logger.info("envelopes are signed in form %s", form.generation)
        if not form.counts:
            return True
        message = form.message(auth)
        assert message is not None
        return self._guard.admit(auth["reqnum"], message)


def _digest(signature: object, key: RSAPublicKey) -> bytes | None:
    """What the key's owner signed, if they signed this."""
    if not isinstance(signature, str):
        return None
    try:
        raw = base64.b64decode(signature)
        return key.recover_data_from_signature(raw, PKCS1v15(), SHA256())
    except (ValueError, InvalidSignature):
        return None
