"""GET /openapi.json, and a page at /docs that renders it without anything from elsewhere."""

from __future__ import annotations

from pathlib import Path

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.openapi import build_document
from microvllm.openai_compat.state import ServerState

PAGE = Path(__file__).with_name("docs.html")
# The page is one file and talks to this server only.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def openapi(request: Request) -> Response:
    """This document."""
    state: ServerState = request.app.state.server
    document = build_document(request.app.routes, state.args)
    return Response(orjson.dumps(document), media_type="application/json")


async def docs(request: Request) -> Response:
    """A page for people."""
    headers = {"content-security-policy": POLICY}
    return Response(PAGE.read_bytes(), headers=headers, media_type="text/html")
