"""Sessions: a client reserves part of a worker for a while, at a cost that the client names.

A session is one job of the workload, however many requests are made in it. It lasts until its
client ends it or it expires; each request in it prolongs it.
"""

import asyncio
import logging
import secrets
import string
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Message

from api.vast.envelope import Envelope, platform_response
from api.vast.workload import Job, Outcome, Workload

DEFAULT_LIFETIME_S = 60.0
_SWEEP_S = 5.0
_MAX_LIFETIME_S = 1e9
"""Thirty years. A finite limit keeps every expiration a number that JSON can express."""
_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 13

OnClose = Callable[[str, Mapping[str, Any]], Awaitable[None]]
"""A function that calls a route of this server with a payload."""

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Session:
    """An open session. Times are seconds since the epoch.

    auth    the `auth_data` of the request that created it; later calls must present the same
    closed  set when the session is over, which ends its running requests
    """

    id: str
    auth: Mapping[str, Any]
    lifetime_s: float
    created_at: float
    expiration: float
    on_close_route: str | None
    on_close_payload: Mapping[str, Any]
    job: Job
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def disconnect(self) -> Message:
        """Wait until the session is over; return the ASGI message that makes a request stop."""
        await self.closed.wait()
        return {"type": "http.disconnect"}

    def describe(self) -> dict[str, object]:
        return {
            "session_id": self.id,
            "auth_data": self.auth,
            "lifetime": self.lifetime_s,
            "expiration": self.expiration,
            "created_at": self.created_at,
            "on_close_route": self.on_close_route,
            "on_close_payload": self.on_close_payload,
        }


class Sessions:
    """The open sessions, and the responses to the `/session/` routes."""

    def __init__(self, workload: Workload, limit: int) -> None:
        self._workload = workload
        self._limit = limit
        self._open: dict[str, Session] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.on_close: OnClose | None = None

    def find(self, session_id: object) -> Session | None:
        return self._open.get(session_id) if isinstance(session_id, str) else None

    def prolong(self, session: Session) -> None:
        session.expiration += session.lifetime_s

    def create(self, envelope: Envelope) -> Response:
        """Open a session. The caller has verified the envelope."""
        job = self._workload.add_job(envelope.request_idx, envelope.cost, is_session=True)
        if self._limit and len(self._open) >= self._limit:
            self._workload.end(job, Outcome.REJECTED)
            return platform_response(429)
        self._workload.start(job)
        session = _session(envelope, job)
        self._open[session.id] = session
        created = {"session_id": session.id, "expiration": session.expiration}
        return platform_response(201, created)

    def get(self, body: Mapping[str, Any]) -> Response:
        found = self._authorised(
            body, unknown=platform_response(400, {"error": "session does not exist"})
        )
        return platform_response(200, found.describe()) if isinstance(found, Session) else found

    def health(self, body: Mapping[str, Any]) -> Response:
        found = self._authorised(body, unknown=platform_response(200, {"ok": False}))
        return platform_response(200, {"ok": True}) if isinstance(found, Session) else found

    def end(self, body: Mapping[str, Any]) -> Response:
        session_id = body.get("session_id")
        unknown = platform_response(400, {"error": f"session with id {session_id} not found"})
        found = self._authorised(body, unknown)
        if not isinstance(found, Session):
            return found
        self._close(found)
        return platform_response(200, {"ended": True, "removed_session": found.id})

    async def sweep(self) -> None:
        """Close expired sessions every few seconds. Runs until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.time()
            for session in [s for s in self._open.values() if s.expiration < now]:
                logger.info("session expired")
                self._close(session)

    def close_all(self) -> None:
        for session in list(self._open.values()):
            self._close(session)

    def _authorised(self, body: Mapping[str, Any], unknown: Response) -> Session | Response:
        if "session_id" not in body:
            return platform_response(422, {"error": "missing session_id"})
        session = self.find(body["session_id"])
        if session is None:
            return unknown
        if body.get("session_auth") != session.auth:
            return platform_response(401, {"error": "session_auth is not valid"})
        return session

    def _close(self, session: Session) -> None:
        del self._open[session.id]
        session.closed.set()
        self._workload.end(session.job, Outcome.SUCCESS)
        if session.on_close_route and self.on_close is not None:
            payload = {**session.on_close_payload, "session_id": session.id}
            task = asyncio.create_task(self._call(session.on_close_route, payload))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _call(self, route: str, payload: Mapping[str, Any]) -> None:
        """Make the closing call of a session that is over. Failures are only logged."""
        assert self.on_close is not None
        try:
            async with asyncio.timeout(10):
                await self.on_close(route, payload)
        except Exception as error:
            logger.warning("closing call of a session failed: %s", type(error).__name__)


def _session(envelope: Envelope, job: Job) -> Session:
    payload, now = envelope.payload, time.time()
    lifetime_s = _seconds(payload.get("lifetime"))
    route, closing = payload.get("on_close_route"), payload.get("on_close_payload")
    return Session(
        id="".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH)),
        auth=envelope.auth,
        lifetime_s=lifetime_s,
        created_at=now,
        expiration=now + lifetime_s,
        on_close_route=route if isinstance(route, str) else None,
        on_close_payload=closing if isinstance(closing, dict) else {},
        job=job,
    )


def _seconds(value: object) -> float:
    if isinstance(value, int | float) and value > 0:
        return float(min(value, _MAX_LIFETIME_S))
    return DEFAULT_LIFETIME_S
