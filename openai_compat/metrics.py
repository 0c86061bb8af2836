"""Counts HTTP requests, exposes all metrics in Prometheus' text format and logs the line of statistics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from microvllm.runtime.metrics.engine_metrics import EngineMetrics, Histogram

if TYPE_CHECKING:
    from prometheus_client.core import CollectorRegistry, Metric

    from microvllm.runtime.config import EngineConfig
    from microvllm.runtime.metrics.stats import EngineStats

logger = logging.getLogger("microvllm.stats")

SECONDS = (0.1, 0.5, 1)
FINE_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75),
    *(1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60),
)


class HttpMetrics:
    """Counts requests by handler (the path of a route), method and status ("2xx").

    Names and labels are those of prometheus-fastapi-instrumentator, which vLLM uses.
    """

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str, str]] = Counter()  # handler, method, status
        self._durations: dict[tuple[str, str], Histogram] = {}  # handler, method
        self._all_durations = Histogram(FINE_SECONDS)
        self._answers: Counter[str] = Counter()  # by handler
        self._request_bytes: Counter[str] = Counter()
        self._response_bytes: Counter[str] = Counter()

    def add_request(
        self, handler: str, method: str, status: int, seconds: float, received_bytes: int, sent_bytes: int
    ) -> None:
        """Count an answered request. Bytes are those of the Content-Length headers, 0 for a stream."""
        self._requests[handler, method, f"{status // 100}xx"] += 1
        self._durations.setdefault((handler, method), Histogram(SECONDS)).observe(seconds)
        self._all_durations.observe(seconds)
        self._answers[handler] += 1
        self._request_bytes[handler] += received_bytes
        self._response_bytes[handler] += sent_bytes

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at every scrape."""
        from prometheus_client.core import SummaryMetricFamily

        from microvllm.runtime.metrics.metric_families import histogram_family, number_family

        labels = ("handler", "method", "status")
        yield number_family("counter", "http_requests", "Answered requests.", labels, self._requests.items())
        for name, text, sizes in (
            ("http_request_size_bytes", "Content-Length of requests.", self._request_bytes),
            ("http_response_size_bytes", "Content-Length of answers.", self._response_bytes),
        ):
            summary = SummaryMetricFamily(name, text, labels=["handler"])
            for handler, number in self._answers.items():
                summary.add_metric([handler], number, sizes[handler])
            yield summary
        name, text = "http_request_duration_highr_seconds", "Duration of requests, in fine steps."
        yield histogram_family(name, text, (), [((), self._all_durations)])
        name, text = "http_request_duration_seconds", "Duration of requests by handler."
        yield histogram_family(name, text, labels[:2], self._durations.items())


class Exposition:
    """A registry of one server's own: two servers in one process do not see each other's numbers.

    Importing its library takes a while, so it is made at the first scrape and not at the server's start.
    """

    def __init__(
        self, http_metrics: HttpMetrics, metrics: Sequence[EngineMetrics], model: str, config: EngineConfig
    ) -> None:
        import prometheus_client as library

        from microvllm.runtime.metrics.metric_families import EngineCollector

        self._registry = library.CollectorRegistry()
        library.ProcessCollector(registry=self._registry)
        library.PlatformCollector(registry=self._registry)
        library.GCCollector(registry=self._registry)
        self._registry.register(http_metrics)
        if metrics:
            self._registry.register(EngineCollector(metrics, model, config))

    def text(self, names: Collection[str] = ()) -> tuple[bytes, str]:
        """Return the current numbers, or only the samples of these names, and their media type."""
        import prometheus_client as library

        registry = _Chosen(self._registry, names) if names else self._registry
        return library.generate_latest(registry), library.CONTENT_TYPE_LATEST


class _Chosen:
    """The samples of some names; the library's `restricted_registry` has to know them beforehand."""

    def __init__(self, registry: CollectorRegistry, names: Collection[str]) -> None:
        self._registry = registry
        self._names = frozenset(names)

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if sample.name in self._names]
            if family.samples:
                yield family


def stats_line(
    before: EngineStats, now: EngineStats, seconds: float, device: str = "cuda", engine: int = 0
) -> str:
    """Return the line of statistics, worded as vLLM words it so that the same scripts read it.

    Rates are over the `seconds` between two snapshots, gauges of the later one; `device` is cuda or cpu.
    """
    prompt, generated, queries, hits, preemptions = (
        getattr(now, name) - getattr(before, name)
        for name in ("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions")
    )
    preempted = f"Preemptions: {preemptions} reqs, " if preemptions else ""
    return (
        f"Engine {engine:03d}: Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
        f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
        f"Running: {now.num_running} reqs, Waiting: {now.num_waiting} reqs, {preempted}"
        f"{'GPU ' if device == 'cuda' else ''}KV cache usage: {now.kv_usage * 100:.1f}%, "
        f"Prefix cache hit rate: {hits / queries * 100 if queries else 0.0:.1f}%"
    )


async def log_stats(metrics: EngineMetrics, interval: float, device: str, engine: int = 0) -> None:
    """Log an engine's line every `interval` seconds with traffic, and one more when it has come to rest."""
    before, then, busy = metrics.totals, time.monotonic(), False
    while True:
        await asyncio.sleep(interval)
        now, moment = metrics.totals, time.monotonic()
        active = now.num_running + now.num_waiting > 0 or (
            (now.prompt_tokens, now.generation_tokens) != (before.prompt_tokens, before.generation_tokens)
        )
        if active or busy:
            logger.info(stats_line(before, now, moment - then, device, engine))
        before, then, busy = now, moment, active
