"""Counts of HTTP requests, named and labelled as prometheus-fastapi-instrumentator does, which vLLM uses."""

from __future__ import annotations

from collections import Counter

from microvllm.runtime.metrics import Histogram

SECONDS = (0.1, 0.5, 1)
FINE_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75),
    *(1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60),
)


class HttpMetrics:
    """Counts since the server started, by handler (the path of a route), method, and status ("2xx")."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()  # handler, method, status
        self.durations: dict[tuple[str, str], Histogram] = {}  # handler, method
        self.all_durations = Histogram(FINE_SECONDS)
        self.answers: Counter[str] = Counter()  # by handler
        self.request_bytes: Counter[str] = Counter()
        self.response_bytes: Counter[str] = Counter()

    def add(
        self, handler: str, method: str, status: int, seconds: float, received_bytes: int, sent_bytes: int
    ) -> None:
        """One answered request. Bytes are those of the Content-Length headers, 0 for a stream."""
        self.requests[handler, method, f"{status // 100}xx"] += 1
        self.durations.setdefault((handler, method), Histogram(SECONDS)).observe(seconds)
        self.all_durations.observe(seconds)
        self.answers[handler] += 1
        self.request_bytes[handler] += received_bytes
        self.response_bytes[handler] += sent_bytes
