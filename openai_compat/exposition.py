"""What was counted, as Prometheus' text. The first scrape imports it, not the start of the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from microvllm.openai_compat.transport.http_metrics import HttpMetrics
from microvllm.runtime.metric_families import EngineCollector, histogram_family, numbers_family

if TYPE_CHECKING:
    from microvllm.openai_compat.state import ServerState


class Exposition:
    """A registry of one server's own: two servers in one process do not see each other's numbers."""

    def __init__(self, state: ServerState) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(HttpCollector(state.http_metrics))
        if state.metrics is not None:
            self._registry.register(EngineCollector(state.metrics, state.model_names[0], state.client.config))

    def text(self) -> tuple[bytes, str]:
        """The numbers of this moment, and their media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class HttpCollector(Collector):
    """`HttpMetrics` under the names of prometheus-fastapi-instrumentator."""

    def __init__(self, metrics: HttpMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at every scrape."""
        metrics = self._metrics
        yield numbers_family(
            CounterMetricFamily,
            "http_requests",
            "Answered requests.",
            ("handler", "method", "status"),
            metrics.requests.items(),
        )
        for name, text, sizes in (
            ("http_request_size_bytes", "Content-Length of requests.", metrics.request_bytes),
            ("http_response_size_bytes", "Content-Length of answers.", metrics.response_bytes),
        ):
            summary = SummaryMetricFamily(name, text, labels=["handler"])
            for handler, number in metrics.answers.items():
                summary.add_metric([handler], number, sizes[handler])
            yield summary
        yield histogram_family(
            "http_request_duration_highr_seconds",
            "Duration of requests, in fine steps.",
            (),
            [((), metrics.all_durations)],
        )
        yield histogram_family(
            "http_request_duration_seconds",
            "Duration of requests by handler.",
            ("handler", "method"),
            metrics.durations.items(),
        )
