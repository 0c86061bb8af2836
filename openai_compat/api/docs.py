"""GET /openapi.json, and a page at /docs that renders it without anything from elsewhere."""

from __future__ import annotations

from pathlib import Path

import orjson
from starlette.requests import Request
from starlette.responses import Response

import microvllm
from microvllm.openai_compat.api.openapi import build_document
from microvllm.openai_compat.state import ServerState

HOME = """<!doctype html>
<title>microvllm</title>
<p>microvllm {version} serves the API of OpenAI and vLLM below <code>/v1</code>.{links}
"""
# Relative, so that they also work below the prefix of a proxy.
HOME_LINKS = """
<p><a href="docs">/docs</a> describes it, <a href="openapi.json">/openapi.json</a> does so for programs.
"""
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


async def home(request: Request) -> Response:
    """Where everything is, for somebody who opens the server's address in a browser."""
    state: ServerState = request.app.state.server
    links = "" if state.args.disable_fastapi_docs else HOME_LINKS
    page = HOME.format(version=microvllm.__version__, links=links)
    return Response(page, headers={"content-security-policy": POLICY}, media_type="text/html")


async def docs(request: Request) -> Response:
    """A page for people."""
    headers = {"content-security-policy": POLICY}
    return Response(PAGE.read_bytes(), headers=headers, media_type="text/html")
