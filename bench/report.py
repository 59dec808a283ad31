"""Turn the requests of a load run, as the client saw them, into figures and tables.

Names and arithmetic are those of `vllm bench serve`, so that reports can be compared. This
module knows nothing of HTTP, of servers or of how the load was made.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_WIDTH = 50
_NUM_ERRORS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, with times in seconds of `time.perf_counter`.

    `token_times_s` has one entry for each token event, in order; a failed request keeps the
    events before its `error`. If the server sent token counts (`counted_by_server`), these are
    used; otherwise the counts are the words of the prompt and the events received.
    """

    start_s: float
    token_times_s: Sequence[float]
    input_tokens: int
    output_tokens: int
    max_output_tokens: int
    counted_by_server: bool = False
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.start_s

    @property
    def e2el_s(self) -> float:
        return self.token_times_s[-1] - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token; None for a single token, which has no time between tokens."""
        if self.output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """The gaps between events; 0 between events that arrived in one read."""
        gaps: list[float] = np.diff(self.token_times_s).tolist()
        return gaps


@dataclass(frozen=True, slots=True)
class Latency:
    """A latency in milliseconds. All figures are NaN if nothing was measured."""

    mean_ms: float
    median_ms: float
    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, values_s: Sequence[float]) -> "Latency":
        """Summarise latencies. Percentiles interpolate between neighbours, as vLLM's do."""
        if not values_s:
            return cls(math.nan, math.nan, math.nan, math.nan)
        values_ms = np.asarray(values_s) * 1e3
        p50_ms, p99_ms = np.percentile(values_ms, (50, 99))
        return cls(
            float(values_ms.mean()), float(np.median(values_ms)), float(p50_ms), float(p99_ms)
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a run. Latencies and token counts cover the completed requests only."""

    completed: int
    failed: int
    duration_s: float
    total_input_tokens: int
    total_output_tokens: int
    num_stopped_early: int
    num_counted_by_client: int
    num_events: int
    client_cpu_s: float
    ttft: Latency
    tpot: Latency
    itl: Latency
    e2el: Latency
    errors: tuple[tuple[str, int], ...]

    @property
    def request_throughput(self) -> float:
        return self.completed / self.duration_s

    @property
    def output_throughput(self) -> float:
        return self.total_output_tokens / self.duration_s

    @property
    def total_token_throughput(self) -> float:
        return (self.total_input_tokens + self.total_output_tokens) / self.duration_s

    @property
    def client_cpu_s_per_1000_events(self) -> float:
        return 1000 * self.client_cpu_s / self.num_events if self.num_events else math.nan


def summarise(records: Sequence[RequestRecord], duration_s: float, client_cpu_s: float) -> Summary:
    good = [record for record in records if record.error is None]
    errors = Counter(record.error for record in records if record.error is not None)
    return Summary(
        completed=len(good),
        failed=len(records) - len(good),
        duration_s=duration_s,
        total_input_tokens=sum(record.input_tokens for record in good),
        total_output_tokens=sum(record.output_tokens for record in good),
        num_stopped_early=sum(r.output_tokens < r.max_output_tokens for r in good),
        num_counted_by_client=sum(not record.counted_by_server for record in good),
        num_events=sum(len(record.token_times_s) for record in records),
        client_cpu_s=client_cpu_s,
        ttft=Latency.of([record.ttft_s for record in good]),
        tpot=Latency.of([tpot for record in good if (tpot := record.tpot_s) is not None]),
        itl=Latency.of([itl for record in good for itl in record.itls_s]),
        e2el=Latency.of([record.e2el_s for record in good]),
        errors=tuple(errors.most_common()),
    )


def summary_json(summary: Summary) -> dict[str, object]:
    """Return the figures under vLLM's keys where it has them. NaN is left to the JSON writer."""
    figures: dict[str, object] = {
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": summary.request_throughput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "num_stopped_early": summary.num_stopped_early,
        "num_counted_by_client": summary.num_counted_by_client,
        "num_events": summary.num_events,
        "client_cpu_s": summary.client_cpu_s,
        "client_cpu_s_per_1000_events": summary.client_cpu_s_per_1000_events,
    }
    for name in ("ttft", "tpot", "itl", "e2el"):
        latency: Latency = getattr(summary, name)
        figures |= {
            f"mean_{name}_ms": latency.mean_ms,
            f"median_{name}_ms": latency.median_ms,
            f"p50_{name}_ms": latency.p50_ms,
            f"p99_{name}_ms": latency.p99_ms,
        }
    return figures


def records_json(records: Sequence[RequestRecord]) -> dict[str, object]:
    """Return the raw lists that vLLM saves, with one entry per request, failed ones included."""
    return {
        "start_times": [record.start_s for record in records],
        "ttfts": [record.ttft_s if record.token_times_s else None for record in records],
        "itls": [record.itls_s for record in records],
        "input_lens": [record.input_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "errors": [record.error for record in records],
    }


def summary_table(summary: Summary) -> str:
    lines = [
        f"{' Serving Benchmark Result ':=^{_WIDTH}}",
        _row("Successful requests:", summary.completed),
        _row("Failed requests:", summary.failed),
        _row("Benchmark duration (s):", summary.duration_s),
        _row("Total input tokens:", summary.total_input_tokens),
        _row("Total generated tokens:", summary.total_output_tokens),
        _row("Request throughput (req/s):", summary.request_throughput),
        _row("Output token throughput (tok/s):", summary.output_throughput),
        _row("Total token throughput (tok/s):", summary.total_token_throughput),
        *_latency_lines("Time to First Token", "TTFT", summary.ttft),
        *_latency_lines("Time per Output Token (excl. 1st token)", "TPOT", summary.tpot),
        *_latency_lines("Inter-token Latency", "ITL", summary.itl),
        *_latency_lines("End-to-end Latency", "E2EL", summary.e2el),
        f"{'The client itself':-^{_WIDTH}}",
        _row("Token events received:", summary.num_events),
        _row("CPU seconds per 1000 events:", f"{summary.client_cpu_s_per_1000_events:.4f}"),
        _row("CPU use (% of one core):", 100 * summary.client_cpu_s / summary.duration_s),
        _row("Stopped before their length (requests):", summary.num_stopped_early),
        _row("Counted by the client (requests):", summary.num_counted_by_client),
        "=" * _WIDTH,
        *_error_lines(summary.errors),
    ]
    return "\n".join(lines)


def _latency_lines(title: str, name: str, latency: Latency) -> list[str]:
    return [
        f"{title:-^{_WIDTH}}",
        _row(f"Mean {name} (ms):", latency.mean_ms),
        _row(f"Median {name} (ms):", latency.median_ms),
        _row(f"P50 {name} (ms):", latency.p50_ms),
        _row(f"P99 {name} (ms):", latency.p99_ms),
    ]


def _row(label: str, value: float | str) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40}{shown:<10}".rstrip()


def _error_lines(errors: Sequence[tuple[str, int]]) -> list[str]:
    shown = [f"{count} x {error}" for error, count in errors[:_NUM_ERRORS_SHOWN]]
    num_hidden = len(errors) - len(shown)
    return [*shown, f"and {num_hidden} other kinds of failure"] if num_hidden else shown


_COMPARED: dict[str, Callable[[Summary], float]] = {
    "output tok/s": lambda summary: summary.output_throughput,
    "median TTFT ms": lambda summary: summary.ttft.median_ms,
    "median TPOT ms": lambda summary: summary.tpot.median_ms,
}


@dataclass(frozen=True, slots=True)
class Ratio:
    """Server A over server B: the ratio of their medians, and the extremes over the rounds."""

    of_medians: float
    low: float
    high: float


def ratios(rounds: Sequence[tuple[Summary, Summary]]) -> dict[str, Ratio]:
    return {name: _ratio(rounds, figure) for name, figure in _COMPARED.items()}


def _ratio(rounds: Sequence[tuple[Summary, Summary]], figure: Callable[[Summary], float]) -> Ratio:
    figures_a = np.array([figure(a) for a, _ in rounds])
    figures_b = np.array([figure(b) for _, b in rounds])
    with np.errstate(divide="ignore", invalid="ignore"):  # a server that only failed
        each = figures_a / figures_b
        of_medians = np.median(figures_a) / np.median(figures_b)
    return Ratio(float(of_medians), float(each.min()), float(each.max()))


def versus_table(url_a: str, url_b: str, rounds: Sequence[tuple[Summary, Summary]]) -> str:
    header = "round server " + "".join(f"{name:>16}" for name in _COMPARED) + "  failed"
    lines = [f"A = {url_a}", f"B = {url_b}", header]
    for number, pair in enumerate(rounds, 1):
        lines += [_round_line(number, *entry) for entry in zip("AB", pair, strict=True)]
    for name, ratio in ratios(rounds).items():
        spread = f"rounds {ratio.low:.3f} to {ratio.high:.3f}"
        lines.append(f"A/B {name}: {ratio.of_medians:.3f} ({spread})")
    return "\n".join(lines)


def _round_line(number: int, server: str, summary: Summary) -> str:
    figures = "".join(f"{figure(summary):>16.2f}" for figure in _COMPARED.values())
    return f"{number:>5} {server:>6} {figures}{summary.failed:>8}"
