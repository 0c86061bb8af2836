"""Counts of HTTP requests, named and labelled as prometheus-fastapi-instrumentator does, which vLLM uses."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable

from starlette.datastructures import Headers
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from microvllm.runtime.metrics import Histogram

UNCOUNTED = frozenset(
    {
        *("/metrics", "/metrics/", "/health", "/ready", "/ping", "/version", "/server_info"),
        *("/load", "/get_load", "/v1/loads"),
    }
)
UNKNOWN = "none"  # the handler of a path that there is no route for: else a client could invent labels
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


class HttpMetricsMiddleware:
    """Counts every request that reaches the application, also those that other middleware refuses."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNCOUNTED:
            await self.app(scope, receive, send)
            return
        handler = _handler(scope)
        status, sent_bytes = 500, 0  # what the client gets when nothing was sent and an exception leaves here

        # Not a coroutine of its own: a stream sends a message a token, and would await two for each.
        def noting(message: Message) -> Awaitable[None]:
            nonlocal status, sent_bytes
            if message["type"] == "http.response.start":
                status, sent_bytes = message["status"], _content_length(Headers(raw=message["headers"]))
            return send(message)

        start = time.perf_counter()
        try:
            await self.app(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - start
            received_bytes = _content_length(Headers(scope=scope))
            self.metrics.add(handler, scope["method"], status, seconds, received_bytes, sent_bytes)


def _handler(scope: Scope) -> str:
    for route in scope["app"].routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            return route.path
    return UNKNOWN


def _content_length(headers: Headers) -> int:
    value = headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else 0
