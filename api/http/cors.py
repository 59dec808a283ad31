"""CORS headers on every response, byte for byte those of tower-http around TGI's router.

Starlette's own CORS middleware is not used: it sends no headers to requests without an origin, and
it rejects preflight requests that lack headers which TGI does not require.
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
    """The outermost middleware, so that error responses have the headers too.

    `origins` are the origins whose pages may read responses, written as browsers send them. An
    empty list, or one that contains `*`, allows all.
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
    """Answer a preflight request. The answer is the same for every path and every question."""
    await send({"type": "http.response.start", "status": 200, "headers": _PREFLIGHT})
    await send({"type": "http.response.body"})
