"""The gate in front of the application: who may pass, and what their requests come to.

A worker's requests come in signed envelopes. The gate opens them, checks them in the platform's
order (JSON, fields, session, signature, queue), hands the payload on to the application as the
request it is, and watches how it ends.
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

from api.http.disconnect import first_of
from api.vast import envelope as envelopes
from api.vast.books import Books, Job, Outcome, workload_of
from api.vast.envelope import ENVELOPE_BYTES, Envelope, Malformed, Plain, refusal
from api.vast.public_key import PublicKeys
from api.vast.sessions import Session, Sessions
from api.vast.signature import OLDEST, Form, Verifier

_REPLACED_HEADERS = frozenset(
    {b"authorization", b"content-length", b"content-type", b"transfer-encoding"}
)
_KNOWN_FIELDS = frozenset({"cost", "endpoint", "reqnum", "request_idx", "signature", "url"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rules:
    """How this worker's gate is set.

    unsecured         no signature is looked at
    api_key           opens the application to those without an envelope, and to the gate
    payload_limit     of a request, in bytes
    max_queue_time_s  see `WorkerConfig`
    wait_s            what a request would wait now, by the scheduler's state; infinite where it
                      would be refused
    """

    unsecured: bool
    api_key: str | None
    payload_limit: int
    max_queue_time_s: float | None
    wait_s: Callable[[], float]


class Gate:
    """An ASGI application around `app`, for its POST routes; the others it leaves alone."""

    def __init__(
        self,
        app: ASGIApp,
        rules: Rules,
        keys: PublicKeys,
        books: Books,
        sessions: Sessions,
    ) -> None:
        self._app = app
        self._rules = rules
        self._keys = keys
        self._books = books
        self._sessions = sessions
        self._verifier = Verifier()
        self._complained = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        raw = await envelopes.read(receive, self._rules.payload_limit + ENVELOPE_BYTES)
        if raw is None:
            return
        answer = await self._admit(scope, raw, receive, send)
        if answer is not None:
            await answer(scope, receive, send)

    async def _admit(
        self, scope: Scope, raw: bytes, receive: Receive, send: Send
    ) -> Response | None:
        """A refusal; None if the request was served."""
        if len(raw) > self._rules.payload_limit + ENVELOPE_BYTES:
            return refusal(413, {"error": "the body is too long"})
        try:
            envelope = envelopes.parse(raw)
        except Malformed as error:
            return refusal(422, error.problems)
        except Plain:
            if not self._serves_plain(scope):
                return refusal(422, envelopes.UNSIGNED)
            await self._serve_plain(scope, raw, receive, send)
            return None
        return await self._admit_envelope(scope, envelope, receive, send)

    async def _admit_envelope(
        self, scope: Scope, envelope: Envelope, receive: Receive, send: Send
    ) -> Response | None:
        form = None if self._rules.unsecured else await self._form_of(envelope.auth)
        missing = envelopes.missing_parameters(envelope.auth)
        if missing and form is not OLDEST:
            return refusal(422, {"auth_data": missing})
        session = None
        if envelope.session_id is not None:
            session = self._sessions.find(envelope.session_id)
            if session is None:
                return refusal(410, {"error": "invalid session"})
        if not self._rules.unsecured and not self._is_verified(envelope, form):
            return refusal(401)
        if _path(scope) == "/session/create":
            return self._sessions.create(envelope)
        job = self._books.enter(
            envelope.request_idx, workload_of(envelope.payload), listed=session is None
        )
        if session is not None:
            self._sessions.prolong(session)
        elif not self._has_room():
            self._books.end(job, Outcome.REJECTED)
            return refusal(429)
        body = json.dumps(envelope.payload).encode()
        await self._serve(scope, job, _Exchange(receive, send, body, session))
        return None

    async def _form_of(self, auth: Mapping[str, Any]) -> Form | None:
        """In which it is signed; a key that was replaced is looked for before it is in none."""
        form = self._verifier.form_of(auth, self._keys.keys)
        if form is None:
            await self._keys.refresh()
            form = self._verifier.form_of(auth, self._keys.keys)
        if form is None:
            self._complain(auth)
        return form

    def _is_verified(self, envelope: Envelope, form: Form | None) -> bool:
        """A forged request is no load, and the number it names is another's: it leaves no trace
        in the books. One that comes before there is a key to hold it against is rejected there.
        """
        if form is None and not self._keys.keys:
            job = self._books.enter(envelope.request_idx, workload_of(envelope.payload))
            self._books.end(job, Outcome.REJECTED)
        return form is not None and self._verifier.admits(envelope.auth, form)

    def _complain(self, auth: Mapping[str, Any]) -> None:
        """At most once a second, and of names alone: the values are what must not be known."""
        now = time.monotonic()
        if now - self._complained > 1:
            self._complained = now
            names = ", ".join(sorted(auth.keys() & _KNOWN_FIELDS))
            logger.warning("a signature fits no key in any form; auth_data has %s", names)

    def _has_room(self) -> bool:
        """A stream would only say so in an answer that began well, which no client tries again
        elsewhere.
        """
        limit, wait_s = self._rules.max_queue_time_s, self._rules.wait_s()
        return wait_s < math.inf and (limit is None or wait_s <= limit)

    def _serves_plain(self, scope: Scope) -> bool:
        """For the worker's owner, and for everyone where signatures are not looked at."""
        key = self._rules.api_key
        if key is None:
            return self._rules.unsecured
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given.lower(), f"Bearer {key}".lower().encode())

    async def _serve_plain(self, scope: Scope, raw: bytes, receive: Receive, send: Send) -> None:
        """It is load, though nobody waits to hear how it ended."""
        job = self._books.enter(None, workload_of(envelopes.parse_object(raw)))
        await self._serve(scope, job, _Exchange(receive, send, raw, None))

    async def _serve(self, scope: Scope, job: Job, exchange: "_Exchange") -> None:
        self._books.start(job)
        outcome = Outcome.ERROR
        try:
            await self._app(self._inner(scope, exchange, job), exchange.receive, exchange.send)
            await exchange.finish()
            outcome = exchange.outcome(job)
        finally:
            self._books.end(job, outcome)

    def _inner(self, scope: Scope, exchange: "_Exchange", job: Job) -> Scope:
        """The request that was in the envelope."""
        path, key = _path(scope), self._rules.api_key
        kept = [pair for pair in scope["headers"] if pair[0] not in _REPLACED_HEADERS]
        headers = [
            *kept,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(exchange.body)).encode()),
            *([(b"authorization", f"Bearer {key}".encode())] if key is not None else []),
        ]
        return {**scope, "path": path, "raw_path": path.encode(), "headers": headers, "meter": job}


def _path(scope: Scope) -> str:
    """Templates and documents write a slash at the end that no worker serves."""
    return scope["path"].rstrip("/") or "/"


class _Exchange:
    """What goes in and out of the application for one request, as it is watched."""

    def __init__(self, receive: Receive, send: Send, body: bytes, session: Session | None) -> None:
        self.body = body
        self._receive = receive
        self._send = send
        self._session = session
        self._given = False
        self._gone = False
        self._status: int | None = None
        self._finished = False

    async def receive(self) -> Message:
        if not self._given:
            self._given = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        if self._session is None:
            message = await self._receive()
        else:
            message = await first_of(self._receive(), self._session.over())
        self._gone = message["type"] == "http.disconnect" and not self._finished
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif not message.get("more_body", False):
            self._finished = True
        await self._send(message)

    async def finish(self) -> None:
        """A stream is left open where its client went away, or its session did."""
        if self._status is not None and not self._finished:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def outcome(self, job: Job) -> Outcome:
        if self._gone or self._status == 499:
            return Outcome.CANCELLED
        if self._status == 429 or job.refused:
            return Outcome.REJECTED
        if job.failed or not self._finished or (self._status or 500) >= 500:
            return Outcome.ERROR
        return Outcome.SUCCESS
