"""Tracing: one span per request with a collector, and no imports without one."""

import subprocess
import sys
from typing import Any

import httpx2
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from api.telemetry.observation import Observer
from api.telemetry.tracing import Tracer
from tests.api.client import make_app
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio


async def spans_of(engine: ScriptedEngine, body: object, **headers: str) -> Any:
    exporter = InMemorySpanExporter()
    app = make_app(engine)
    state = app.state.serving
    observer = Observer(state.observer.metrics, Tracer(SimpleSpanProcessor(exporter), "service"))
    state.inference._observer = observer
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app), base_url="http://skiff"
    ) as http:
        await http.post("/generate", json=body, headers=headers)
    observer.close()
    return exporter.get_finished_spans()


async def test_the_span_of_a_request_has_its_timings() -> None:
    (span,) = await spans_of(ScriptedEngine(), {"inputs": "secret"})
    assert span.name == "generate"
    assert span.resource.attributes["service.name"] == "service"
    assert span.attributes["queue_time"] == "250ms"
    assert span.attributes["inference_time"] == "500ms"
    assert span.attributes["generated_tokens"] == 2
    assert span.parent is None
    assert "secret" not in span.to_json()


async def test_a_span_joins_the_callers_trace() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    (span,) = await spans_of(ScriptedEngine(), {"inputs": "x"}, traceparent=parent)
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"


async def test_a_malformed_traceparent_starts_a_new_trace() -> None:
    (span,) = await spans_of(ScriptedEngine(), {"inputs": "x"}, traceparent="nonsense")
    assert span.parent is None


async def test_the_span_of_a_failure_has_its_error_type() -> None:
    (span,) = await spans_of(ScriptedEngine(), {"inputs": ""})
    assert span.attributes["error.type"] == "validation"


@pytest.mark.slow
def test_without_a_collector_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys; from tests.api.client import make_app; "
        "from tests.api.scripted import ScriptedEngine; make_app(ScriptedEngine()); "
        "assert not [m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'grpc'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
