"""What listens on a worker's port, from the first second on: the gate, once it is open, and the
few routes that the platform has beside the application's.
"""

import hmac
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.vast import envelope as envelopes
from api.vast.envelope import ENVELOPE_BYTES, Malformed, refusal
from api.vast.sessions import Sessions

UPDATE_MARK = Path("/.force_update")
"""Whoever updates workers on the platform looks for it."""

logger = logging.getLogger(__name__)


class Front:
    """An ASGI application. `application` and `gate` are set when they are there: the first
    answers what only asks, the second is the way in for work.
    """

    def __init__(self, sessions: Sessions, master_token: SecretStr) -> None:
        self.application: ASGIApp | None = None
        self.gate: ASGIApp | None = None
        self.reason = "the model is being loaded"
        self._token = master_token.get_secret_value()
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        answer = await self._own_answer(scope, receive)
        if answer is not None:
            await answer(scope, receive, send)
            return
        inner = self.gate or (None if scope["method"] == "POST" else self.application)
        await (inner or self._unready)(scope, receive, send)

    async def _own_answer(self, scope: Scope, receive: Receive) -> Response | None:
        path = scope["path"].rstrip("/")
        if scope["method"] == "GET":
            return PlainTextResponse("pong") if path == "/ping" else None
        if scope["method"] != "POST":
            return None
        if path == "/pyworker/update":
            return self._update(Request(scope))
        on_session: Mapping[str, Callable[[Mapping[str, Any]], Response]] = {
            "/session/get": self._sessions.get,
            "/session/health": self._sessions.health,
            "/session/end": self._sessions.end,
        }
        if path not in on_session:
            return None
        raw = await envelopes.read(receive, ENVELOPE_BYTES)
        try:
            body = envelopes.parse_object(raw or b"")
        except Malformed:
            return refusal(422, {"error": "invalid JSON"})
        return on_session[path](body)

    def _update(self, request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not self._token or not hmac.compare_digest(given.encode(), self._token.encode()):
            return refusal(401, {"error": "unauthorized"})
        try:
            UPDATE_MARK.write_bytes(b"")
        except OSError as error:
            return refusal(500, {"error": f"failed to write file: {error}"})
        return refusal(200, {"ok": True})

    async def _unready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """To be tried again, and so it is by the platform's clients."""
        body = {"error": "unhealthy", "error_type": "healthcheck", "reason": self.reason}
        await JSONResponse(body, 503)(scope, receive, send)
