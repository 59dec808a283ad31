"""The stand-in for the autoscaler, over HTTP."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from tests.vast import autoscaler as module
from tests.vast.autoscaler import NO_PEM, Autoscaler, running
from tests.vast.signing import Signer
from tests.vast.signing_requests import rsa_key, signing_request
from tests.vast.test_ledger import IDLE

pytestmark = pytest.mark.slow

Json = dict[str, Any]
ENTRY = {
    "request_idx": 1,
    "success": True,
    "status": "Success",
    "entered_queue_at": 10.0,
    "work_started_at": 10.1,
    "work_completed_at": 10.2,
}


@pytest.fixture
def autoscaler() -> Iterator[Autoscaler]:
    with running(Autoscaler(signer=Signer(rsa_key()))) as started:
        yield started


@pytest.fixture
def http(autoscaler: Autoscaler) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=autoscaler.url) as client:
        yield client


def report(http: httpx2.Client, **changes: Any) -> int:
    return http.post("/worker_status/", json=IDLE | changes).status_code


def route(http: httpx2.Client, **changes: Any) -> Json:
    asked = {"endpoint": "ep", "api_key": "k", "cost": 7, "request_idx": 0, "replay_timeout": 60.0}
    answer = http.post("/route/", params={"api_key": "k"}, json=asked | changes)
    assert answer.status_code == 200
    sent: Json = answer.json()
    return sent


def delete(http: httpx2.Client, body: Json) -> int:
    whole = {"worker_id": 1, "mtoken": "t"} | body
    return http.post("/delete_requests/", json=whole).status_code


def test_a_client_waits_until_a_worker_is_loaded(http: httpx2.Client) -> None:
    first = route(http)
    assert set(first) == {"endpoint", "status", "request_idx"}
    report(http, loadtime=0.0, max_perf=0.0)
    assert "url" not in route(http, request_idx=first["request_idx"])
    report(http)
    sent = route(http, request_idx=first["request_idx"])
    assert sent["url"] == IDLE["url"]
    assert sent["request_idx"] == first["request_idx"] == 1
    assert set(sent) == {
        *("url", "endpoint", "cost", "reqnum", "request_idx"),
        *("signature", "status", "__request_id"),
    }


def test_a_retry_keeps_its_index_and_gets_the_next_number(http: httpx2.Client) -> None:
    report(http)
    answers = [route(http), route(http, request_idx=1), route(http)]
    assert [(x["request_idx"], x["reqnum"]) for x in answers] == [(1, 1), (1, 2), (2, 3)]


def test_each_worker_has_its_own_numbers_and_clients_are_spread(http: httpx2.Client) -> None:
    report(http)
    report(http, id=2, url="http://127.0.0.1:3001")
    answers = [route(http) for _ in range(4)]
    assert sorted((x["url"], x["reqnum"]) for x in answers) == [
        *((IDLE["url"], n) for n in (1, 2)),
        *(("http://127.0.0.1:3001", n) for n in (1, 2)),
    ]


def test_a_worker_in_error_gets_no_clients_until_it_recovers(http: httpx2.Client) -> None:
    report(http)
    report(http, error_msg="out of memory")
    assert "url" not in route(http)
    report(http)
    assert "url" in route(http)


def test_a_restarted_worker_is_loading_again(http: httpx2.Client) -> None:
    report(http)
    report(http, loadtime=0.0, max_perf=0.0)
    assert "url" not in route(http)


def test_a_worker_of_the_oldest_form_reports_its_load_time_once(http: httpx2.Client) -> None:
    old = {key: value for key, value in IDLE.items() if key not in ("version", "mtoken")}
    for loadtime in (2.5, 0.0):
        http.post("/worker_status/", json=old | {"loadtime": loadtime})
    assert "url" in route(http)


@pytest.mark.parametrize("cost", [256, 256.0])
def test_a_cost_keeps_its_json_type(http: httpx2.Client, cost: float) -> None:
    report(http)
    assert type(route(http, cost=cost)["cost"]) is type(cost)


def test_the_form_decides_what_is_signed_and_what_a_client_gets(
    http: httpx2.Client, autoscaler: Autoscaler
) -> None:
    report(http)
    signatures = {}
    for form in ("A", "B", "C1", "C2"):
        autoscaler.sign_as(form)
        answers = [route(http), route(http)]
        assert all(("request_idx" in answer) is (form != "A") for answer in answers)
        signatures[form] = [answer["signature"] for answer in answers]
    assert signatures["C1"] == signatures["C2"]
    assert len(set(signatures["C2"])) == 1
    assert len({*signatures["A"], *signatures["B"], *signatures["C2"]}) == 5


@pytest.mark.parametrize("prefix", ["", "/api/v0"])
def test_an_address_may_have_a_path(
    http: httpx2.Client, autoscaler: Autoscaler, prefix: str
) -> None:
    assert "PUBLIC KEY" in http.get(f"{prefix}/pubkey/").text
    assert http.post(f"{prefix}/worker_status/", json=IDLE).status_code == 200
    assert autoscaler.ledger.reports[0].address == f"{autoscaler.url}{prefix}"


def test_deletions_are_recorded_in_either_format(
    http: httpx2.Client, autoscaler: Autoscaler
) -> None:
    report(http)
    assert delete(http, {"requests": [ENTRY]}) == 200
    assert delete(http, {"request_idxs": [2, 3], "success": False}) == 200
    booked = [(x.request_idx, x.success, x.status) for x in autoscaler.ledger.deletions]
    assert booked == [(1, True, "Success"), (2, False, None), (3, False, None)]


def test_the_oldest_form_has_no_deletions(http: httpx2.Client, autoscaler: Autoscaler) -> None:
    report(http)
    autoscaler.sign_as("A")
    assert delete(http, {"requests": [ENTRY]}) == 404


@pytest.mark.parametrize(
    "body",
    [
        {"requests": [ENTRY | {"colour": "red"}]},
        {"requests": [{}]},
        {"requests": [ENTRY | {"request_idx": None}]},
        {"request_idxs": [1]},
        {"requests": [ENTRY], "mtoken": "another"},
        {"requests": [ENTRY], "worker_id": 2},
    ],
    ids=["unknown-key", "no-keys", "no-index", "no-success", "another-mtoken", "another-worker"],
)
def test_an_invalid_deletion_is_refused_and_recorded(
    http: httpx2.Client, autoscaler: Autoscaler, body: Json
) -> None:
    report(http)
    assert delete(http, body) == 400
    assert autoscaler.ledger.deletions == []
    assert len(autoscaler.ledger.refusals) == 1
    assert autoscaler.complaints()


def test_a_report_without_an_id_or_without_json_is_refused(
    http: httpx2.Client, autoscaler: Autoscaler
) -> None:
    assert http.post("/worker_status/", json={}).status_code == 400
    assert http.post("/worker_status/", content=b"loaded!").status_code == 400
    assert autoscaler.ledger.reports == []
    assert len(autoscaler.complaints()) == 2


def test_a_path_without_its_slash_is_404(http: httpx2.Client) -> None:
    assert http.post("/worker_status", json=IDLE).status_code == 404


def test_a_complete_request_leaves_no_complaint(
    http: httpx2.Client, autoscaler: Autoscaler
) -> None:
    report(http)
    envelope = autoscaler.envelope({"inputs": "Hi", "parameters": {"max_new_tokens": 7}})
    assert envelope["session_id"] is None
    assert envelope["auth_data"]["cost"] == 7
    assert autoscaler.settled(timeout_s=0) != []
    delete(http, {"requests": [ENTRY]})
    report(http, new_load=7, cur_perf=7, num_requests_recieved=1)
    assert autoscaler.settled() == []
    assert http.get("/_complaints").json() == []
    assert http.get("/_complaints", params={"in_sessions": 5}).json() != []


def test_an_envelope_requires_a_ready_worker(http: httpx2.Client, autoscaler: Autoscaler) -> None:
    with pytest.raises(LookupError, match="no worker is ready"):
        autoscaler.envelope({"inputs": "Hi"})
    refused = http.post("/_envelope", json={"inputs": "Hi"})
    assert refused.status_code == 503
    report(http)
    assert http.post("/_envelope", json={"inputs": "Hi"}).json()["payload"] == {"inputs": "Hi"}


def test_the_console_has_the_endpoint_and_its_workers(http: httpx2.Client) -> None:
    found = http.get("/api/v0/endptjobs/", params={"client_id": "me"}).json()["results"]
    assert http.get(f"/api/v0/endptjobs/{found[0]['id']}/").json() == {"result": found[0]}
    report(http)
    (worker,) = http.post("/get_endpoint_workers/", json={"id": 5, "api_key": "k"}).json()
    assert (worker["id"], worker["status"], worker["perf"]) == (1, "ready", 100.0)


def sign(http: httpx2.Client, body: bytes | None = None, instance_id: str = "1") -> Any:
    params = {"instance_id": instance_id}
    return http.post("/api/v0/sign_cert/", params=params, content=body or signing_request())


def test_a_certificate_is_issued_and_the_root_is_public(http: httpx2.Client) -> None:
    assert sign(http).text.startswith("-----BEGIN CERTIFICATE-----")
    assert http.get("/static/jvastai_root.cer").text.startswith("-----BEGIN CERTIFICATE-----")
    assert http.get("/_ledger").json()["certificate_requests"] == [1]


def test_a_certificate_is_refused_with_the_reason(
    http: httpx2.Client, autoscaler: Autoscaler
) -> None:
    assert "no PEM" in sign(http, b"hello").text
    assert sign(http, b"hello").status_code == 400
    assert sign(http, instance_id="C.1").status_code == 400
    assert len(autoscaler.ledger.refusals) == 3


def test_the_console_can_answer_with_a_wrong_certificate(
    http: httpx2.Client, autoscaler: Autoscaler
) -> None:
    autoscaler.issue("page")
    assert sign(http).text == NO_PEM
    autoscaler.issue("other_key")
    assert "BEGIN CERTIFICATE" in sign(http).text
    with pytest.raises(ValueError, match="right, other_key, page"):
        autoscaler.issue("none")


def test_the_public_key_can_be_wrong_or_missing(
    http: httpx2.Client, autoscaler: Autoscaler
) -> None:
    right = http.get("/pubkey/").text
    autoscaler.serve_key("wrong")
    assert http.get("/pubkey/").text not in (right, NO_PEM)
    autoscaler.serve_key("page")
    assert http.get("/pubkey/").text == NO_PEM
    autoscaler.serve_key("none")
    assert http.get("/pubkey/").status_code == 404
    autoscaler.heal()
    assert http.get("/pubkey/").text == right


def test_a_rotated_key_signs_and_is_served(http: httpx2.Client, autoscaler: Autoscaler) -> None:
    report(http)
    before = (http.get("/pubkey/").text, route(http)["signature"])
    autoscaler.rotate_key()
    after = (http.get("/pubkey/").text, route(http)["signature"])
    assert not set(before) & set(after)


def test_a_route_fails_as_often_as_it_is_told_to(
    http: httpx2.Client, autoscaler: Autoscaler
) -> None:
    autoscaler.fail("worker_status", status=502, times=2)
    assert [report(http) for _ in range(3)] == [502, 502, 200]
    assert len(autoscaler.ledger.reports) == 1
    autoscaler.fail("worker_status")
    assert [report(http) for _ in range(3)] == [500, 500, 500]
    assert http.get("/pubkey/").status_code == 200
    with pytest.raises(ValueError, match="none of pubkey, worker_status"):
        autoscaler.fail("worker-status")


def test_a_slow_route_answers_in_the_end(http: httpx2.Client, autoscaler: Autoscaler) -> None:
    autoscaler.slow("pubkey", 0.2)
    began = time.monotonic()
    assert http.get("/pubkey/").status_code == 200
    assert time.monotonic() - began >= 0.2


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/pubkey/").status_code == 200
    except httpx2.TransportError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_address_that_was_down_comes_back_at_the_same_port(autoscaler: Autoscaler) -> None:
    autoscaler.down(0.3)
    wait_until(lambda: not answers(autoscaler.url))
    wait_until(lambda: answers(autoscaler.url))


def test_one_address_of_two_may_be_down() -> None:
    with running(Autoscaler(), 0, 0) as autoscaler:
        one, two = autoscaler.url.split(",")
        autoscaler.down(60)
        wait_until(lambda: not answers(one))
        assert httpx2.post(f"{two}/worker_status/", json=IDLE).status_code == 200
        assert [x.address for x in autoscaler.ledger.reports] == [two]


def test_a_wait_ends_when_its_condition_holds_or_times_out(
    http: httpx2.Client, autoscaler: Autoscaler
) -> None:
    with pytest.raises(TimeoutError, match="not within"):
        autoscaler.wait_until_ready(timeout_s=0.05)
    report(http)
    autoscaler.wait_until_ready(timeout_s=0)


def test_controls_are_reached_over_http(http: httpx2.Client) -> None:
    control = "/_control/fail"
    asked = {"route": "pubkey", "status": 503, "times": 1}
    assert http.post(control, json=asked).status_code == 200
    assert [http.get("/pubkey/").status_code for _ in range(2)] == [503, 200]
    assert http.post(control, json={"status": 503}).status_code == 400
    assert http.post(control, json={"route": "moon"}).status_code == 400
    assert http.post("/_control/ledger").status_code == 404


def test_every_control_is_in_the_help() -> None:
    assert all(f"/_control/{name}" in module.EPILOG for name in module.CONTROLS)


def test_the_program_prints_its_address_and_what_happens() -> None:
    command = [sys.executable, "-m", "tests.vast.autoscaler", "--port", "0", "--addresses", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        urls = process.stdout.readline().removeprefix("Autoscaler on ").strip().split(",")
        for url in urls:
            httpx2.post(f"{url}/worker_status/", json=IDLE).raise_for_status()
        ledger = httpx2.get(f"{urls[0]}/_ledger").json()
        process.terminate()
        assert process.stdout.read().startswith("worker 1 is ready at http://127.0.0.1:3000")
    assert process.returncode == 0
    assert [x["address"] for x in ledger["reports"]] == urls
    assert json.dumps(IDLE) == json.dumps(ledger["reports"][0]["body"])
