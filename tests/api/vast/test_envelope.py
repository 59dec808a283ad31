"""How the gateway answers, whatever a client sends."""

import asyncio
import json
import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.server import server_config
from tests.api.client import client
from tests.api.scripted import ScriptedEngine, finished, output
from tests.api.vast.worker import AUTH, PAYLOAD, TOKEN, URL, Worker, signer, worker

pytestmark = pytest.mark.anyio

MISSING = "field missing"
BOTH_MISSING = b'{"auth_data": "field missing", "payload": "field missing"}'
INVALID_JSON = b'{"error": "invalid JSON"}'
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}


def unsigned(**fields: Any) -> dict[str, Any]:
    return AUTH | {"signature": "Zm9yZ2Vk"} | fields


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in unsigned().items() if name not in names}


BAD_PAYLOADS: list[object] = [[], "text", 7, None]
MALFORMED = {
    b"": INVALID_JSON,
    b"{": INVALID_JSON,
    b"not json": INVALID_JSON,
    b'{"auth_data": "\xff"}': INVALID_JSON,
    b'{"auth_data": {}, "payload": "\\ud800"}': INVALID_JSON,
    b"[" * 5000 + b"]" * 5000: INVALID_JSON,
    b"[]": BOTH_MISSING,
    b"null": BOTH_MISSING,
    b"7": BOTH_MISSING,
    b'"text"': BOTH_MISSING,
    b"{}": BOTH_MISSING,
    b'{"session_id": null}': BOTH_MISSING,
    json.dumps({"payload": PAYLOAD}).encode(): b'{"auth_data": "field missing"}',
    json.dumps({"auth_data": None, "payload": {}}).encode(): b'{"auth_data": "field missing"}',
    json.dumps({"auth_data": [], "payload": {}}).encode(): b'{"auth_data": "field missing"}',
    json.dumps({"auth_data": unsigned()}).encode(): b'{"payload": "field missing"}',
    json.dumps({"auth_data": without("signature", "request_idx"), "payload": {}}).encode(): (
        b'{"auth_data": {"request_idx": "missing parameter", "signature": "missing parameter"}}'
    ),
    json.dumps({"auth_data": without("url"), "payload": 7}).encode(): (
        b'{"auth_data": {"url": "missing parameter"}, '
        b'"payload": {"data": "payload must be a dictionary"}}'
    ),
    json.dumps({"auth_data": {"request_idx": 1, "url": URL}, "payload": {}}).encode(): (
        b'{"auth_data": {"cost": "missing parameter", "endpoint": "missing parameter", '
        b'"reqnum": "missing parameter", "signature": "missing parameter"}}'
    ),
    **{
        json.dumps({"auth_data": unsigned(), "payload": payload}).encode(): (
            b'{"payload": {"data": "payload must be a dictionary"}}'
        )
        for payload in BAD_PAYLOADS
    },
}


async def test_a_malformed_envelope_is_422_and_says_what_it_lacks() -> None:
    async with worker() as served:
        for raw, answer in MALFORMED.items():
            response = await served.http.post("/generate", content=raw)
            assert (response.status_code, response.content) == (422, answer), raw[:200]
            assert response.headers["content-type"] == "application/json; charset=utf-8"
        assert not served.workload.ended
        assert served.workload.num_received == 0


@pytest.mark.parametrize("unsecured", [True, False])
async def test_each_field_is_required_even_by_an_unsecured_worker(unsecured: bool) -> None:
    async with worker(unsecured=unsecured) as served:
        for name in [*AUTH, "signature"]:
            if name == "request_idx" and not unsecured:
                continue  # the oldest generation has none: its signature decides
            body = {"auth_data": without(name), "payload": PAYLOAD}
            response = await served.http.post("/generate", json=body)
            assert response.status_code == 422
            assert response.json() == {"auth_data": {name: "missing parameter"}}


@pytest.mark.parametrize("form", ["A", "B", "C"])
async def test_a_complete_envelope_of_any_generation_with_a_bad_signature_is_401(
    form: str,
) -> None:
    async with worker() as served:
        body = served.envelope(form=form)
        for signature in [*BAD_SIGNATURES, signer("forger").auth(form)["signature"]]:
            body["auth_data"]["signature"] = signature
            response = await served.http.post("/generate", json=body)
            assert (response.status_code, response.content) == (401, b""), signature


async def test_the_oldest_generation_signs_without_request_idx_and_is_served() -> None:
    async with worker() as served:
        assert (await served.ask(form="A")).status_code == 200
        assert not served.workload.ended


async def test_the_newer_generations_are_not_served_without_request_idx() -> None:
    async with worker() as served:
        auth = served.signer.auth("C")
        del auth["request_idx"]
        response = await served.http.post("/generate", json={"auth_data": auth, "payload": PAYLOAD})
        assert response.status_code == 422
        assert response.content == b'{"auth_data": {"request_idx": "missing parameter"}}'


async def test_an_unknown_session_is_410() -> None:
    async with worker() as served:
        response = await served.ask(session_id="abc")
        assert response.status_code == 410
        assert response.content == b'{"error": "invalid session"}'
        assert not served.workload.ended


async def test_a_session_id_of_another_type_is_an_unknown_one() -> None:
    async with worker() as served:
        ids: list[Any] = [0, True, [], {}, 1.5, ""]
        assert [(await served.ask(session_id=each)).status_code for each in ids] == [410] * 6


BAD_SIGNATURES: list[object] = [
    None,
    "",
    "?",
    "é",
    "Zm9yZ2Vk",
    7,
    1.5,
    True,
    [],
    {},
    [["x"]],
    "A" * 100_000,
]


async def test_a_forged_request_is_401_without_a_body_and_leaves_no_trace() -> None:
    async with worker() as served:
        body = served.envelope()
        for signature in BAD_SIGNATURES:
            body["auth_data"]["signature"] = signature
            response = await served.http.post("/generate", json=body)
            assert (response.status_code, response.content) == (401, b""), signature
            assert response.headers["content-length"] == "0"
        assert not served.engine.requests
        assert not served.workload.ended
        assert served.workload.load().rejected == 0


async def test_a_request_before_the_first_public_key_is_401_and_reported_as_rejected() -> None:
    async with worker(with_key=False) as served:
        response = await served.ask()
        assert (response.status_code, response.content) == (401, b"")
        assert served.outcomes() == [(42, "Rejected")]
        assert served.workload.load().rejected == 8


async def test_a_request_that_would_wait_too_long_is_429_without_a_body() -> None:
    async with worker(wait_s=lambda: 61.0) as served:
        response = await served.ask()
        assert (response.status_code, response.content) == (429, b"")
        assert response.headers["content-length"] == "0"
        assert "retry-after" not in response.headers
        assert served.outcomes() == [(42, "Rejected")]


async def test_json_fields_session_signature_and_queue_are_checked_in_this_order() -> None:
    async with worker(wait_s=lambda: 61.0) as served:

        async def status(body: object) -> int:
            return (await served.http.post("/generate", json=body)).status_code

        faulty: dict[str, Any] = {"auth_data": without("reqnum"), "session_id": "no"}
        faulty["payload"] = PAYLOAD
        assert await status(faulty) == 422
        faulty["auth_data"] = unsigned()
        assert await status(faulty) == 410
        faulty["session_id"] = None
        assert await status(faulty) == 401
        faulty["auth_data"] = served.signer.auth()
        assert await status(faulty) == 429


@pytest.mark.parametrize("slash", ["", "/"])
async def test_generate_is_served_with_and_without_a_slash(slash: str) -> None:
    async with worker() as served:
        response = await served.ask(path=f"/generate{slash}")
        assert response.status_code == 200
        assert response.json() == {"generated_text": " Hello you"}


@pytest.mark.parametrize("slash", ["", "/"])
async def test_streams_are_served_with_and_without_a_slash(slash: str) -> None:
    async with worker() as served:
        response = await served.ask(path=f"/generate_stream{slash}")
        assert response.headers["content-type"].startswith("text/event-stream")
        *tokens, nothing = response.text.split("\n\n")
        assert nothing == ""
        events = [json.loads(event.removeprefix("data:")) for event in tokens]
        assert [event["index"] for event in events] == [1, 2]
        assert [event["generated_text"] for event in events] == [None, " Hello you"]


async def test_openai_routes_are_served_in_envelopes() -> None:
    async with worker() as served:
        response = await served.ask(CHAT, "/v1/chat/completions")
        assert response.json()["choices"][0]["message"]["content"] == " Hello you"
        stream = await served.ask(CHAT | {"stream": True}, "/v1/chat/completions/")
        assert stream.text.endswith("data: [DONE]\n\n")
        answer = await served.ask({"prompt": "x", "max_tokens": 5}, "/v1/completions")
        assert answer.json()["choices"][0]["text"] == " Hello you"


REFUSED = {
    "an empty prompt": ("/generate", {"inputs": ""}),
    "a parameter out of range": ("/generate", {"inputs": "x", "parameters": {"temperature": 0}}),
    "a parameter of another type": ("/generate", {"inputs": "x", "parameters": {"top_k": "é"}}),
    "too many top tokens": ("/generate", {"inputs": "x", "parameters": {"top_n_tokens": 99}}),
    "no inputs": ("/generate", {"parameters": {}}),
    "a stream of several": ("/generate_stream", {"inputs": "x", "parameters": {"best_of": 2}}),
    "a chat without messages": ("/v1/chat/completions", {"messages": 7}),
    "no such route": ("/nowhere", {"inputs": "x"}),
}


@pytest.mark.parametrize(("path", "payload"), REFUSED.values(), ids=REFUSED)
async def test_errors_of_the_application_are_passed_on_to_the_byte(
    path: str, payload: object
) -> None:
    async with client(ScriptedEngine()) as bare, worker() as served:
        expected = await bare.post(
            path,
            content=json.dumps(payload).encode(),
            headers={"content-type": "application/json"},
        )
        response = await served.ask(payload, path)
        assert 400 <= expected.status_code < 500 or "stream" in path
        assert response.status_code == expected.status_code
        assert response.content == expected.content
        assert response.headers == expected.headers
        assert served.outcomes() == [(42, "Success")]


async def test_headers_of_the_application_are_passed_on() -> None:
    async with worker() as served:
        assert "x-generated-tokens" in (await served.ask()).headers


async def test_the_content_type_of_an_envelope_is_ignored() -> None:
    async with worker() as served:
        response = await served.http.post(
            "/generate",
            content=json.dumps(served.envelope()).encode(),
            headers={"content-type": "text/plain"},
        )
        assert response.status_code == 200


async def test_get_on_a_generation_route_is_405() -> None:
    async with worker() as served:
        response = await served.http.get("/generate")
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"


async def test_a_body_over_the_payload_limit_is_413() -> None:
    async with worker(payload_limit=1000) as served:
        response = await served.ask({"inputs": "x" * 100_000})
        assert response.status_code == 413


async def test_an_envelope_of_too_many_values_is_422() -> None:
    async with worker() as served:
        response = await served.ask(PAYLOAD | {"other": [[]] * 100_000})
        assert response.status_code == 422
        assert response.json() == {"error": "too many values"}
        response = await served.ask(PAYLOAD | {"other": "[]," * 100_000})
        assert response.status_code == 200


async def test_before_it_is_ready_a_worker_answers_ping_and_503_to_all_else() -> None:
    async with worker() as served:
        served.app.gateway = served.app.application = None
        response = await served.http.get("/ping")
        assert (response.status_code, response.content) == (200, b"pong")
        assert (await served.ask()).status_code == 503
        assert (await served.http.get("/health")).status_code == 503


# -- without an envelope ------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/generate", "/", "/tokenize", "/v1/chat/completions"])
async def test_a_body_without_an_envelope_is_refused(path: str) -> None:
    async with worker() as served:
        response = await served.http.post(path, json=PAYLOAD | CHAT)
        assert (response.status_code, response.content) == (422, BOTH_MISSING)
        assert not served.engine.requests


async def test_an_unsecured_worker_serves_a_body_without_an_envelope() -> None:
    async with worker(unsecured=True) as served:
        response = await served.http.post("/generate", json=PAYLOAD)
        assert response.json() == {"generated_text": " Hello you"}
        assert served.workload.load().served == 2
        assert not served.workload.ended


async def test_a_body_without_an_envelope_is_served_with_the_api_key() -> None:
    async with worker(api_key="owner") as served:
        mine = {"authorization": "Bearer owner"}
        response = await served.http.post("/generate", json=PAYLOAD, headers=mine)
        assert response.json() == {"generated_text": " Hello you"}
        other = {"authorization": "Bearer endpoint-key"}
        response = await served.http.post("/generate", json=PAYLOAD, headers=other)
        assert response.status_code == 422


async def test_an_unsecured_worker_with_an_api_key_requires_the_key_or_an_envelope() -> None:
    async with worker(api_key="owner", unsecured=True) as served:
        assert (await served.http.post("/generate", json=PAYLOAD)).status_code == 422


async def test_an_envelope_is_served_whatever_api_key_its_client_sends() -> None:
    async with worker(api_key="owner") as served:
        response = await served.http.post(
            "/generate?api_key=endpoint-key",
            json=served.envelope(),
            headers={"authorization": "Bearer endpoint-key"},
        )
        assert response.status_code == 200


@pytest.mark.parametrize("signature", BAD_SIGNATURES[:4])
async def test_an_unsecured_worker_ignores_signatures(signature: Any) -> None:
    async with worker(unsecured=True, with_key=False) as served:
        body = {"auth_data": AUTH | {"signature": signature}, "payload": PAYLOAD}
        assert (await served.http.post("/generate", json=body)).status_code == 200
        assert served.outcomes() == [(42, "Success")]


# -- random requests never fail the worker ----------------------------------------------

_NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**63, 2**64, 10**308, 10**309, 10**4000, -(10**400), 1e308, -0.0]),
)
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
_AUTH = st.dictionaries(st.sampled_from(["cost", "reqnum", "request_idx", "endpoint"]), _JSON)
_PARAMETERS = st.dictionaries(
    st.sampled_from(
        ["max_new_tokens", "temperature", "top_k", "seed", "stop", "best_of", "details", "grammar"]
    ),
    _JSON,
)
_PAYLOAD = st.one_of(
    st.builds(lambda inputs, asked: {"inputs": inputs, "parameters": asked}, _JSON, _PARAMETERS),
    st.builds(lambda asked: PAYLOAD | {"parameters": asked}, _PARAMETERS),
    st.builds(lambda limit: CHAT | {"max_tokens": limit, "inputs": "x"}, _JSON),
    st.dictionaries(st.sampled_from(["lifetime", "on_close_route", "on_close_payload"]), _JSON),
)
_PATHS = st.sampled_from(
    ["/generate", "/generate_stream/", "/", "/v1/chat/completions", "/session/create", "/nowhere"]
)
FUZZ = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def each_example_on_one_worker(check: Any, example: st.SearchStrategy[Any]) -> None:
    """Run `check` on random examples, and after each one encode the load as a report would."""
    with asyncio.Runner() as runner:
        context = worker(max_sessions=0)
        served = runner.run(context.__aenter__())

        @FUZZ
        @given(example)
        def run(drawn: Any) -> None:
            runner.run(check(served, *drawn))
            load = served.workload.load()
            told = [load.received, load.served, load.rejected, load.pending, *load.working]
            told += [ended.request_idx for ended in served.workload.ended]
            json.dumps(told, allow_nan=False)

        try:
            run()
        finally:
            runner.run(close(served))
            runner.run(context.__aexit__(None, None, None))


async def close(served: Worker) -> None:
    served.sessions.close_all()


@pytest.mark.slow
def test_no_signed_request_makes_the_worker_fail() -> None:
    async def check(served: Worker, auth: Any, payload: Any, path: str) -> None:
        body = served.envelope(payload)
        body["auth_data"] |= auth
        response = await served.http.post(path, content=json.dumps(body).encode())
        assert response.status_code < 500, response.content

    each_example_on_one_worker(check, st.tuples(_AUTH, _PAYLOAD, _PATHS))


def test_no_unsigned_request_makes_the_worker_fail() -> None:
    fields = st.dictionaries(st.sampled_from([*AUTH, "signature"]), _JSON)
    bodies = st.fixed_dictionaries(
        {}, optional={"auth_data": fields | _JSON, "payload": _JSON, "session_id": _JSON}
    )

    async def check(served: Worker, body: Any, path: str) -> None:
        response = await served.http.post(path, content=json.dumps(body).encode())
        assert response.status_code in (401, 410, 422)

    each_example_on_one_worker(check, st.tuples(bodies | _JSON, _PATHS))


def test_no_bytes_make_the_worker_fail() -> None:
    async def check(served: Worker, raw: bytes, path: str) -> None:
        assert (await served.http.post(path, content=raw)).status_code == 422

    pieces = st.sampled_from([b"{", b"}", b"[", b'"auth_data":', b"NaN", b'"\\ud800"', b"\xff"])
    raw = st.lists(pieces | st.binary(max_size=4), max_size=12).map(b"".join)
    each_example_on_one_worker(check, st.tuples(raw, _PATHS))


@pytest.mark.parametrize("form", ["A", "B", "C"])
async def test_a_request_number_of_any_type_never_fails_the_worker(form: str) -> None:
    async with worker() as served:
        for reqnum in ["5", True, None, 1.5, [], {}, -(10**4000), 10**4000, 8]:
            assert (await served.ask(form=form, reqnum=reqnum)).status_code in (200, 401)


async def test_a_huge_request_number_in_the_newest_form_does_not_lock_out_others() -> None:
    """The newest form does not sign the number, so a client can send any."""
    async with worker() as served:
        assert (await served.ask(form="C", reqnum=10**4000)).status_code == 200
        assert (await served.ask(form="C", reqnum=1)).status_code == 200
        assert (await served.ask(form="B", reqnum=1)).status_code == 200


@pytest.mark.parametrize("limit", [10**400, 1e308, float("inf"), float("nan"), -5, True, "8", []])
@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens"])
async def test_any_token_limit_keeps_the_workload_consistent(name: str, limit: Any) -> None:
    engine = ScriptedEngine(lambda _: [[output("a"), finished("a", 1)]])
    async with worker(engine) as served:
        payload = {"inputs": "x", "parameters": {name: limit}} | CHAT | {name: limit}
        for path in ("/generate", "/v1/chat/completions"):
            assert (await served.ask(payload, path)).status_code < 500
        before = served.workload.load().served
        assert (await served.ask()).status_code == 200
        load = served.workload.load()
        assert load.pending == 0
        assert load.served - before == 1
        assert load.received == load.served


@pytest.mark.parametrize("cost", [10**400, 1e308, float("inf"), float("nan"), -5, "256", None])
async def test_any_session_cost_keeps_the_workload_consistent(cost: Any) -> None:
    async with worker() as served:
        assert (await served.ask({}, "/session/create", cost=cost)).status_code == 201
        json.dumps(served.workload.load().pending, allow_nan=False)
        served.sessions.close_all()
        before = served.workload.load()
        assert before.received == before.served < 1e10
        assert (await served.ask()).status_code == 200
        assert served.workload.load().received - before.received == 2


# -- secrets ------------------------------------------------------------------------------


async def test_no_log_line_contains_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the test's own client
    async with worker() as served:
        good, forged = served.envelope(), served.envelope()
        forged["auth_data"]["signature"] = signer("forger").sign("x")
        for body in (good, forged, {"auth_data": unsigned(signature="c2VjcmV0")}):
            for path in ("/generate", "/generate_stream", "/session/create", "/nowhere"):
                await served.http.post(
                    f"{path}?api_key=endpoint-key",
                    json=body,
                    headers={"authorization": "Bearer endpoint-key"},
                )
        await served.http.post("/pyworker/update", headers={"authorization": "Bearer wrong-token"})
        served.sessions.close_all()
    secrets = [
        "endpoint-key",
        "api_key",
        TOKEN,
        "wrong-token",
        "c2VjcmV0",
        good["auth_data"]["signature"],
        forged["auth_data"]["signature"],
    ]
    assert caplog.records
    for record in caplog.records:
        text = f"{record.getMessage()} {vars(record)}"
        assert not any(secret in text for secret in secrets), record


def test_the_server_writes_no_access_log() -> None:
    """An access log would contain the query string, which may contain an API key."""
    assert server_config(None, "0.0.0.0", 1, 1).access_log is False  # type: ignore[arg-type]
