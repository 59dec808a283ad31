"""GET /metrics: the names, types and counts of section 7, which TGI's dashboards read."""

import re

import httpx2
import pytest

from clients.wire import MESSAGES, PROMPT, every_permit_taken

TYPES = {
    **dict.fromkeys(
        ("tgi_request_count", "tgi_request_success", "tgi_request_failure"),
        "counter",
    ),
    **dict.fromkeys(
        ("tgi_batch_inference_count", "tgi_batch_inference_success"),
        "counter",
    ),
    **dict.fromkeys(
        (
            "tgi_request_duration",
            "tgi_request_validation_duration",
            "tgi_request_queue_duration",
            "tgi_request_inference_duration",
            "tgi_request_mean_time_per_token_duration",
            "tgi_request_generated_tokens",
            "tgi_request_input_length",
            "tgi_request_max_new_tokens",
            "tgi_batch_next_size",
            "tgi_batch_inference_duration",
            "tgi_batch_forward_duration",
            "tgi_batch_decode_duration",
        ),
        "histogram",
    ),
    **dict.fromkeys(
        ("tgi_batch_current_size", "tgi_batch_current_max_tokens", "tgi_queue_size"),
        "gauge",
    ),
    "tgi_request_skipped_tokens": "summary",
}


@pytest.fixture
def client(url: str) -> httpx2.Client:
    return httpx2.Client(base_url=url, timeout=60)


def samples(client: httpx2.Client) -> dict[str, float]:
    """Return the values of all samples by name and labels, in the text of the format."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = [line for line in response.text.splitlines() if line and line[0] != "#"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def generate(client: httpx2.Client, path: str = "/generate", **parameters: object) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 2} | parameters}
    client.post(path, json=body)


def test_every_metric_exists_with_its_type(client: httpx2.Client) -> None:
    generate(client)
    generate(client, temperature=-1.0)
    text = client.get("/metrics").text
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert {name: types.get(name) for name in TYPES} == TYPES


def test_durations_have_tgis_buckets(client: httpx2.Client) -> None:
    generate(client)
    pattern = r'^tgi_request_duration_bucket\{le="([^"]+)"\} '
    found = re.findall(pattern, client.get("/metrics").text, re.MULTILINE)
    expected = [0.0001 * 1.5**k for k in range(1, 36)]
    assert [float(bound) for bound in found] == [*map(pytest.approx, expected), float("inf")]


@pytest.mark.parametrize(
    ("path", "body", "requests", "successes"),
    [
        ("/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}, 1, 1),
        ("/generate_stream", {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}, 1, 1),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}, 2, 1),
        ("/v1/completions", {"prompt": [PROMPT, "x"], "max_tokens": 2}, 3, 2),
        ("/chat_tokenize", {"messages": MESSAGES}, 1, 0),
    ],
    ids=["generate", "stream", "chat", "completions", "chat_tokenize"],
)
def test_requests_are_counted_as_tgi_counts_them(
    client: httpx2.Client, path: str, body: dict[str, object], requests: int, successes: int
) -> None:
    generate(client)
    before = samples(client)
    assert client.post(path, json=body).status_code == 200
    after = samples(client)
    assert after["tgi_request_count"] - before["tgi_request_count"] == requests
    assert after["tgi_request_success"] - before["tgi_request_success"] == successes


def test_failures_are_counted_by_their_class(client: httpx2.Client, url: str) -> None:
    validation = 'tgi_request_failure{err="validation"}'
    overloaded = 'tgi_request_failure{err="overloaded"}'
    before = samples(client)
    generate(client, temperature=-1.0)
    generate(client, "/generate_stream", temperature=-1.0)
    with every_permit_taken(url):
        generate(client)
    after = samples(client)
    assert after[validation] - before.get(validation, 0) == 2
    assert after[overloaded] - before.get(overloaded, 0) == 1


def test_generated_and_prompt_tokens_are_counted(client: httpx2.Client) -> None:
    generate(client)
    before = samples(client)
    generate(client, max_new_tokens=3)
    after = samples(client)
    for name, value in (
        ("tgi_request_generated_tokens", 3),
        ("tgi_request_input_length", 5),
        ("tgi_request_max_new_tokens", 3),
    ):
        assert after[f"{name}_sum"] - before[f"{name}_sum"] == value
        assert after[f"{name}_count"] - before[f"{name}_count"] == 1
