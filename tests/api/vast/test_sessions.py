"""Sessions over HTTP: opened with a signature, authorised by the same `auth_data`, and closed."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
import pytest

from tests.api.client import Connection
from tests.api.scripted import HOLD, ScriptedEngine, output
from tests.api.vast.clock import EPOCH, TIME, VirtualLoop
from tests.api.vast.worker import TOKEN, Worker, signer, worker

pytestmark = pytest.mark.anyio

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.vast.sessions.time", TIME)
    monkeypatch.setattr("api.vast.workload.time", TIME)


@pytest.fixture
async def served() -> AsyncIterator[Worker]:
    async with worker(ScriptedEngine(_hold_or_speak), max_sessions=2) as served:
        sweeping = asyncio.create_task(served.sessions.sweep())
        yield served
        sweeping.cancel()


def _hold_or_speak(request: Any) -> Any:
    """Hold after one token if the limit is 99, else generate the default script."""
    if request.stopping.max_new_tokens == 99:
        return [[output("a")], HOLD]
    return ScriptedEngine().script(request)


LONG = {"inputs": "x", "parameters": {"max_new_tokens": 99}}


class Opened:
    """A session as its client knows it."""

    def __init__(self, served: Worker, auth: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        self._served, self.auth = served, auth
        self.id: Any = answer["session_id"]
        self.expiration: Any = answer["expiration"]

    async def call(self, what: str, **changed: Any) -> httpx2.Response:
        body = {"session_id": self.id, "session_auth": self.auth} | changed
        return await self._served.http.post(f"/session/{what}", json=body)

    async def is_open(self) -> bool:
        return (await self.call("health")).json() == {"ok": True}


async def open_session(served: Worker, cost: float = 50, **payload: Any) -> Opened:
    body = served.envelope(payload, cost=cost)
    response = await served.http.post("/session/create", json=body)
    assert response.status_code == 201, response.content
    return Opened(served, body["auth_data"], response.json())


# -- create -------------------------------------------------------------------------------


async def test_a_session_is_opened_for_a_minute(served: Worker) -> None:
    response = await served.ask({}, "/session/create")
    assert response.status_code == 201
    answer = response.json()
    assert answer.keys() == {"session_id", "expiration"}
    assert len(answer["session_id"]) == 13
    assert set(answer["session_id"]) <= set(LETTERS)
    assert answer["expiration"] == pytest.approx(EPOCH + 60)


async def test_a_session_is_opened_for_the_lifetime_that_it_asks_for(served: Worker) -> None:
    session = await open_session(served, lifetime=600)
    assert session.expiration == pytest.approx(EPOCH + 600)


@pytest.mark.parametrize("lifetime", [None, 0, -1, "600", [], float("nan"), 10**400, 1e308])
async def test_any_lifetime_gives_an_expiration_that_json_can_express(
    served: Worker, lifetime: Any
) -> None:
    response = await served.ask({"lifetime": lifetime}, "/session/create")
    assert response.status_code == 201
    session = Opened(served, served.signer.auth(), response.json())
    for _ in range(3):
        assert (await served.ask(session_id=session.id)).status_code == 200
    described = await session.call("get")
    json.loads(described.text, parse_constant=lambda name: pytest.fail(name))


async def test_a_session_is_not_opened_with_a_forged_signature(served: Worker) -> None:
    body = served.envelope({})
    body["auth_data"] = signer("forger").auth()
    response = await served.http.post("/session/create", json=body)
    assert (response.status_code, response.content) == (401, b"")
    assert not served.workload.working


async def test_more_sessions_than_the_limit_are_429(served: Worker) -> None:
    first = await open_session(served)
    await open_session(served)
    response = await served.ask({}, "/session/create", request_idx=9)
    assert (response.status_code, response.content) == (429, b"")
    assert served.outcomes() == [(9, "Rejected")]
    assert served.workload.load().rejected == 256
    await first.call("end")
    assert (await served.ask({}, "/session/create")).status_code == 201


async def test_a_session_limit_of_zero_is_no_limit() -> None:
    async with worker(max_sessions=0) as served:
        for _ in range(30):
            await open_session(served)


@pytest.mark.parametrize("body", [b"", b"{", b"[", b"\xff"])
async def test_a_session_is_not_opened_by_invalid_json(served: Worker, body: bytes) -> None:
    response = await served.http.post("/session/create", content=body)
    assert response.status_code == 422
    assert response.json() == {"error": "invalid JSON"}


async def test_a_session_is_not_opened_without_a_payload(served: Worker) -> None:
    body = {"auth_data": served.signer.auth()}
    response = await served.http.post("/session/create", json=body)
    assert response.status_code == 422


# -- get, health, end ---------------------------------------------------------------------


async def test_session_get_describes_the_session(served: Worker) -> None:
    session = await open_session(
        served, lifetime=90, on_close_route="/generate", on_close_payload={"inputs": "bye"}
    )
    response = await session.call("get")
    assert response.status_code == 200
    assert response.json() == {
        "session_id": session.id,
        "auth_data": session.auth,
        "lifetime": 90,
        "expiration": session.expiration,
        "created_at": pytest.approx(EPOCH),
        "on_close_route": "/generate",
        "on_close_payload": {"inputs": "bye"},
    }


async def test_an_open_session_is_healthy_until_it_is_ended(served: Worker) -> None:
    session = await open_session(served)
    assert (await session.call("health")).content == b'{"ok": true}'
    response = await session.call("end")
    assert response.status_code == 200
    assert response.json() == {"ended": True, "removed_session": session.id}
    assert (await session.call("health")).content == b'{"ok": false}'


UNKNOWN = {
    "get": (400, {"error": "session does not exist"}),
    "health": (200, {"ok": False}),
    "end": (400, {"error": "session with id nowhere not found"}),
}


@pytest.mark.parametrize(("what", "answer"), UNKNOWN.items())
async def test_a_call_to_an_unknown_session_finds_none(
    served: Worker, what: str, answer: tuple[int, dict[str, Any]]
) -> None:
    session = await open_session(served)
    response = await session.call(what, session_id="nowhere")
    assert (response.status_code, response.json()) == answer


@pytest.mark.parametrize("what", UNKNOWN)
async def test_a_session_id_of_another_type_finds_no_session(served: Worker, what: str) -> None:
    session = await open_session(served)
    session_ids: list[object] = [None, 7, True, [], {}, 1.5]
    for session_id in session_ids:
        response = await session.call(what, session_id=session_id)
        assert response.status_code == UNKNOWN[what][0]


@pytest.mark.parametrize("what", UNKNOWN)
async def test_only_the_auth_data_that_opened_a_session_authorises_calls(
    served: Worker, what: str
) -> None:
    session = await open_session(served)
    strangers: list[Any] = [
        None,
        {},
        "x",
        dict(session.auth) | {"reqnum": 8},
        dict(session.auth) | {"extra": 1},
        {"url": session.auth["url"]},
    ]
    for auth in strangers:
        response = await session.call(what, session_auth=auth)
        assert response.status_code == 401
        assert response.json() == {"error": "session_auth is not valid"}
    body = {"session_id": session.id}
    assert (await served.http.post(f"/session/{what}", json=body)).status_code == 401
    assert await session.is_open()


@pytest.mark.parametrize("what", UNKNOWN)
async def test_a_call_without_a_session_id_is_422(served: Worker, what: str) -> None:
    response = await served.http.post(f"/session/{what}", json={"session_auth": {}})
    assert response.status_code == 422
    assert response.json() == {"error": "missing session_id"}
    for body in (b"", b"{", b"\xff"):
        response = await served.http.post(f"/session/{what}", content=body)
        assert response.status_code == 422
        assert response.json() == {"error": "invalid JSON"}


# -- its requests -------------------------------------------------------------------------


async def test_requests_in_a_session_are_load_but_only_the_session_is_listed(
    served: Worker,
) -> None:
    session = await open_session(served, cost=50)
    assert (await served.ask(session_id=session.id, request_idx=7)).status_code == 200
    load = served.workload.load()
    assert (load.pending, load.received, load.served) == (50, 52, 2)
    assert (load.working, load.num_received) == ((42,), 1)
    assert not served.workload.ended
    await session.call("end")
    load = served.workload.load()
    assert (load.pending, load.received, load.served, load.working) == (0, 52, 52, ())
    (ended,) = served.workload.ended
    assert (ended.request_idx, str(ended.outcome), ended.success) == (42, "Success", True)
    assert ended.started_at > 0
    assert ended.completed_at > 0


async def test_a_request_in_a_session_needs_a_signature_too(served: Worker) -> None:
    session = await open_session(served)
    body = served.envelope(session_id=session.id)
    body["auth_data"] = signer("forger").auth()
    assert (await served.http.post("/generate", json=body)).status_code == 401


async def test_a_request_in_a_session_is_served_whatever_the_queue_time() -> None:
    async with worker(wait_s=lambda: 61.0) as served:
        session = await open_session(served)
        assert (await served.ask(session_id=session.id)).status_code == 200


async def test_each_request_prolongs_its_session_by_its_lifetime(served: Worker) -> None:
    session = await open_session(served, lifetime=30)
    for _ in range(3):
        await served.ask(session_id=session.id)
    described = (await session.call("get")).json()
    assert described["expiration"] == session.expiration + 90


async def test_a_request_in_an_ended_session_is_410(served: Worker) -> None:
    session = await open_session(served)
    await session.call("end")
    response = await served.ask(session_id=session.id)
    assert (response.status_code, response.json()) == (410, {"error": "invalid session"})


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize("how", ["end", "expire"])
async def test_running_requests_end_when_their_session_ends(
    served: Worker, path: str, how: str
) -> None:
    session = await open_session(served, lifetime=20)
    app: Any = served.app
    connection = Connection(app, path, served.envelope(LONG, session_id=session.id))
    other = Connection(app, path, served.envelope(LONG))
    await served.engine.holding.wait()
    while len(served.engine.requests) < 2 or served.engine.num_open < 2:
        await asyncio.sleep(0)
    if how == "end":
        await session.call("end")
    await connection.finished() if how == "end" else await asyncio.sleep(60)
    assert served.engine.num_aborts == 1
    assert served.engine.num_open == 1
    assert connection.sent[-1]["type"] == "http.response.body"
    assert not connection.sent[-1].get("more_body", False)
    await other.go_away()


# -- its end ------------------------------------------------------------------------------


async def test_a_session_expires(served: Worker) -> None:
    session = await open_session(served, lifetime=30)
    await asyncio.sleep(29)
    assert await session.is_open()
    await asyncio.sleep(7)
    assert not await session.is_open()
    assert served.outcomes() == [(42, "Success")]
    assert served.workload.pending == 0


async def test_a_session_that_is_used_does_not_expire(served: Worker) -> None:
    session = await open_session(served, lifetime=30)
    for _ in range(6):
        await asyncio.sleep(25)
        assert (await served.ask(session_id=session.id)).status_code == 200


async def test_the_closing_call_is_made_when_a_session_ends(served: Worker) -> None:
    calls: list[tuple[str, Mapping[str, Any]]] = []

    async def on_close(route: str, payload: Mapping[str, Any]) -> None:
        calls.append((route, payload))

    served.sessions.on_close = on_close
    closing: dict[str, Any] = {"on_close_route": "/generate", "on_close_payload": {"inputs": "bye"}}
    session = await open_session(served, **closing)
    expiring = await open_session(served, lifetime=10, **closing)
    await session.call("end")
    await asyncio.sleep(20)
    assert calls == [
        ("/generate", {"inputs": "bye", "session_id": session.id}),
        ("/generate", {"inputs": "bye", "session_id": expiring.id}),
    ]


@pytest.mark.parametrize("route", [None, 7, "", []])
async def test_without_a_route_there_is_no_closing_call(served: Worker, route: Any) -> None:
    calls = []

    async def on_close(route: str, payload: Mapping[str, Any]) -> None:
        calls.append((route, payload))

    served.sessions.on_close = on_close
    session = await open_session(served, on_close_route=route, on_close_payload=7)
    await session.call("end")
    await asyncio.sleep(1)
    assert not calls


async def test_a_closing_call_that_fails_or_hangs_changes_nothing(served: Worker) -> None:
    called = asyncio.Event()

    async def on_close(route: str, _: Mapping[str, Any]) -> None:
        called.set()
        if route == "/fails":
            raise RuntimeError
        await asyncio.Event().wait()

    served.sessions.on_close = on_close
    for route in ("/fails", "/hangs"):
        called.clear()
        session = await open_session(served, on_close_route=route)
        assert (await session.call("end")).status_code == 200
        await called.wait()
        await asyncio.sleep(15)
        assert not await session.is_open()
    assert not served.sessions._closing


# -- updates ------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [f"Bearer {TOKEN}", TOKEN])
async def test_an_update_is_requested_with_the_master_token(
    served: Worker, given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    mark = tmp_path / ".force_update"
    monkeypatch.setattr("api.vast.worker_app.UPDATE_REQUEST_FILE", mark)
    response = await served.http.post("/pyworker/update", headers={"authorization": given})
    assert (response.status_code, response.content) == (200, b'{"ok": true}')
    assert mark.read_bytes() == b""


@pytest.mark.parametrize("token", [TOKEN, ""])
async def test_an_update_is_not_requested_without_the_master_token(
    served: Worker, token: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Without a token, updates are not accepted from anyone."""
    mark = tmp_path / ".force_update"
    monkeypatch.setattr("api.vast.worker_app.UPDATE_REQUEST_FILE", mark)
    served.app._token = token
    for given in (None, "", "Bearer ", "Bearer wrong", "wrong", "Bearer é"):
        headers = {} if given is None else {b"authorization": given.encode()}
        response = await served.http.post("/pyworker/update", headers=headers)
        assert (response.status_code, response.content) == (401, b'{"error": "unauthorized"}')
    assert not mark.exists()


async def test_an_update_whose_file_cannot_be_written_is_500(
    served: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr("api.vast.worker_app.UPDATE_REQUEST_FILE", tmp_path / "nowhere" / "mark")
    headers = {"authorization": f"Bearer {TOKEN}"}
    response = await served.http.post("/pyworker/update", headers=headers)
    assert response.status_code == 500
    assert response.json()["error"].startswith("failed to write file: ")
