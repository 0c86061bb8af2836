"""Serves the OpenAPI document, and a page that renders it without resources from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.endpoint import Endpoint, Switch
from microvllm.openai_compat.api.openapi import build_document
from microvllm.openai_compat.state import ServerState

PAGE = Path(__file__).with_name("docs.html")
# The page is one file and requests nothing but /openapi.json of this server.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def openapi(request: Request, state: ServerState) -> Response:
    """Serve the OpenAPI document."""
    if state.openapi is None:  # making it takes 20 ms, and no key is needed to read it
        pooling = state.client.config.spec.pooling is not None
        document = build_document(request.app.state.endpoints, state.args, pooling=pooling)
        state.openapi = orjson.dumps(document)
    return Response(state.openapi, media_type="application/json")


async def docs(request: Request, state: ServerState) -> Response:
    """A page for people."""
    headers = {"content-security-policy": POLICY}
    return Response(PAGE.read_bytes(), headers=headers, media_type="text/html")


_DOCS: dict[str, Any] = {
    "needs_key": False,
    "documented": False,
    "switch": Switch(lambda args: not args.disable_fastapi_docs),
}

ENDPOINTS = (
    Endpoint(path="/openapi.json", handler=openapi, **_DOCS),
    Endpoint(path="/docs", handler=docs, **_DOCS),
    Endpoint(path="/redoc", handler=docs, **_DOCS),
)
