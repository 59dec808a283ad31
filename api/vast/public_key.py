"""The autoscaler's public key: fetched at start, and again when signatures begin to fail."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import httpx2
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from api.vast.active_errors import ActiveErrors

MISSING = "Failed to get Serverless public key after all retry attempts"
"""The error text of Vast's stock worker."""

_TIMEOUT_S = 10.0
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0)
_RETRY_S = 15.0
"""Seconds between attempts after the first five failed. Attempts never stop."""
_FRESH_S = 5.0
"""A key that was fetched this recently is not fetched again."""
_GRACE_S = 60.0
"""How long the previous key is still accepted, for envelopes signed before the change."""

logger = logging.getLogger(__name__)


class PublicKeys:
    """Fetches the public key and keeps it up to date."""

    def __init__(
        self,
        http: httpx2.AsyncClient,
        addresses: Sequence[str],
        errors: ActiveErrors,
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
        """The keys that may have signed an envelope: the current one, and for a minute after a
        change the previous one.
        """
        if self._previous is not None and time.monotonic() - self._replaced > _GRACE_S:
            self._previous = None
        return [key for key in (self._key, self._previous) if key is not None]

    async def obtain(self) -> None:
        """Fetch the key, however long that takes. After five failures report it as missing."""
        attempt = 0
        while not await self._fetch():
            if attempt == len(_BACKOFF_S):
                logger.error(MISSING)
                self._errors.add("public key", MISSING)
            await self._sleep(_BACKOFF_S[attempt] if attempt < len(_BACKOFF_S) else _RETRY_S)
            attempt += 1
        self._errors.clear("public key")

    async def refresh(self) -> None:
        """Fetch the key again, because a signature fits no known key. Concurrent callers share one
        fetch, and a key fetched within the last seconds is not fetched again.
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
                self._use(answer.text)
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, UnsupportedAlgorithm) as error:
                logger.warning("no public key from %s: %s", address, type(error).__name__)
            else:
                return True
        return False

    def _use(self, text: str) -> None:
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
