"""What stands in front of the whole application: the proxy's path prefix, and ids of requests in headers.

Plain ASGI, outside of Starlette's own error handler, so that an unexpected 500 carries the headers, too.
"""

from __future__ import annotations

import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What a client may have repeated to it: an id that is harmless in headers, logs and bodies.
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RootPathMiddleware:
    """Serves every path below `prefix` as well as without it, for a proxy that does not take it off.

    Everything behind sees the path without the prefix, so no guard can be walked around by adding one.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._prefix + "/"):
            scope = {**scope, "path": scope["path"][len(self._prefix) :]}
        await self.app(scope, receive, send)


class RequestIdMiddleware:
    """Puts `X-Request-Id` on every answer: the request's own if it is safe, else 32 new hex digits."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        wishes = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"]
        known = wishes[0] if wishes and SAFE_ID.fullmatch(wishes[0]) else uuid.uuid4().hex
        header = (b"x-request-id", known.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self.app(scope, receive, send_with_id)
