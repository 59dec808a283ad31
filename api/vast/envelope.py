"""The signed envelope around a request: `{auth_data, payload, session_id}`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pydantic_core
from starlette.responses import Response
from starlette.types import Receive

from api.http.body import is_too_much
from api.vast.workload import MAX_WORKLOAD

_REQUIRED = ("cost", "endpoint", "reqnum", "request_idx", "signature", "url")
_MISSING = "field missing"
_LONGEST_IDX = 64
ENVELOPE_BYTES = 1 << 16
"""Room for the envelope around a payload, in bytes."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """A well-formed envelope. The oldest form of `auth_data` has no request_idx; every other field
    is present.
    """

    auth: Mapping[str, Any]
    payload: Mapping[str, Any]
    session_id: object = None

    @property
    def request_idx(self) -> int | str | None:
        """The number by which reports name the request; None if it cannot be reported. Newer forms
        do not sign it, so it may be anything, and an entry that the autoscaler cannot parse would
        hold up all other entries of its report.
        """
        idx = self.auth.get("request_idx")
        if isinstance(idx, int) and not isinstance(idx, bool):
            return idx if abs(idx) < 1 << 63 else None
        return idx if isinstance(idx, str) and len(idx) <= _LONGEST_IDX else None

    @property
    def cost(self) -> float:
        cost = self.auth["cost"]
        return float(min(cost, MAX_WORKLOAD)) if isinstance(cost, int | float) and cost > 0 else 0.0


async def read_body(receive: Receive, limit: int) -> bytes | None:
    """Return a request's body, or None if the client went away. Reading stops once the body is
    longer than `limit` bytes.
    """
    raw = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        raw += message.get("body", b"")
        if not message.get("more_body", False) or len(raw) > limit:
            return bytes(raw)


class NotAnEnvelope(Exception):
    """The body has no envelope: it is what a client of TGI sends."""


class MalformedEnvelope(Exception):
    """The body is no valid envelope. `problems` is the body of the answer."""

    def __init__(self, problems: Mapping[str, object]) -> None:
        super().__init__("malformed envelope")
        self.problems = problems


def parse(raw: bytes) -> Envelope:
    """Parse an envelope. Raises `NotAnEnvelope` or `MalformedEnvelope`."""
    body = parse_object(raw)
    if not body.keys() & {"auth_data", "payload"}:
        raise NotAnEnvelope
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
        raise MalformedEnvelope(problems)
    assert isinstance(auth, dict)
    assert isinstance(payload, dict)
    return Envelope(auth, payload, body.get("session_id"))


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object. Numbers keep the form in which they are written (256 is not 256.0),
    since they may be signed. Raises `MalformedEnvelope`.
    """
    if is_too_much(raw):
        raise MalformedEnvelope({"error": "too many values"})
    try:
        body = pydantic_core.from_json(raw)
    except ValueError:
        raise MalformedEnvelope({"error": "invalid JSON"}) from None
    if not isinstance(body, dict):
        raise MalformedEnvelope(MISSING_ENVELOPE)
    return body


MISSING_ENVELOPE = {"auth_data": _MISSING, "payload": _MISSING}
"""Body of the answer to a request that needs an envelope and has none."""


def missing_parameters(auth: Mapping[str, Any]) -> dict[str, str]:
    """Return what the stock worker answers for each missing field of `auth_data`."""
    return {name: "missing parameter" for name in _REQUIRED if name not in auth}


def platform_response(status: int, body: Mapping[str, object] | None = None) -> Response:
    """A response in the exact bytes of Vast's stock worker, whose JSON has spaces."""
    if body is None:
        return Response(status_code=status)
    text = json.dumps(body)
    return Response(text, status, headers={"content-type": "application/json; charset=utf-8"})
