"""GET /metrics: TGI's names, types, labels and buckets, and the events that are counted."""

import re
from pathlib import Path

import pytest

from engine.core.metrics import StepFigures
from engine.core.request import Failed
from tests.api.client import Connection, client, make_app
from tests.api.scripted import HOLD, ScriptedEngine, output

pytestmark = pytest.mark.anyio

TGI = {
    "tgi_request_count": "counter",
    "tgi_request_success": "counter",
    "tgi_request_failure": "counter",
    "tgi_request_duration": "histogram",
    "tgi_request_validation_duration": "histogram",
    "tgi_request_queue_duration": "histogram",
    "tgi_request_inference_duration": "histogram",
    "tgi_request_mean_time_per_token_duration": "histogram",
    "tgi_request_generated_tokens": "histogram",
    "tgi_request_input_length": "histogram",
    "tgi_request_max_new_tokens": "histogram",
    "tgi_request_skipped_tokens": "summary",
    "tgi_batch_next_size": "histogram",
    "tgi_batch_current_size": "gauge",
    "tgi_batch_current_max_tokens": "gauge",
    "tgi_queue_size": "gauge",
    "tgi_batch_concat": "counter",
    "tgi_batch_inference_count": "counter",
    "tgi_batch_inference_success": "counter",
    "tgi_batch_inference_failure": "counter",
    "tgi_batch_inference_duration": "histogram",
    "tgi_batch_forward_duration": "histogram",
    "tgi_batch_decode_duration": "histogram",
    "tgi_batch_filter_duration": "histogram",
    "tgi_batch_concat_duration": "histogram",
}
STEP = StepFigures(
    num_admitted=2,
    num_prefills=2,
    num_decodes=3,
    num_tokens=40,
    forward_s=0.001,
    emit_s=0.0002,
    num_running=5,
    num_waiting=0,
    failed=False,
)


async def scrape(engine: ScriptedEngine, *bodies: object, path: str = "/generate") -> str:
    async with client(engine) as http:
        for body in bodies:
            await http.post(path, json=body)
        answer = await http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    return answer.text


def types(text: str) -> dict[str, str]:
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))


def value(text: str, sample: str) -> float:
    (found,) = re.findall(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
    return float(found)


async def test_tgis_names_have_tgis_types() -> None:
    found = types(await scrape(ScriptedEngine()))
    assert {name: found.get(name) for name in TGI} == TGI


async def test_counters_have_no_total_suffix() -> None:
    text = await scrape(ScriptedEngine(), {"inputs": "x"})
    assert "# HELP tgi_request_count Total number of requests\n" in text
    assert "\ntgi_request_count 1\n" in text
    assert "_total" not in text.replace("max_total", "")
    assert "_created" not in text


async def test_durations_and_lengths_have_tgis_buckets() -> None:
    text = await scrape(ScriptedEngine(), {"inputs": "x"})
    bounds = re.findall(r'^tgi_request_duration_bucket\{le="(\S+)"\}', text, re.MULTILINE)
    assert len(bounds) == 36
    assert bounds[0] == "0.00015000000000000001"
    assert bounds[-2:] == ["145.61096060497135", "+Inf"]
    bounds = re.findall(r'^tgi_request_generated_tokens_bucket\{le="(\S+)"\}', text, re.MULTILINE)
    assert len(bounds) == 101
    assert (bounds[0], bounds[-2]) == ("20.48", "2048")


async def test_a_success_is_counted_with_its_timings() -> None:
    text = await scrape(ScriptedEngine(), {"inputs": "x y", "parameters": {"max_new_tokens": 7}})
    assert value(text, "tgi_request_success") == 1
    assert value(text, "tgi_request_generated_tokens_sum") == 2
    assert value(text, "tgi_request_input_length_sum") == 3
    assert value(text, "tgi_request_max_new_tokens_sum") == 7
    assert value(text, "tgi_request_queue_duration_sum") == 0.25
    assert value(text, "tgi_request_inference_duration_sum") == 0.5
    assert value(text, "tgi_request_mean_time_per_token_duration_sum") == 0.25
    assert value(text, "skiff_time_to_first_token_seconds_count") == 1


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.slow
async def test_failures_are_counted_by_their_class(path: str) -> None:
    invalid = {"inputs": ""}
    text = await scrape(ScriptedEngine(), invalid, path=path)
    assert value(text, 'tgi_request_failure{err="validation"}') == 1
    text = await scrape(ScriptedEngine(permits=0), {"inputs": "x"}, path=path)
    assert value(text, 'tgi_request_failure{err="overloaded"}') == 1
    text = await scrape(ScriptedEngine(lambda _: [[Failed("x")]]), {"inputs": "x"}, path=path)
    assert value(text, 'tgi_request_failure{err="generation"}') == 1
    text = await scrape(ScriptedEngine(lambda _: [[output("x")]]), {"inputs": "x"}, path=path)
    assert value(text, 'tgi_request_failure{err="incomplete"}') == 1
    assert value(text, "tgi_request_count") == 1
    assert value(text, "tgi_request_success") == 0


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_client_that_goes_away_is_counted_as_dropped(path: str) -> None:
    engine = ScriptedEngine(lambda _: [[output("a")], HOLD])
    app = make_app(engine)
    connection = Connection(app, path, {"inputs": "x"})
    await engine.holding.wait()
    await connection.go_away()
    text = app.state.serving.observer.metrics
    assert text.requests.failure["dropped"]._value.get() == 1
    assert text.requests.cancelled["generating"]._value.get() == 1


async def test_an_engine_step_is_counted_by_its_method() -> None:
    engine = ScriptedEngine()
    async with client(engine) as http:
        assert engine.on_step is not None
        engine.on_step(STEP)
        text = (await http.get("/metrics")).text
    assert value(text, 'tgi_batch_inference_count{method="prefill"}') == 1
    assert value(text, 'tgi_batch_inference_count{method="decode"}') == 0
    assert value(text, "tgi_batch_next_size_sum") == 2
    assert value(text, 'tgi_batch_concat{reason="chunking"}') == 1
    assert value(text, 'tgi_batch_forward_duration_sum{method="prefill"}') == 0.001
    assert value(text, "skiff_computed_tokens") == 40


async def test_the_documentation_lists_exactly_the_existing_metrics() -> None:
    table = Path("docs/metrics.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", table, re.MULTILINE))
    assert documented == types(await scrape(ScriptedEngine(), {"inputs": "x"}))
