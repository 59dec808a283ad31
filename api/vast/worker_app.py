"""The ASGI application on a worker's port, from the first second on.

It answers Vast's own routes itself and passes everything else to the gateway once that is open.
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
from api.vast.envelope import ENVELOPE_BYTES, MalformedEnvelope, platform_response
from api.vast.sessions import Sessions

UPDATE_REQUEST_FILE = Path("/.force_update")
"""Vast's updater looks for this file and updates the worker when it exists."""

logger = logging.getLogger(__name__)


class WorkerApp:
    """Serves whatever part of the worker is ready.

    application  answers GET requests as soon as the model is loaded
    gateway      serves all requests as soon as the worker is ready
    reason       why it is not ready yet, for the 503 answers until then
    """

    def __init__(self, sessions: Sessions, master_token: SecretStr) -> None:
        self.application: ASGIApp | None = None
        self.gateway: ASGIApp | None = None
        self.reason = "the model is being loaded"
        self._token = master_token.get_secret_value()
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        response = await self._vast_route(scope, receive)
        if response is not None:
            await response(scope, receive, send)
            return
        inner = self.gateway or (None if scope["method"] == "POST" else self.application)
        await (inner or self._not_ready)(scope, receive, send)

    async def _vast_route(self, scope: Scope, receive: Receive) -> Response | None:
        """Answer one of Vast's own routes; None for any other route."""
        path = scope["path"].rstrip("/")
        if scope["method"] == "GET":
            return PlainTextResponse("pong") if path == "/ping" else None
        if scope["method"] != "POST":
            return None
        if path == "/pyworker/update":
            return self._request_update(Request(scope))
        session_routes: Mapping[str, Callable[[Mapping[str, Any]], Response]] = {
            "/session/get": self._sessions.get,
            "/session/health": self._sessions.health,
            "/session/end": self._sessions.end,
        }
        if path not in session_routes:
            return None
        raw = await envelopes.read_body(receive, ENVELOPE_BYTES)
        try:
            body = envelopes.parse_object(raw or b"")
        except MalformedEnvelope:
            return platform_response(422, {"error": "invalid JSON"})
        return session_routes[path](body)

    def _request_update(self, request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not self._token or not hmac.compare_digest(given.encode(), self._token.encode()):
            return platform_response(401, {"error": "unauthorized"})
        try:
            UPDATE_REQUEST_FILE.write_bytes(b"")
        except OSError as error:
            return platform_response(500, {"error": f"failed to write file: {error}"})
        return platform_response(200, {"ok": True})

    async def _not_ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 503, which Vast's clients retry."""
        body = {"error": "unhealthy", "error_type": "healthcheck", "reason": self.reason}
        await JSONResponse(body, 503)(scope, receive, send)
