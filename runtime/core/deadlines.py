"""Finds the requests that waited or took too long. Imports no torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from microvllm.runtime.core.plan import Request
from microvllm.runtime.request import FinishReason


class Deadlines:
    """The requests that may still wait longer than `queue_timeout` or take longer than `request_timeout`.

    Both are in seconds; 0: there is none.
    """

    def __init__(self, queue_timeout: float, request_timeout: float) -> None:
        # In order of arrival, so the first one is the first to time out; also hold some that need it no more.
        self._queues: list[tuple[deque[Request], float, FinishReason]] = [
            (deque(), limit, reason)
            for limit, reason in (
                (queue_timeout, FinishReason.QUEUE_TIMEOUT),
                (request_timeout, FinishReason.REQUEST_TIMEOUT),
            )
            if limit
        ]

    def add(self, request: Request) -> None:
        """Watch a request that was just queued."""
        for queue, _, _ in self._queues:
            queue.append(request)

    def passed(self) -> Iterator[tuple[Request, FinishReason]]:
        """Yield each request whose time is over, once; it has to be ended before the next is asked for."""
        now = time.monotonic()
        for queue, limit, reason in self._queues:
            while queue:
                request = queue[0]
                begun = reason is FinishReason.QUEUE_TIMEOUT and request.num_cached is not None
                if request.finish_reason is None and not begun:
                    if now - request.arrived_at <= limit:
                        break
                    yield request, reason
                queue.popleft()
