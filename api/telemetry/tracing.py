"""A span for each request, sent to an OpenTelemetry collector: only where one is named.

OpenTelemetry and gRPC are imported when the tracer is made, so nobody else waits for them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

SERVICE_NAME = "text-generation-inference.router"
"""TGI's default."""

_EXPORT_TIMEOUT_S = 5.0


class Tracer:
    """Starts spans and has `processor` see to them. To be closed."""

    def __init__(self, processor: "SpanProcessor", service_name: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # `close` ends it; at exit it would wait for a collector that may not be there.
        self._provider = TracerProvider(
            ALWAYS_ON, Resource.create({"service.name": service_name}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("skiff")
        self._context_of = TraceContextTextMapPropagator().extract
        self._kind = SpanKind.SERVER

    def start(self, route: str, traceparent: str | None) -> "Span":
        """`traceparent` is the W3C header, None or broken where there is no trace to join."""
        from opentelemetry.context import Context

        carrier = {} if traceparent is None else {"traceparent": traceparent}
        # An empty context, not the thread's own: requests are each other's neighbours.
        context = self._context_of(carrier, Context())
        return self._tracer.start_span(route, context, self._kind)

    def close(self) -> None:
        """Send what is pending. Takes seconds where the collector is gone."""
        self._provider.shutdown()


def tracer_to(endpoint: str, service_name: str = SERVICE_NAME) -> Tracer:
    """`endpoint` is a collector's gRPC address, such as http://localhost:4317."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(
        endpoint=endpoint,
        insecure=not endpoint.startswith("https://"),
        timeout=_EXPORT_TIMEOUT_S,
    )
    return Tracer(BatchSpanProcessor(exporter), service_name)
