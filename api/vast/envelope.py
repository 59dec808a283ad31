"""The signed envelope around a request, `{auth_data, payload, session_id}`, or what it lacks."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pydantic_core
from starlette.responses import Response
from starlette.types import Receive

from api.vast.books import MAX_WORKLOAD

_REQUIRED = ("cost", "endpoint", "reqnum", "request_idx", "signature", "url")
_MISSING = "field missing"
_LONGEST_IDX = 64
ENVELOPE_BYTES = 1 << 16
"""What an envelope may take beside its payload."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """Of the oldest generation `auth_data` has no request_idx; all else is there."""

    auth: Mapping[str, Any]
    payload: Mapping[str, Any]
    session_id: object = None

    @property
    def request_idx(self) -> int | str | None:
        """None if there is none by which a report could speak of it: newer generations do not
        sign it, and what cannot be told would hold up all that is to be told with it.
        """
        idx = self.auth.get("request_idx")
        if isinstance(idx, int) and not isinstance(idx, bool):
            return idx if abs(idx) < 1 << 63 else None
        return idx if isinstance(idx, str) and len(idx) <= _LONGEST_IDX else None

    @property
    def cost(self) -> float:
        cost = self.auth["cost"]
        return float(min(cost, MAX_WORKLOAD)) if isinstance(cost, int | float) and cost > 0 else 0.0


async def read(receive: Receive, limit: int) -> bytes | None:
    """A request's body, cut behind `limit`; None if the client went away."""
    raw = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        raw += message.get("body", b"")
        if not message.get("more_body", False) or len(raw) > limit:
            return bytes(raw)


class Plain(Exception):
    """The body is not in an envelope: what a client of TGI sends."""


class Malformed(Exception):
    """Neither; the message for its sender is `problems`."""

    def __init__(self, problems: Mapping[str, object]) -> None:
        super().__init__("malformed envelope")
        self.problems = problems


def parse(raw: bytes) -> Envelope:
    """Raises `Plain` or `Malformed`."""
    body = parse_object(raw)
    if not body.keys() & {"auth_data", "payload"}:
        raise Plain
    auth, payload = body.get("auth_data"), body.get("payload")
    problems: dict[str, object] = {}
    if not isinstance(auth, dict):
        problems["auth_data"] = _MISSING
    elif missing_parameters(auth).keys() - {"request_idx"}:
        problems["auth_data"] = missing_parameters(auth)
    if "payload" not in body:
        problems["payload"] = _MISSING
    elif not isinstance(payload, dict):
        problems["payload"] = {"data": "payload must be a dictionary"}
    if problems:
        raise Malformed(problems)
    assert isinstance(auth, dict)
    assert isinstance(payload, dict)
    return Envelope(auth, payload, body.get("session_id"))


def parse_object(raw: bytes) -> dict[str, Any]:
    """Numbers as they are written, since a signature may be over them. Raises `Malformed`."""
    try:
        body = pydantic_core.from_json(raw)
    except ValueError:
        raise Malformed({"error": "invalid JSON"}) from None
    if not isinstance(body, dict):
        raise Malformed(UNSIGNED)
    return body


UNSIGNED = {"auth_data": _MISSING, "payload": _MISSING}
"""What is said to a body that is no envelope, where none other is served."""


def missing_parameters(auth: Mapping[str, Any]) -> dict[str, str]:
    return {name: "missing parameter" for name in _REQUIRED if name not in auth}


def refusal(status: int, body: Mapping[str, object] | None = None) -> Response:
    """As the platform's own worker writes it, spaces and all."""
    if body is None:
        return Response(status_code=status)
    text = json.dumps(body)
    return Response(text, status, headers={"content-type": "application/json; charset=utf-8"})
