"""Fetching the autoscaler's public key, and serving requests while it changes."""

import asyncio

import httpx2
import pytest

from api.vast.active_errors import ActiveErrors
from api.vast.public_key import MISSING, PublicKeys
from tests.api.client import until
from tests.api.vast.worker import Autoscaler, Worker, signer, worker

pytestmark = pytest.mark.anyio

FIRST, SECOND = "https://a.example/api/v0", "https://b.example"


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("api.vast.public_key.time", clock)
    return clock


class Fetch:
    """A `PublicKeys` that records its pauses instead of waiting, up to `most_sleeps` of them."""

    def __init__(self, addresses: list[str] | None = None, *, most_sleeps: int = 20) -> None:
        self.autoscaler, self.errors = Autoscaler(signer().pem), ActiveErrors()
        self.sleeps: list[float] = []
        self.messages: list[str] = []
        self.most_sleeps = most_sleeps
        self.keys = PublicKeys(
            self.autoscaler.client(), addresses or [FIRST], self.errors, self._sleep
        )

    async def _sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.messages.append(self.errors.message)
        if len(self.sleeps) == self.most_sleeps:
            raise TimeoutError


async def test_the_key_is_fetched_below_the_path_of_the_address() -> None:
    fetch = Fetch()
    await fetch.keys.obtain()
    assert fetch.autoscaler.urls() == [f"{FIRST}/pubkey/"]
    assert len(fetch.keys.keys) == 1


async def test_each_address_is_tried_in_order() -> None:
    fetch = Fetch([FIRST, SECOND])
    fetch.autoscaler.answers = {FIRST: [500]}
    await fetch.keys.obtain()
    assert fetch.autoscaler.urls() == [f"{FIRST}/pubkey/", f"{SECOND}/pubkey/"]
    assert not fetch.sleeps


async def test_a_pkcs1_key_is_read() -> None:
    fetch = Fetch()
    fetch.autoscaler.pem = signer().pkcs1_pem
    await fetch.keys.obtain()
    assert len(fetch.keys.keys) == 1


@pytest.mark.parametrize("text", ["", "<html>", "-----BEGIN PUBLIC KEY-----\né", "\0"])
async def test_an_answer_that_is_no_key_is_ignored(text: str) -> None:
    fetch = Fetch(most_sleeps=1)
    fetch.autoscaler.pem = text
    with pytest.raises(TimeoutError):
        await fetch.keys.obtain()
    assert fetch.keys.keys == []


async def test_a_redirection_is_followed() -> None:
    """Vast's stock worker follows redirects too."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.scheme == "http":
            return httpx2.Response(308, headers={"location": "https://run.example/pubkey/"})
        return httpx2.Response(200, text=signer().pem)

    transport = httpx2.MockTransport(answer)
    keys = PublicKeys(
        httpx2.AsyncClient(transport=transport), ["http://run.example"], ActiveErrors()
    )
    async with asyncio.timeout(0.5):
        await keys.obtain()


async def test_pauses_between_attempts_grow_and_attempts_never_stop() -> None:
    fetch = Fetch(most_sleeps=100)
    fetch.autoscaler.answers = {FIRST: [500]}
    with pytest.raises(TimeoutError):
        await fetch.keys.obtain()
    assert fetch.sleeps[:4] == [1, 2, 4, 8]
    assert set(fetch.sleeps[4:]) == {15}


async def test_a_missing_key_is_reported_after_five_attempts_and_not_before() -> None:
    fetch = Fetch(most_sleeps=7)
    fetch.autoscaler.answers = {FIRST: [httpx2.ConnectError("no route")]}
    with pytest.raises(TimeoutError):
        await fetch.keys.obtain()
    assert fetch.messages == ["", "", "", "", MISSING, MISSING, MISSING]


async def test_a_late_key_clears_the_error() -> None:
    fetch = Fetch()
    fetch.autoscaler.answers = {FIRST: [*[500] * 9, 200]}
    await fetch.keys.obtain()
    assert fetch.messages[-1] == MISSING
    assert fetch.errors.message == ""
    assert len(fetch.keys.keys) == 1


# -- a new key ----------------------------------------------------------------------------


async def ask(served: Worker, by: str) -> int:
    body = served.envelope()
    body["auth_data"] = signer(by).auth()
    return (await served.http.post("/generate", json=body)).status_code


async def test_a_request_signed_with_a_new_key_waits_for_it_and_passes(clock: Clock) -> None:
    async with worker() as served:
        served.autoscaler.pem = signer("new").pem
        clock.now += 3600
        assert await ask(served, "new") == 200
        assert len(served.autoscaler.urls("pubkey")) == 2


async def test_many_requests_that_wait_for_a_new_key_share_one_fetch(clock: Clock) -> None:
    async with worker() as served:
        served.autoscaler.pem = signer("new").pem
        clock.now += 3600
        assert await asyncio.gather(*(ask(served, "new") for _ in range(20))) == [200] * 20
        assert len(served.autoscaler.urls("pubkey")) == 2


async def test_the_previous_key_is_accepted_for_a_minute(clock: Clock) -> None:
    async with worker() as served:
        served.autoscaler.pem = signer("new").pem
        clock.now += 3600
        assert await ask(served, "new") == 200
        clock.now += 59
        assert await ask(served, "autoscaler") == 200
        clock.now += 2
        assert await ask(served, "autoscaler") == 401
        assert await ask(served, "new") == 200


async def test_forged_requests_do_not_flood_the_autoscaler(clock: Clock) -> None:
    async with worker() as served:
        for _ in range(100):
            clock.now += 0.1
            assert await ask(served, "forger") == 401
        assert len(served.autoscaler.urls("pubkey")) <= 4


async def test_forged_requests_do_not_flood_an_autoscaler_that_fails(clock: Clock) -> None:
    async with worker() as served:
        served.autoscaler.answers = {"pubkey": [500]}
        for _ in range(100):
            clock.now += 0.1
            assert await ask(served, "forger") == 401
        assert len(served.autoscaler.urls("pubkey")) <= 4
        assert await ask(served, "autoscaler") == 200


async def test_good_requests_do_not_wait_while_a_new_key_is_fetched(clock: Clock) -> None:
    held = asyncio.Event()

    async def answer(_: httpx2.Request) -> httpx2.Response:
        await held.wait()
        return httpx2.Response(200, text=signer().pem)

    async with worker() as served:
        served.keys._http = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))
        clock.now += 3600
        forged = asyncio.ensure_future(ask(served, "forger"))
        await until(lambda: served.keys._refreshing is not None)
        assert await ask(served, "autoscaler") == 200
        held.set()
        assert await forged == 401


async def test_a_request_that_stops_waiting_does_not_cancel_the_fetch_for_others(
    clock: Clock,
) -> None:
    held = asyncio.Event()

    async def answer(_: httpx2.Request) -> httpx2.Response:
        await held.wait()
        return httpx2.Response(200, text=signer("new").pem)

    async with worker() as served:
        served.keys._http = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))
        clock.now += 3600
        gone = asyncio.ensure_future(ask(served, "new"))
        stays = asyncio.ensure_future(ask(served, "new"))
        await until(lambda: served.keys._refreshing is not None)
        gone.cancel()
        await asyncio.sleep(0.01)
        held.set()
        assert await stays == 200
