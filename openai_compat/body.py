"""Reads a request body: bounded in size and time, JSON, an object."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from starlette.requests import Request
from starlette.types import Receive

from microvllm.openai_compat.errors import (
    BAD_SHAPE,
    ClientGoneError,
    Fault,
    PayloadTooLargeError,
    RequestTimeoutError,
    shape_error,
)
from microvllm.runtime.errors import InvalidRequestError

MAX_DEPTH = 100  # of nesting; orjson's own limit is 1024, where recursive code elsewhere already fails
BODY_DEADLINE_S = 60.0  # for the whole body: one byte a second must not hold a connection for ever


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the request's body.

    Raises `InvalidRequestError` (content type, JSON, not an object), `PayloadTooLargeError`,
    `RequestTimeoutError`, or `ClientGoneError` if the client left while sending.
    """
    media_type = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
    if media_type != "application/json":
        raise InvalidRequestError(
            "Unsupported Media Type: Only 'application/json' is allowed", None, kind=BAD_SHAPE
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    try:
        data = await asyncio.wait_for(_read(request.receive, max_bytes), BODY_DEADLINE_S)
    except asyncio.TimeoutError:
        raise RequestTimeoutError(
            f"The request body took longer than {BODY_DEADLINE_S:g} s to arrive."
        ) from None
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        fault = Fault("json_invalid", f"JSON decode error: {error.msg}")
        raise shape_error([(f"body.{error.pos}", fault)]) from None
    if not isinstance(body, dict):
        raise shape_error([("body", Fault("model_attributes_type", "Input should be a valid dictionary"))])
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _deeper_than(body, MAX_DEPTH):
        raise shape_error(
            [("body", Fault("recursion_loop", f"Input is nested deeper than {MAX_DEPTH} levels"))]
        )
    return body


async def _read(receive: Receive, max_bytes: int) -> bytes:
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        data += message.get("body", b"")
        if len(data) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(data)


def _deeper_than(value: Any, limit: int) -> bool:
    """Goes down level by level, so that the depth of the input is not the depth of our stack."""
    level = [value]
    for _ in range(limit):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for group in children for child in group if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The request body is larger than {max_bytes} bytes.")
