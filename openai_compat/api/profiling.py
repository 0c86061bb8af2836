"""POST /start_profile and /stop_profile: a torch profile of the engine, written to the operator's folder."""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.fields import parse_fields
from microvllm.openai_compat.api.schemas import PROFILE
from microvllm.openai_compat.state import ServerState
from microvllm.openai_compat.transport.body import read_object

logger = logging.getLogger("microvllm.server")


async def start_profile(request: Request) -> Response:
    """Starts a profile of the engine. A body is not needed; `profile_prefix` begins the file's name."""
    state: ServerState = request.app.state.server
    headers = request.headers
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    fields = parse_fields(PROFILE, await read_object(request, state) if has_body else {})
    if state.args.profiler is not None:
        await state.client.start_profile(state.args.profiler, fields["profile_prefix"])
        logger.info("Profiling the engine.")
    return Response()


async def stop_profile(request: Request) -> Response:
    """Ends the profile and writes the trace; the engine stands still meanwhile."""
    state: ServerState = request.app.state.server
    logger.info("Profile written to %s", await state.client.stop_profile())
    return Response()
