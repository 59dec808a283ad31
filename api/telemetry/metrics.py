"""Prometheus metrics, with TGI's names and buckets. Skiff's own begin with `skiff_`.

Recording costs microseconds per request and per step, and nothing per token: label children are
created once, and the engine's own counters are read only at a scrape. docs/metrics.md lists every
metric; a test compares it with this file.
"""

import time
from collections import Counter as Multiset
from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.settings.config import MAX_COUNTED_NEW_TOKENS, Limits
from engine.core.config import BLOCK_SIZE
from engine.core.metrics import ColdStart, EngineFigures, StepFigures
from engine.core.request import Request

Failure = Literal["overloaded", "validation", "template", "generation", "incomplete", "dropped"]
"""TGI's values of the label `err`."""
Phase = Literal["validating", "waiting", "generating"]
"""How far a request got before its client went away; `waiting` means for its first token."""

_FAILURES: tuple[Failure, ...] = (
    "overloaded",
    "validation",
    "template",
    "generation",
    "incomplete",
    "dropped",
)
_PHASES: tuple[Phase, ...] = ("validating", "waiting", "generating")
_QUANTILES = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


def _duration_buckets() -> list[float]:
    """Return buckets from 0.15 ms to 146 s. They are computed by repeated multiplication, as in
    TGI, so that the last digits are the same.
    """
    bounds, bound = [], 0.0001
    for _ in range(35):
        bound *= 1.5
        bounds.append(bound)
    return bounds


DURATIONS = _duration_buckets()


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(
        self, limits: Limits, figures: Callable[[], EngineFigures], cold_start: ColdStart
    ) -> None:
        """`figures` is called at each scrape, from any thread."""
        self.registry = CollectorRegistry()
        self.requests = RequestMetrics(self.registry, limits)
        self.steps = StepMetrics(self.registry)
        self.registry.register(_EngineCollector(figures, cold_start))


class RequestMetrics:
    """Metrics of requests, recorded on the event loop."""

    def __init__(self, registry: CollectorRegistry, limits: Limits) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, registry=registry)

        def histogram(name: str, text: str, buckets: list[float]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        lengths = _hundredths(limits.max_total_tokens)
        self.count = counter("tgi_request_count", "Total number of requests")
        self.success = counter("tgi_request_success", "Number of successful requests")
        self.duration = histogram("tgi_request_duration", "Request duration", DURATIONS)
        self.validation = histogram(
            "tgi_request_validation_duration", "Request validation duration", DURATIONS
        )
        self.queue = histogram("tgi_request_queue_duration", "Request queue duration", DURATIONS)
        self.inference = histogram(
            "tgi_request_inference_duration", "Request inference duration", DURATIONS
        )
        self.mean_time_per_token = histogram(
            "tgi_request_mean_time_per_token_duration", "Mean time per token per request", DURATIONS
        )
        self.generated_tokens = histogram(
            "tgi_request_generated_tokens", "Generated tokens per request", lengths
        )
        self.input_length = histogram(
            "tgi_request_input_length",
            "Input token length per request",
            _hundredths(limits.max_input_tokens),
        )
        self.max_new_tokens = histogram(
            "tgi_request_max_new_tokens", "Maximum new tokens per request", lengths
        )
        self.time_to_first_token = histogram(
            "skiff_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token",
            DURATIONS,
        )
        self.skipped_tokens = SkippedTokens()
        registry.register(self.skipped_tokens)
        failure = Counter(
            "tgi_request_failure", "Number of failed requests by cause", ["err"], registry=registry
        )
        self.failure = {err: failure.labels(err) for err in _FAILURES}
        cancelled = Counter(
            "skiff_request_cancelled",
            "Requests whose client went away, by how far they had got",
            ["phase"],
            registry=registry,
        )
        self.cancelled = {phase: cancelled.labels(phase) for phase in _PHASES}

    def validated(self, request: Request) -> None:
        self.input_length.observe(len(request.prompt_ids))
        self.max_new_tokens.observe(min(request.stopping.max_new_tokens, MAX_COUNTED_NEW_TOKENS))


class SkippedTokens(Collector):
    """tgi_request_skipped_tokens: a summary of accepted speculative tokens, with one sample for
    each time that a request received tokens. The values are small integers, so every quantile is
    exact. It covers the time since the start.
    """

    def __init__(self) -> None:
        self._times: Multiset[int] = Multiset()

    def record(self, num_skipped: int, times: int) -> None:
        self._times[num_skipped] += times

    def collect(self) -> Iterator[Metric]:
        name, times = "tgi_request_skipped_tokens", sorted(self._times.items())
        metric = Metric(name, "Speculated tokens per request", "summary")
        for quantile in _QUANTILES:
            metric.add_sample(name, {"quantile": f"{quantile:g}"}, _quantile(times, quantile))
        metric.add_sample(f"{name}_sum", {}, sum(value * count for value, count in times))
        metric.add_sample(f"{name}_count", {}, sum(count for _, count in times))
        yield metric


class StepMetrics:
    """Metrics of the engine's steps, recorded on the event loop.

    The label `method` is TGI's: a step that computes any prompt is a prefill, any other a decode.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._by_method = _MethodMetrics(registry)
        self._prefill = self._by_method.of("prefill")
        self._decode = self._by_method.of("decode")
        self._next_size = Histogram(
            "tgi_batch_next_size",
            "Batch size of the next batch",
            buckets=range(1, 1025),
            registry=registry,
        )
        concat = Counter(
            "tgi_batch_concat",
            "Times that new requests joined a running batch, by reason",
            ["reason"],
            registry=registry,
        )
        self._concat = concat.labels("chunking")
        self._inter_token = Histogram(
            "skiff_inter_token_latency_seconds",
            "Seconds between two steps that gave running requests their tokens",
            buckets=DURATIONS,
            registry=registry,
        )
        self._computed_tokens = Counter(
            "skiff_computed_tokens",
            "Tokens that went through the model, prompts and generated ones",
            registry=registry,
        )
        self._last_arrival_s: float | None = None

    def record(self, step: StepFigures) -> None:
        method = self._prefill if step.num_prefills else self._decode
        method.record(step)
        if step.failed:
            return
        self._computed_tokens.inc(step.num_tokens)
        if step.num_admitted:
            self._next_size.observe(step.num_admitted)
            if step.num_decodes:
                self._concat.inc()
        self._record_gap(step)

    def _record_gap(self, step: StepFigures) -> None:
        """Record the time since the previous step. A sequence that decodes in this step received
        its last token in an earlier one, usually the previous one.
        """
        now = time.perf_counter()
        if step.num_decodes and self._last_arrival_s is not None:
            self._inter_token.observe(now - self._last_arrival_s)
        self._last_arrival_s = now


class _MethodMetrics:
    """The metrics with a label `method`. TGI's histograms of concatenating and filtering batches
    stay at zero: here sequences join and leave a batch in place.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["method"], registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, ["method"], buckets=DURATIONS, registry=registry)

        per_method = "per method (prefill or decode)"
        self.count = counter(
            "tgi_batch_inference_count", "Inference calls per method (prefill or decode)"
        )
        self.success = counter(
            "tgi_batch_inference_success", f"Number of successful inference calls {per_method}"
        )
        self.failure = counter(
            "tgi_batch_inference_failure", f"Number of failed inference calls {per_method}"
        )
        self.inference = histogram("tgi_batch_inference_duration", "Batch inference duration")
        self.forward = histogram(
            "tgi_batch_forward_duration", f"Batch forward duration {per_method}"
        )
        self.decode = histogram(
            "tgi_batch_decode_duration", f"Time spent decoding a batch {per_method}"
        )
        self.filter = histogram(
            "tgi_batch_filter_duration",
            f"Time spent filtering batches and sending generated tokens {per_method}",
        )
        self.concat = histogram("tgi_batch_concat_duration", "Time spent concatenating batches")
        self.concat.labels("decode")

    def of(self, method: str) -> "_StepsOfMethod":
        self.filter.labels(method)
        return _StepsOfMethod(self, method)


class _StepsOfMethod:
    """The metrics of one method."""

    def __init__(self, families: _MethodMetrics, method: str) -> None:
        self._count = families.count.labels(method)
        self._success = families.success.labels(method)
        self._failure = families.failure.labels(method)
        self._inference = families.inference.labels(method)
        self._forward = families.forward.labels(method)
        self._decode = families.decode.labels(method)

    def record(self, step: StepFigures) -> None:
        self._count.inc()
        if step.failed:
            self._failure.inc()
            return
        self._success.inc()
        self._forward.observe(step.forward_s)
        self._decode.observe(step.emit_s)
        self._inference.observe(step.forward_s + step.emit_s)


class _EngineCollector(Collector):
    """Metrics that are read at a scrape from the status that the engine publishes after each step.
    They are also current while the engine is idle.
    """

    def __init__(self, figures: Callable[[], EngineFigures], cold_start: ColdStart) -> None:
        self._figures = figures
        self._cold_start = cold_start

    def collect(self) -> Iterator[Metric]:
        now = self._figures()
        yield GaugeMetricFamily("tgi_queue_size", "Current queue size", now.num_waiting)
        yield GaugeMetricFamily("tgi_batch_current_size", "Current batch size", now.num_running)
        yield GaugeMetricFamily(
            "tgi_batch_current_max_tokens",
            "Maximum tokens for the current batch",
            now.num_used_blocks * BLOCK_SIZE,
        )
        yield GaugeMetricFamily("skiff_kv_blocks", "Blocks of the KV cache", now.num_blocks)
        yield GaugeMetricFamily(
            "skiff_kv_blocks_used",
            "Blocks of the KV cache that running requests hold",
            now.num_used_blocks,
        )
        yield CounterMetricFamily(
            "skiff_prefix_cache_lookup_tokens",
            "Prompt tokens looked up in the prefix cache",
            now.num_prefix_lookup_tokens,
        )
        yield CounterMetricFamily(
            "skiff_prefix_cache_hit_tokens",
            "Prompt tokens found there, which were not computed again",
            now.num_prefix_hit_tokens,
        )
        yield CounterMetricFamily(
            "skiff_preemptions",
            "Times that a running request gave its blocks back to be computed again",
            now.num_preemptions,
        )
        cold_start = GaugeMetricFamily(
            "skiff_cold_start_seconds", "Seconds that a phase of the start took", labels=["phase"]
        )
        for phase, seconds in self._cold_start.seconds.copy().items():
            cold_start.add_metric([phase], seconds)
        yield cold_start
        yield CounterMetricFamily("skiff_steps", "Steps that the engine launched", now.num_steps)


def _hundredths(limit: int) -> list[float]:
    """Return a hundred equal buckets up to `limit`. The division comes first, as in TGI, so that
    the last digits are the same.
    """
    return [(limit / 100.0) * k for k in range(1, 101)]


def _quantile(times: list[tuple[int, int]], quantile: float) -> int:
    """Return a quantile of `times`, pairs of value and count in ascending order; 0 if empty."""
    rank, value = quantile * sum(count for _, count in times), 0
    for value, count in times:  # noqa: B007
        rank -= count
        if rank <= 0:
            break
    return value
