"""Reads the JSON object of a request body, bounded in size, in time and in the work of parsing it."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.types import Receive

from microvllm.openai_compat.errors import (
    BAD_SHAPE,
    BodyMemoryError,
    ClientGoneError,
    ContentEncodingError,
    Fault,
    PayloadTooLargeError,
    RequestTimeoutError,
    clip,
    shape_error,
)
from microvllm.runtime.errors import InvalidRequestError

MAX_DEPTH = 100  # of nesting; orjson's own limit is 1024, where recursive code elsewhere already fails
# Parsing holds the interpreter's lock, so every other request waits for it, whichever thread it runs in.
# A unit is about 50 ns: a number costs one, a list or an object five, a string with its comma seven.
MAX_PARSE_UNITS = 600_000
QUOTE_UNITS = 3
UNITS = {b",": 1, b"[": 4, b"{": 4, b'"': QUOTE_UNITS}
WEIGH_BYTES = 256 << 10  # at a time
INLINE_BYTES = 16 << 10  # smaller bodies are parsed at once, others in a worker thread
NAMED_BYTES = 4 << 20  # up to here a refusal looks for the field at fault, which holds the lock, too
BODY_DEADLINE_S = 30.0  # for the whole body: one byte a second must not hold a connection indefinitely
# Bodies that are being received or parsed, over all connections; what each has below FREE_BYTES, as much as
# uvicorn buffers in any case, is not counted: a few slow uploads must not keep out every small request.
MAX_HELD_BODIES = 8  # of the largest size
FREE_BYTES = 64 << 10


class LargeFields(msgspec.Struct):
    """The fields that may hold many values, unparsed."""

    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    tokens: msgspec.Raw = msgspec.Raw()
    stop: msgspec.Raw = msgspec.Raw()
    stop_token_ids: msgspec.Raw = msgspec.Raw()
    logit_bias: msgspec.Raw = msgspec.Raw()
    allowed_token_ids: msgspec.Raw = msgspec.Raw()
    bad_words: msgspec.Raw = msgspec.Raw()


class _Deadline:
    """Cancels the task that enters it if it has not left after so many seconds: `RequestTimeoutError`.

    `asyncio.wait_for` makes a task, and two turns of the event loop, of every body that has arrived already:
    a fifth of the processor time of a refusal.
    """

    __slots__ = ("_is_over", "_seconds", "_task", "_timer")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._is_over = False

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)

    def _end(self) -> None:
        self._is_over = True
        if self._task is not None:
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if not self._is_over:
            return
        if self._task is not None and hasattr(self._task, "uncancel"):  # from Python 3.11 on
            self._task.uncancel()
        raise RequestTimeoutError(
            f"The request body took longer than {self._seconds:g} s to arrive."
        ) from None


class BodyReader:
    """Reads bodies of at most `max_bytes`, and bounds the memory of all that are being read or parsed.

    Belongs to the event loop's thread. `run_blocking` runs a function in a worker thread.
    """

    def __init__(self, max_bytes: int, run_blocking: Callable[..., Awaitable[Any]]) -> None:
        self._max_bytes = max_bytes
        self._free = MAX_HELD_BODIES * max_bytes
        self._run_blocking = run_blocking

    async def read_object(self, request: Request) -> dict[str, Any]:
        """Return the JSON object in the request's body.

        Raises `InvalidRequestError` (content type, JSON, not an object, too many values),
        `ContentEncodingError`, `PayloadTooLargeError`, `RequestTimeoutError`, `BodyMemoryError` where all
        bodies together take too much memory, or `ClientGoneError` if the client left while sending.
        """
        codings = ",".join(request.headers.getlist("content-encoding"))
        # Some clients name the charset here, which vLLM takes: nothing is encoded.
        if any(c.strip().lower() not in ("", "identity", "utf-8", "utf8") for c in codings.split(",")):
            raise ContentEncodingError(
                f"Content-Encoding: {clip(codings)} is not supported; send the body uncompressed."
            )
        media_type = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
        if media_type != "application/json":
            raise InvalidRequestError(
                "Unsupported Media Type: Only 'application/json' is allowed", None, kind=BAD_SHAPE
            )
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            raise self._too_large()
        data = bytearray()
        try:
            with _Deadline(BODY_DEADLINE_S):
                await self._read(request.receive, data)
            if len(data) <= INLINE_BYTES:
                return parse_object(data)
            found: dict[str, Any] = await self._run_blocking(parse_object, data)
            return found
        finally:
            self._free += max(len(data) - FREE_BYTES, 0)

    async def _read(self, receive: Receive, data: bytearray) -> None:
        """Fill `data` with the body."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            size = len(data) + len(part)
            if size > self._max_bytes:
                raise self._too_large()
            counted = max(size - FREE_BYTES, 0) - max(len(data) - FREE_BYTES, 0)
            if counted > self._free:
                raise BodyMemoryError
            self._free -= counted
            data += part
            if not message.get("more_body", False):
                return

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(f"The request body is larger than {self._max_bytes} bytes.")


def parse_object(data: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object that `data` holds. Raises `InvalidRequestError`."""
    if parse_units(data) > MAX_PARSE_UNITS:
        raise shape_error([(_largest_field(data), Fault("Input holds too many values"))])
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        foreign = b"\0" in data[:4] or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        problem = "not UTF-8, but UTF-16 or UTF-32" if foreign else error.msg
        fault = Fault(f"JSON decode error: {problem}")
        raise shape_error([(f"body.{error.pos}", fault)]) from None
    if not isinstance(body, dict):
        raise shape_error([("body", Fault("Input should be a valid dictionary"))])
    brackets = data.count(b"[") + data.count(b"{")
    if brackets > MAX_DEPTH and _deeper_than(body, MAX_DEPTH):  # fewer cannot nest so deep
        raise shape_error([("body", Fault(f"Input is nested deeper than {MAX_DEPTH} levels"))])
    return body


def _largest_field(data: bytes | bytearray) -> str:
    """Return the field that makes a body so large, else "body". Skips values without creating them."""
    if len(data) > NAMED_BYTES:
        return "body"
    try:
        fields = msgspec.json.decode(data, type=LargeFields)
    except (msgspec.DecodeError, RecursionError):
        return "body"
    sizes = {name: len(memoryview(getattr(fields, name))) for name in fields.__struct_fields__}
    name = max(sizes, key=lambda name: sizes[name])
    return f"body.{name}" if sizes[name] > len(data) // 2 else "body"


def parse_units(data: bytes | bytearray) -> int:
    """Estimate the work of parsing, in units, from the punctuation; only exact up to `MAX_PARSE_UNITS`."""
    units = _weigh(data, UNITS)
    if units <= MAX_PARSE_UNITS:
        return units
    # Long texts hold punctuation, too. Once the escaped quotes are gone, every second piece is text.
    bare = data.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in data else data
    if _weigh(bare, {b'"': QUOTE_UNITS}) > MAX_PARSE_UNITS:
        return units
    return _weigh(b'""'.join(bare.split(b'"')[::2]), UNITS)


def _weigh(data: bytes | bytearray, weights: Mapping[bytes, int]) -> int:
    """Count single bytes, weighted; stops soon after the count has exceeded `MAX_PARSE_UNITS`."""
    units = 0
    for start in range(0, len(data), WEIGH_BYTES):
        end = start + WEIGH_BYTES
        units += sum(weight * data.count(byte, start, end) for byte, weight in weights.items())
        if units > MAX_PARSE_UNITS:
            break
    return units


def _deeper_than(value: Any, limit: int) -> bool:
    """Goes down level by level, so that the depth of the input is not the depth of our stack."""
    level = [value]
    for _ in range(limit):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for group in children for child in group if isinstance(child, (dict, list))]
        if not level:
            return False
    return True
