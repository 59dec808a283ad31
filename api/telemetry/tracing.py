"""Tracing: one span per request, sent to an OpenTelemetry collector if one is configured.

OpenTelemetry and gRPC are imported only when a tracer is made, since importing them is slow.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

SERVICE_NAME = "text-generation-inference.router"
"""TGI's default service name."""

_EXPORT_TIMEOUT_S = 5.0


class Tracer:
    """Starts spans and passes finished ones to `processor`. Must be closed."""

    def __init__(self, processor: "SpanProcessor", service_name: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # `close` shuts it down. A shutdown at exit would wait for a collector that may be gone.
        self._provider = TracerProvider(
            ALWAYS_ON, Resource.create({"service.name": service_name}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("skiff")
        self._context_of = TraceContextTextMapPropagator().extract
        self._kind = SpanKind.SERVER

    def start(self, route: str, traceparent: str | None) -> "Span":
        """Start a span. `traceparent` is the W3C header of the trace to join; the span starts a new
        trace if it is None or malformed.
        """
        from opentelemetry.context import Context

        carrier = {} if traceparent is None else {"traceparent": traceparent}
        # An empty context instead of the thread's, which other requests share.
        context = self._context_of(carrier, Context())
        return self._tracer.start_span(route, context, self._kind)

    def close(self) -> None:
        """Send the remaining spans. Takes seconds if the collector is unreachable."""
        self._provider.shutdown()


def tracer_to(endpoint: str, service_name: str = SERVICE_NAME) -> Tracer:
    """Return a tracer for a collector. `endpoint` is its gRPC address, such as
    http://localhost:4317.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(
        endpoint=endpoint,
        insecure=not endpoint.startswith("https://"),
        timeout=_EXPORT_TIMEOUT_S,
    )
    return Tracer(BatchSpanProcessor(exporter), service_name)
