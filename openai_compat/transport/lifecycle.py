"""Admits requests, drains them at a stop, and ends those whose client has left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from microvllm.openai_compat.errors import ClientGoneError, ServerStoppingError

T = TypeVar("T")


class Lifecycle:
    """Counts requests in progress and ends them when the server stops.

    `draining` refuses new requests with 503 while running ones go on; `cut()` ends those too: each gets
    `ServerStoppingError`, which becomes a 503 or, in a stream, an error event.
    """

    def __init__(self) -> None:
        self.draining = False
        self.active = 0
        self._cut = False
        self._work: set[asyncio.Task[Any]] = set()

    def cut(self) -> None:
        """Ends every request in progress; the waiters of `run_until_disconnect` see `ServerStoppingError`."""
        self.draining = self._cut = True
        for task in self._work:
            task.cancel()

    async def run_until_disconnect(self, work: Coroutine[Any, Any, T], receive: Receive) -> T:
        """Awaits `work` unless its client leaves first; cancelled work has ended before this returns.

        Raises `ClientGoneError` or `ServerStoppingError` where `work` was cut short, else what it raises.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnect(receive))
        self._work.add(task)
        if self._cut:
            task.cancel()
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGoneError
            if task.cancelled():
                raise ServerStoppingError
            return task.result()
        finally:
            self._work.discard(task)
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
