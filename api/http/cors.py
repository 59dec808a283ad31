"""Cross-origin headers on every answer, byte for byte those of tower-http around TGI's router.

Starlette's own middleware sends none where a request names no origin, and asks a preflight for
headers that TGI answers without.
"""

from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_VARY = (b"vary", b"origin, access-control-request-method, access-control-request-headers")
_PREFLIGHT = (
    (b"access-control-allow-methods", b"GET,POST"),
    (b"access-control-allow-headers", b"content-type"),
    (b"content-length", b"0"),
)


class Cors:
    """The outermost layer: errors and refusals carry the headers too.

    `origins` are those whose pages may read answers, as their browsers write them; none, or
    `*` among them, is all.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str] = ()) -> None:
        self._app = app
        self._origins = None if not origins or "*" in origins else {o.encode() for o in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [_VARY, *self._allowed_origin(scope)]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        if scope["method"] == "OPTIONS":
            await _answer_preflight(send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _allowed_origin(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        allowed = b"*"
        if self._origins is not None:
            allowed = next((value for name, value in scope["headers"] if name == b"origin"), b"")
            if allowed not in self._origins:
                return []
        return [(b"access-control-allow-origin", allowed)]


async def _answer_preflight(send: Send) -> None:
    """Whatever is asked for, and of whatever path."""
    await send({"type": "http.response.start", "status": 200, "headers": _PREFLIGHT})
    await send({"type": "http.response.body"})
