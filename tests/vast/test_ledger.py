"""A ledger that adds up has no complaints, and each way in which it may not add up has one."""

from dataclasses import replace
from typing import Any

import pytest

from tests.vast.ledger import Attempt, Deletion, Ledger, Report

IDLE: dict[str, Any] = {
    "id": 1,
    "mtoken": "t",
    "version": "1.1.0",
    "loadtime": 2.5,
    "cur_load": 0,
    "rej_load": 0,
    "new_load": 0,
    "error_msg": "",
    "max_perf": 100.0,
    "cur_perf": 0,
    "cur_capacity": 0,
    "max_capacity": 0,
    "num_requests_working": 0,
    "num_requests_recieved": 0,
    "additional_disk_usage": -0.1,
    "disk_usage": 10.5,
    "working_request_idxs": [],
    "url": "http://127.0.0.1:3000",
}


def report(**changes: Any) -> Report:
    return Report(0.0, "", IDLE | changes)


def deletion(request_idx: int, status: str, **changes: Any) -> Deletion:
    began, ended = status != "Rejected", status in ("Success", "Error")
    entry = Deletion(
        0.0,
        "",
        1,
        request_idx,
        success=status in ("Success", "Cancelled"),
        status=status,
        entered_queue_at=10.0,
        work_started_at=10.1 if began else 0.0,
        work_completed_at=10.2 if ended else 0.0,
    )
    return replace(entry, **changes)


def one_of_each() -> Ledger:
    """Served 5, errored 7, cancelled 11, rejected 13: every sum shows which of them are in it."""
    costs = {"Success": 5, "Error": 7, "Cancelled": 11, "Rejected": 13}
    return Ledger(
        attempts=[Attempt(0.0, 1, n, n, cost) for n, cost in enumerate(costs.values(), 1)],
        reports=[
            report(new_load=23, cur_load=23, num_requests_recieved=3, **working(1, 2, 3)),
            report(cur_perf=5, rej_load=13, num_requests_recieved=4),
        ],
        deletions=[deletion(n, status) for n, status in enumerate(costs, 1)],
    )


def working(*request_idxs: int) -> dict[str, Any]:
    return {
        "num_requests_working": len(request_idxs),
        "working_request_idxs": list(request_idxs),
    }


def change_last_report(ledger: Ledger, **changes: Any) -> None:
    ledger.reports[-1] = Report(0.0, "", ledger.reports[-1].body | changes)


def test_one_of_each_outcome_adds_up() -> None:
    assert one_of_each().complaints() == []
    assert Ledger().complaints() == []


def test_a_request_cancelled_before_it_was_reported_adds_up() -> None:
    ledger = one_of_each()
    ledger.reports[0] = report(new_load=12)
    assert ledger.complaints() == []


def test_a_retry_requires_a_second_deletion() -> None:
    ledger = one_of_each()
    ledger.attempts.append(Attempt(0.0, 1, 5, 4, 13))
    change_last_report(ledger, num_requests_recieved=5)
    assert ledger.complaints() == ["request 4: 2 attempts, 1 deletions"]
    ledger.deletions.append(deletion(4, "Success"))
    change_last_report(ledger, cur_perf=18)
    ledger.reports[0] = report(new_load=36)
    assert ledger.complaints() == []


def test_a_surplus_deletion_is_a_complaint() -> None:
    ledger = one_of_each()
    ledger.deletions.append(deletion(2, "Error"))
    assert ledger.complaints() == ["request 2: 1 attempts, 2 deletions"]


def test_attempts_without_an_index_require_load_but_no_deletion() -> None:
    ledger = Ledger(attempts=[Attempt(0.0, 1, 1, None, 5)])
    ledger.reports = [report(num_requests_recieved=1, new_load=5, cur_perf=5)]
    assert ledger.complaints() == []
    change_last_report(ledger, cur_perf=0, new_load=0)
    assert ledger.complaints()[0] == "load served: 0.0 reported, 5.0 due"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cur_load": 5}, "worker 1: cur_load is 5.0 at last"),
        (working(9), "worker 1: num_requests_working is 1.0 at last"),
        ({"num_requests_recieved": 3}, "worker 1: 3.0 requests received, 4 sent"),
        ({"cur_perf": 4}, "load served: 4.0 reported, 5.0 due"),
        ({"rej_load": 0}, "load rejected: 0.0 reported, 13 due"),
        ({"new_load": 1}, "load received: 24.0 reported, 5.0 due and 18 unfinished"),
        ({"version": "1.0.0"}, "report: version is not 1.1.0"),
        ({"max_perf": 0}, "report: loaded with a max_perf of 0"),
        ({"new_load": -0.5}, "report: new_load is negative"),
        ({"id": True}, "report: id is True"),
        ({"error_msg": None}, "report: error_msg is None"),
        ({"working_request_idxs": [1]}, "report: working_request_idxs are not num_requests"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_report_that_does_not_add_up_is_a_complaint(changes: dict[str, Any], told: str) -> None:
    ledger = one_of_each()
    change_last_report(ledger, **changes)
    assert any(complaint.startswith(told) for complaint in ledger.complaints())


def test_a_report_that_lacks_a_key_is_invalid() -> None:
    body = {key: value for key, value in IDLE.items() if key != "disk_usage"}
    assert Report(0.0, "", body).faults() == ["disk_usage is None"]


def test_the_start_scripts_final_error_is_a_valid_report() -> None:
    body = {key: IDLE[key] for key in ("id", "mtoken", "version", "url")}
    assert Report(0.0, "", body | {"error_msg": "no disk"}).faults() == []
    assert Report(0.0, "", body | {"error_msg": ""}).faults() != []


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        ("Success", {"success": False}),
        ("Success", {"work_completed_at": 0.0}),
        ("Success", {"work_started_at": 9.0}),
        ("Error", {"success": True}),
        ("Cancelled", {"success": False}),
        ("Cancelled", {"work_completed_at": 11.0}),
        ("Rejected", {"success": True}),
        ("Rejected", {"work_started_at": 10.1}),
        ("Rejected", {"entered_queue_at": 0.0}),
        ("Lost", {}),
    ],
)
def test_a_deletion_that_contradicts_itself_is_invalid(
    status: str, changes: dict[str, Any]
) -> None:
    assert deletion(1, status, **changes).faults()


def test_load_in_sessions_is_served_without_an_attempt() -> None:
    ledger = one_of_each()
    change_last_report(ledger, cur_perf=25, new_load=20)
    assert ledger.complaints(in_sessions=20) == []
    assert ledger.complaints() != []


def test_a_counter_restarts_with_its_process() -> None:
    ledger = one_of_each()
    ledger.attempts.append(Attempt(0.0, 1, 5, 5, 3))
    ledger.deletions.append(deletion(5, "Success"))
    ledger.reports.append(report(num_requests_recieved=1, new_load=3, cur_perf=3))
    assert ledger.complaints() == []


def test_each_load_time_is_listed_once() -> None:
    times = (0.0, 2.5, 2.5, 0.0, 3.5)
    ledger = Ledger(reports=[report(loadtime=loadtime) for loadtime in times])
    assert ledger.loadtimes(1) == [2.5, 3.5]
    assert ledger.loadtimes(2) == []
