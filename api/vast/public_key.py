"""The autoscaler's public key: fetched at start, and again when signatures begin to fail."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import httpx2
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from api.vast.errors import Errors

MISSING = "Failed to get Serverless public key after all retry attempts"
"""The platform's words."""

_TIMEOUT_S = 10.0
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0)
_RETRY_S = 15.0
"""Between attempts once all have failed: it is never given up."""
_FRESH_S = 5.0
"""A key that was seen this recently is not asked for again."""
_GRACE_S = 60.0
"""Envelopes signed before a key was replaced are on their way for this long."""

logger = logging.getLogger(__name__)


class PublicKeys:
    """`keys` are those that may have signed an envelope: the present one, and for a minute the
    one before it.
    """

    def __init__(
        self,
        http: httpx2.AsyncClient,
        addresses: Sequence[str],
        errors: Errors,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._http = http
        self._addresses = addresses
        self._errors = errors
        self._sleep = sleep
        self._text: str | None = None
        self._key: RSAPublicKey | None = None
        self._previous: RSAPublicKey | None = None
        self._replaced = 0.0
        self._seen = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None

    @property
    def keys(self) -> list[RSAPublicKey]:
        if self._previous is not None and time.monotonic() - self._replaced > _GRACE_S:
            self._previous = None
        return [key for key in (self._key, self._previous) if key is not None]

    async def obtain(self) -> None:
        """Return when there is one, however long that takes; meanwhile it is reported missing."""
        attempt = 0
        while not await self._fetch():
            if attempt == len(_BACKOFF_S):
                logger.error(MISSING)
                self._errors.raised("public key", MISSING)
            await self._sleep(_BACKOFF_S[attempt] if attempt < len(_BACKOFF_S) else _RETRY_S)
            attempt += 1
        self._errors.cleared("public key")

    async def refresh(self) -> None:
        """After a signature that fits no key: is there a new one? Asked once for all who wait,
        and not at once again.
        """
        if self._key is None or time.monotonic() - self._seen < _FRESH_S:
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        await self._fetch()
        self._seen = time.monotonic()

    async def _fetch(self) -> bool:
        for address in self._addresses:
            try:
                answer = await self._http.get(
                    f"{address}/pubkey/", timeout=_TIMEOUT_S, follow_redirects=True
                )
                answer.raise_for_status()
                self._adopt(answer.text)
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, UnsupportedAlgorithm) as error:
                logger.warning("no public key from %s: %s", address, type(error).__name__)
            else:
                return True
        return False

    def _adopt(self, text: str) -> None:
        self._seen = time.monotonic()
        if text == self._text:
            return
        key = load_pem_public_key(text.encode())
        if not isinstance(key, RSAPublicKey):
            raise ValueError("not an RSA key")
        if self._key is not None:
            logger.warning("the autoscaler has a new public key")
        self._text, self._key, self._previous = text, key, self._key
        self._replaced = time.monotonic()
