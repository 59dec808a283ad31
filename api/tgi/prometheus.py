"""GET /metrics: the text format of Prometheus as TGI's exporter writes it.

prometheus_client's own writer appends `_total` to the names of counters and adds the time of their
creation; TGI's dashboards expect neither.
"""

from collections.abc import Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse

from api.generation.state import state_of

router = APIRouter()


# Not `async`: a scrape takes milliseconds, so it runs in a thread.
def metrics(http: HttpRequest) -> PlainTextResponse:
    """Prometheus metrics."""
    return PlainTextResponse(exposition(state_of(http).observer.metrics.registry))


router.add_api_route("/metrics", metrics, methods=["GET"], response_class=PlainTextResponse)
router.add_api_route("/metrics", metrics, methods=["HEAD"], include_in_schema=False)


def exposition(registry: CollectorRegistry) -> str:
    """Return all metrics of `registry` in the text format."""
    return "".join(line for metric in registry.collect() for line in _lines(metric))


def _lines(metric: Metric) -> Iterator[str]:
    yield f"# HELP {metric.name} {metric.documentation}\n"
    yield f"# TYPE {metric.name} {metric.type}\n"
    for sample in metric.samples:
        if sample.name != f"{metric.name}_created":
            yield f"{_name(metric, sample)}{_labels(sample)} {_number(sample.value)}\n"
    yield "\n"


def _name(metric: Metric, sample: Sample) -> str:
    return metric.name if metric.type == "counter" else sample.name


def _labels(sample: Sample) -> str:
    """Return the labels. Their values are constants of this program and need no escaping."""
    if not sample.labels:
        return ""
    labels = (
        f'{name}="{_bound(value) if name == "le" else value}"'
        for name, value in sample.labels.items()
    )
    return f"{{{','.join(labels)}}}"


def _bound(text: str) -> str:
    """Return a bucket's bound as TGI writes it: 1 and 1234567 instead of 1.0 and 1.234567e+06."""
    return text if text == "+Inf" else _number(float(text))


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)
