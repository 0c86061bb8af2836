"""Comments in a stream that has nothing to say, so that no proxy takes it for dead."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

COMMENT = b": keep-alive\n\n"  # a comment of server-sent events; clients skip it


class KeepAliveMiddleware:
    """Sends a comment whenever an event stream was silent for `interval` seconds, from its start on.

    Whole events travel in one message each, so a comment never lands inside one.
    """

    def __init__(self, app: ASGIApp, interval: float) -> None:
        self.app = app
        self._interval = interval

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = _Stream(send, self._interval)
        try:
            await self.app(scope, receive, stream.send)
        finally:
            stream.stop()


class _Stream:
    """One answer on its way out."""

    def __init__(self, send: Send, interval: float) -> None:
        self._send = send
        self._interval = interval
        self._last = 0.0
        self._commenting: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        self._last = time.monotonic()
        starts = message["type"] == "http.response.start"
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.stop()
        await self._send(message)
        if starts and _is_event_stream(message):
            self._commenting = asyncio.ensure_future(self._comment())

    def stop(self) -> None:
        if self._commenting is not None:
            self._commenting.cancel()
            self._commenting = None

    async def _comment(self) -> None:
        while True:
            silent = time.monotonic() - self._last
            if silent < self._interval:
                await asyncio.sleep(self._interval - silent)
                continue
            self._last = time.monotonic()
            await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})


def _is_event_stream(message: Message) -> bool:
    types = [value for name, value in message.get("headers", ()) if name == b"content-type"]
    return bool(types) and types[0].startswith(b"text/event-stream")
