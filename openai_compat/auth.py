"""API keys: `Authorization: Bearer KEY` on every route but the probes."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = frozenset({"/health", "/ping", "/version"})


class AuthMiddleware:
    """Answers 401 unless the request carries one of the keys.

    vLLM guards only paths below /v1; here everything is guarded except `OPEN_PATHS`, because /tokenize
    and whatever comes later cost as much as a completion. The path is the one of the ASGI scope: a URL
    rebuilt from the Host header can be forged (CVE-2026-48710). Keys are compared as SHA-256 digests in
    constant time, always with all of them, so neither length nor a common prefix can be timed.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._allowed(scope):
            refusal = Response(
                b'{"error":"Unauthorized"}', 401, {"www-authenticate": "Bearer"}, "application/json"
            )
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(token.strip()).digest()
        known = False
        for expected in self._digests:
            known |= hmac.compare_digest(digest, expected)
        return known and scheme.lower() == b"bearer"
