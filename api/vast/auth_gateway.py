"""The gateway in front of the application: it verifies requests and accounts for them as load.

A worker's requests arrive in signed envelopes. The gateway opens the envelope, checks it in the
order of Vast's stock worker (JSON, fields, session, signature, queue), passes the payload to the
application as a plain request, and records how that request ends.
"""

import hmac
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.body import parsed
from api.http.disconnect import first_of
from api.vast import envelope as envelopes
from api.vast.envelope import (
    ENVELOPE_BYTES,
    Envelope,
    MalformedEnvelope,
    NotAnEnvelope,
    platform_response,
)
from api.vast.public_key import PublicKeys
from api.vast.sessions import Session, Sessions
from api.vast.signature import FORMS, OLDEST, Form, ReplayGuard, Verifier
from api.vast.workload import Job, Outcome, Workload, declared_tokens

_REPLACED_HEADERS = frozenset(
    {b"authorization", b"content-length", b"content-type", b"transfer-encoding"}
)
_NEWER_FORMS = tuple(form for form in FORMS if form is not OLDEST)
"""Forms whose `auth_data` has a request_idx."""
_KNOWN_FIELDS = frozenset({"cost", "endpoint", "reqnum", "request_idx", "signature", "url"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Settings of the gateway.

    unsecured         signatures are not checked
    api_key           admits requests without an envelope; the gateway also sends it to the
                      application
    payload_limit     largest payload, in bytes
    max_queue_time_s  see `WorkerConfig`
    wait_s            how long a request that arrives now would wait; infinite if every permit is
                      taken and it would be refused
    """

    unsecured: bool
    api_key: str | None
    payload_limit: int
    max_queue_time_s: float | None
    wait_s: Callable[[], float]


class AuthGateway:
    """ASGI middleware around `app`. It handles POST requests and passes all others through."""

    def __init__(
        self,
        app: ASGIApp,
        config: GatewayConfig,
        keys: PublicKeys,
        workload: Workload,
        sessions: Sessions,
        replays: ReplayGuard | None = None,
    ) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._workload = workload
        self._sessions = sessions
        self._verifier = Verifier(replays)
        self._last_warning = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        raw = await envelopes.read_body(receive, self._config.payload_limit + ENVELOPE_BYTES)
        if raw is None:
            return
        response = await self._handle(scope, raw, receive, send)
        if response is not None:
            await response(scope, receive, send)

    async def _handle(
        self, scope: Scope, raw: bytes, receive: Receive, send: Send
    ) -> Response | None:
        """Serve the request and return None, or return a response of the gateway's own."""
        if len(raw) > self._config.payload_limit + ENVELOPE_BYTES:
            return platform_response(413, {"error": "the body is too long"})
        try:
            envelope = await parsed(lambda: envelopes.parse(raw), raw)
        except MalformedEnvelope as error:
            return platform_response(422, error.problems)
        except NotAnEnvelope:
            if not self._accepts_plain_body(scope):
                return platform_response(422, envelopes.MISSING_ENVELOPE)
            await self._serve_plain_body(scope, raw, receive, send)
            return None
        return await self._handle_envelope(scope, envelope, receive, send)

    async def _handle_envelope(
        self, scope: Scope, envelope: Envelope, receive: Receive, send: Send
    ) -> Response | None:
        form = None if self._config.unsecured else await self._find_form(envelope.auth)
        missing = envelopes.missing_parameters(envelope.auth)
        if missing and (self._config.unsecured or form in _NEWER_FORMS):
            return platform_response(422, {"auth_data": missing})
        session = None
        if envelope.session_id is not None:
            session = self._sessions.find(envelope.session_id)
            if session is None:
                return platform_response(410, {"error": "invalid session"})
        if not self._config.unsecured and not self._is_verified(envelope, form):
            return platform_response(401)
        if _path(scope) == "/session/create":
            return self._sessions.create(envelope)
        job = self._workload.add_job(
            envelope.request_idx, declared_tokens(envelope.payload), is_listed=session is None
        )
        if session is not None:
            self._sessions.prolong(session)
        elif not self._can_queue():
            self._workload.end(job, Outcome.REJECTED)
            return platform_response(429)
        body = json.dumps(envelope.payload).encode()
        await self._serve(scope, job, _Exchange(receive, send, body, session))
        return None

    async def _find_form(self, auth: Mapping[str, Any]) -> Form | None:
        """Return the form in which the envelope is signed. If no known key fits, fetch the public
        key again, since it may have been replaced, and try once more.
        """
        form = self._verifier.find_form(auth, self._keys.keys)
        if form is None:
            await self._keys.refresh()
            form = self._verifier.find_form(auth, self._keys.keys)
        if form is None:
            self._warn_of_signature(auth)
        return form

    def _is_verified(self, envelope: Envelope, form: Form | None) -> bool:
        """Whether the signature is good and not replayed.

        A forged request is neither load nor reported: the request number in it belongs to another
        request. A request that arrives before the first public key is reported as rejected.
        """
        if form is None and not self._keys.keys:
            job = self._workload.add_job(envelope.request_idx, declared_tokens(envelope.payload))
            self._workload.end(job, Outcome.REJECTED)
        return form is not None and self._verifier.is_fresh(envelope.auth, form)

    def _warn_of_signature(self, auth: Mapping[str, Any]) -> None:
        """Log a bad signature, at most once a second. Only field names are logged, as the values
        are confidential.
        """
        now = time.monotonic()
        if now - self._last_warning > 1:
            self._last_warning = now
            names = ", ".join(sorted(auth.keys() & _KNOWN_FIELDS))
            logger.warning("a signature fits no key in any form; auth_data has %s", names)

    def _can_queue(self) -> bool:
        """Whether the request would start soon enough. This is checked before the application
        answers, because a stream could only report it after a 200, which clients do not retry on
        another worker.
        """
        limit, wait_s = self._config.max_queue_time_s, self._config.wait_s()
        return wait_s < math.inf and (limit is None or wait_s <= limit)

    def _accepts_plain_body(self, scope: Scope) -> bool:
        """Whether a body without an envelope is served: with the API key, or if there is no key
        and signatures are not checked.
        """
        key = self._config.api_key
        if key is None:
            return self._config.unsecured
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given.lower(), f"Bearer {key}".lower().encode())

    async def _serve_plain_body(
        self, scope: Scope, raw: bytes, receive: Receive, send: Send
    ) -> None:
        """Serve a body without an envelope. It counts as load, but its end is not reported."""
        job = self._workload.add_job(None, declared_tokens(envelopes.parse_object(raw)))
        await self._serve(scope, job, _Exchange(receive, send, raw, None))

    async def _serve(self, scope: Scope, job: Job, exchange: "_Exchange") -> None:
        self._workload.start(job)
        outcome = Outcome.ERROR
        try:
            await self._app(
                self._inner_scope(scope, exchange, job), exchange.receive, exchange.send
            )
            await exchange.finish()
            outcome = exchange.outcome(job)
        finally:
            self._workload.end(job, outcome)

    def _inner_scope(self, scope: Scope, exchange: "_Exchange", job: Job) -> Scope:
        """Return the ASGI scope of the request inside the envelope."""
        path, key = _path(scope), self._config.api_key
        kept = [pair for pair in scope["headers"] if pair[0] not in _REPLACED_HEADERS]
        headers = [
            *kept,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(exchange.body)).encode()),
            *([(b"authorization", f"Bearer {key}".encode())] if key is not None else []),
        ]
        return {**scope, "path": path, "raw_path": path.encode(), "headers": headers, "meter": job}


def _path(scope: Scope) -> str:
    """Return the path without a trailing slash: Vast's templates and documentation write one, but
    no route has one.
    """
    return scope["path"].rstrip("/") or "/"


class _Exchange:
    """One request's `receive` and `send`, which observe how the request ends."""

    def __init__(self, receive: Receive, send: Send, body: bytes, session: Session | None) -> None:
        self.body = body
        self._receive = receive
        self._send = send
        self._session = session
        self._body_was_read = False
        self._disconnected = False
        self._status: int | None = None
        self._finished = False

    async def receive(self) -> Message:
        if not self._body_was_read:
            self._body_was_read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        if self._session is None:
            message = await self._receive()
        else:
            message = await first_of(self._receive(), self._session.disconnect())
        self._disconnected = message["type"] == "http.disconnect" and not self._finished
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif not message.get("more_body", False):
            self._finished = True
        await self._send(message)

    async def finish(self) -> None:
        """End a stream that stopped early because its client went away or its session closed."""
        if self._status is not None and not self._finished:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def outcome(self, job: Job) -> Outcome:
        if self._disconnected or self._status == 499:
            return Outcome.CANCELLED
        if self._status == 429 or job.refused:
            return Outcome.REJECTED
        if job.failed or not self._finished or (self._status or 500) >= 500:
            return Outcome.ERROR
        return Outcome.SUCCESS
