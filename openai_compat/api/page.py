"""Serves the chat page at `/`: static files, which request nothing but this server's own API."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.endpoint import Endpoint, Switch
from microvllm.openai_compat.state import ServerState

FOLDER = Path(__file__).resolve().parents[1] / "page"
# The page refers to the others by relative addresses, so that it also works below the path prefix of a proxy.
FILES = {
    "/": "index.html",
    **{f"/page/{name}": name for name in ("page.css", "icon.svg")},
    **{f"/page/{name}.js": f"{name}.js" for name in ("page", "api", "markdown", "settings")},
}
MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# What a model writes is never markup to the page. If it became some by a mistake, the browser would still
# refuse scripts that are not these files, every other server, and text that is assigned as HTML.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # A browser asks each time whether a file has changed, so that a page never belongs to another version.
    "cache-control": "no-cache",
}


async def page(request: Request, state: ServerState) -> Response:
    """One file of the page; 304 if the client has it already."""
    content, media_type, etag = _file(FILES[request.scope["path"]])
    headers = {**HEADERS, "etag": etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if known & {etag, "*"}:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


@functools.cache
def _file(name: str) -> tuple[bytes, str, str]:
    """Return the content, media type and entity tag of a file."""
    content = (FOLDER / name).read_bytes()
    return content, MEDIA_TYPES[Path(name).suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"'


ENDPOINTS = tuple(
    Endpoint(
        path=path,
        handler=page,
        needs_key=False,
        documented=False,
        switch=Switch(lambda args: args.page),
    )
    for path in FILES
)
