"""Decides who may use the server: API keys on every route that costs or changes something, and host names."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from microvllm.openai_compat.errors import ForbiddenError, clip, error_response

# Probes, what a Prometheus without a key collects in vLLM, too, and the description of the API.
OPEN_PATHS = frozenset(
    {
        "/",
        "/health",
        "/ready",
        "/ping",
        "/version",
        "/get_load",
        "/metrics",
        "/metrics/",
        "/load",
        "/docs",
        "/redoc",
        "/openapi.json",
    }
)


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
        if scope["type"] == "http" and not self._open(scope) and not self._allowed(scope):
            refusal = Response(
                b'{"error":"Unauthorized"}', 401, {"www-authenticate": "Bearer"}, "application/json"
            )
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    @staticmethod
    def _open(scope: Scope) -> bool:
        # A browser asks with OPTIONS whether it may send the key at all.
        return scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS"

    def _allowed(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(token.strip()).digest()
        known = False
        for expected in self._digests:
            known |= hmac.compare_digest(digest, expected)
        return known and scheme.lower() == b"bearer"


class HostMiddleware:
    """Answers 403 unless the Host header names this machine, or one of `names`.

    A page from elsewhere can let its own name point to 127.0.0.1 (DNS rebinding). To the browser the server
    then belongs to the page, which may read its answers; but the Host header still has the page's name.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self.app = app
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for name, value in scope["headers"]:
                if name == b"host" and not self._allowed(host_of(value.decode("latin-1"))):
                    refusal = ForbiddenError(
                        f"The host {clip(value.decode('latin-1'))!r} is not served here; "
                        "--allowed-hosts names hosts beside localhost."
                    )
                    await error_response(refusal)(scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def _allowed(self, host: str) -> bool:
        return is_loopback(host) or host in self._names


def host_of(header: str) -> str:
    """The name or address in a Host header, without its port and brackets, in lower case."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].removesuffix(".")


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own: localhost (RFC 6761), 127.0.0.0/8 or ::1."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
