"""Admits requests, drains them at a stop, and ends those whose client has left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from microvllm.openai_compat.errors import ClientGoneError, ServerStoppingError

T = TypeVar("T")
# In the scope of a request: `GuardedProtocol.on_disconnect`. A task that waits for ASGI's `http.disconnect`
# would take 1.2 KB of every waiting request.
ON_DISCONNECT = "microvllm.on_disconnect"


class Lifecycle:
    """Counts requests in progress and ends them when the server stops.

    `draining` refuses new requests with 503 while running ones go on; `cut()` ends those too: each gets
    `ServerStoppingError`, which becomes a 503 or, in a stream, an error event.
    """

    def __init__(self) -> None:
        self.draining = False
        self.active = 0
        self._cut = False
        self._work: set[_Work] = set()

    def cut(self) -> None:
        """Ends every request in progress; the waiters of `run_until_disconnect` see `ServerStoppingError`."""
        self.draining = self._cut = True
        for work in self._work:
            work.end(ServerStoppingError)

    async def run_until_disconnect(self, work: Coroutine[Any, Any, T], scope: Mapping[str, Any]) -> T:
        """Awaits `work` unless the client leaves first; cancelled work has ended before this returns.

        It runs in the caller's task: one of its own would take 1.5 KB of every waiting request. A scope
        without `ON_DISCONNECT` has no client that could leave. Raises `ClientGoneError` or
        `ServerStoppingError` where `work` was cut short, else what it raises.
        """
        running = _Work()
        watch = scope.get(ON_DISCONNECT)
        if self._cut or (watch is not None and not watch(running.client_left)):
            work.close()
            raise ServerStoppingError if self._cut else ClientGoneError
        self._work.add(running)
        try:
            result = await work
        except asyncio.CancelledError:
            if running.reason is None:
                raise  # by somebody else
        finally:
            self._work.discard(running)
            if watch is not None:
                watch(None)
            running.finish()
        if running.reason is not None:
            raise running.reason
        return result


class _Work:
    """The task of a request, which `end` cancels until `finish`."""

    __slots__ = ("_task", "reason")

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self.reason: type[Exception] | None = None

    def client_left(self) -> None:
        self.end(ClientGoneError)

    def end(self, reason: type[Exception]) -> None:
        if self._task is not None and self.reason is None:
            self.reason = reason
            self._task.cancel()

    def finish(self) -> None:
        """The work has ended: a cancellation would hit what comes after it."""
        task, self._task = self._task, None
        if self.reason is not None and task is not None and hasattr(task, "uncancel"):  # from Python 3.11 on
            task.uncancel()
