"""HTTP/1.1 with the limits that uvicorn's own parser does not have.

uvicorn with httptools takes a header of 50 MB, any number of headers and of trailers behind a chunked body,
all requests of 30 bytes that fit into 256 KB at once, and waits indefinitely for the second half of a request
line or for a client that has stopped reading. This protocol bounds all of them. Trailers are dropped: a key
or a content type counts only in the head (RFC 9110, 6.5.1). `Upgrade` is ignored (7.8), and the body read.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import socket
import sys
from collections.abc import Callable
from typing import Any, cast

import httptools
import orjson
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from microvllm.openai_compat.transport.lifecycle import ON_DISCONNECT

if sys.platform != "win32":
    import fcntl
    import termios

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 128
MAX_FRAMING_BYTES = 4 << 10  # of a body: sizes and extensions of its chunks, and its trailers
CHUNK_FRAMING_BYTES = 16  # beside that for each chunk: its size and two line ends are at most 12
MAX_PIPELINED = 64  # requests of a connection that wait for the answer to the one before them
HTTP_VERSIONS = ("1.0", "1.1")
CHUNK_WRITER = "microvllm.chunk_writer"  # in the scope, see `ChunkSendMiddleware`
# For the request line and the headers. A client that opens 10,000 connections at once on a busy machine
# writes its requests many seconds after that.
HEAD_DEADLINE_S = 30.0
# For a client that has stopped reading its answer: in this time it has to take so many bytes of what waits.
WRITE_DEADLINE_S = 30.0
MIN_TAKEN_BYTES = 64 << 10
# TLS has a deadline of its own for the rest of an answer and the client's close_notify, 30 s in any case.
# Out of reach, it leaves it to the one above: that ends a connection that makes no progress, and no other.
TLS_SHUTDOWN_S = 30 * 86400.0
BYTES_ACKED = slice(120, 128)  # in Linux's `struct tcp_info`, since 4.1


def http_config(app: ASGIApp, **options: Any) -> uvicorn.Config:
    """Return the configuration of a server that speaks this protocol alone; `options` are uvicorn's."""
    return uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        lifespan="off",
        interface="asgi3",  # uvicorn would not recognise it: the application is no coroutine function
        proxy_headers=False,
        **options,
    )


class Flag:
    """An `asyncio.Event` without a deque: each connection and each request would hold one (0.7 KB)."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self, is_set: bool = False) -> None:
        self._is_set = is_set
        self._waiters: list[asyncio.Future[None]] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        self._is_set = False

    async def wait(self) -> None:
        if self._is_set:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)


class Flow(FlowControl):
    """uvicorn's flow control of one connection, with a `Flag`."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._is_writable_event = Flag(is_set=True)  # type: ignore[assignment]


class Pipeline(list[Any]):
    """The requests of a connection that wait for the answer to the one before them; almost always none."""

    __slots__ = ()

    def appendleft(self, item: Any) -> None:
        self.insert(0, item)


class ChunkWriter:
    """Writes chunks of an answer that has begun, without a message through the layers."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def open(self) -> bool:
        """Whether a chunk may be written: the client is there and reads."""
        cycle = self._cycle
        gone = cycle.disconnected or cycle.response_complete
        return bool(cycle.chunked_encoding) and not gone and not cycle.flow.write_paused

    def write(self, body: bytes) -> None:
        """Write one chunk, which may not be empty; only while it is open."""
        self._cycle.transport.write(b"%x\r\n%s\r\n" % (len(body), body))


class GuardedProtocol(HttpToolsProtocol):
    """One connection. A request beyond a limit is answered 400, 408, 431 or 505 and the connection closed.

    A connection beyond uvicorn's `limit_concurrency` is answered 503 at once.
    """

    # With more than 30 attributes in it, the dict of an instance would hold its own keys: 1.2 KB.
    __slots__ = (
        *("_in_head", "_head_bytes", "_data_bytes", "_framing_bytes", "_counts_framing"),
        *("_refusal", "_head_timer", "_write_timer", "_on_disconnect", "_answered"),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pipeline = Pipeline()  # type: ignore[assignment]
        self._in_head = True
        self._head_bytes = 0
        self._data_bytes = 0  # of the data being parsed, until a head or a body ends in it
        self._framing_bytes = 0  # received after the head and no part of a body
        self._counts_framing = False  # not in data that a head ends in: how much of it is head is unknown
        self._refusal = 400
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._on_disconnect: Callable[[], None] | None = None
        self._answered: RequestResponseCycle | None = None  # `cycle` is the last of those behind it

    def on_disconnect(self, callback: Callable[[], None] | None) -> bool:
        """Have `callback` (None: nothing) called when the client leaves; False if it has left already."""
        self._on_disconnect = callback
        if self.transport.is_closing():
            self._drop_answer()
            return False
        return True

    def chunk_writer(self) -> ChunkWriter | None:
        """Return what writes chunks of the answer in progress; None if requests wait behind it."""
        return None if self.pipeline else ChunkWriter(self.cycle)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self._refusal = 503
            self.send_400_response("")
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self._drop_answer()
        if self._on_disconnect is not None:
            self._on_disconnect()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._counts_framing = not self._in_head
        self._data_bytes = len(data)
        if self._in_head:
            self._head_bytes += len(data)
        else:
            self._framing_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("")
            return
        # The parser passes on a header or a trailer only when it is whole, so an endless one is seen here.
        too_long = (
            self._head_bytes > MAX_HEAD_BYTES if self._in_head else self._framing_bytes > MAX_FRAMING_BYTES
        )
        if too_long and not self.transport.is_closing():
            self._refusal = 431
            self.send_400_response("")
        elif not (self._in_head or self.transport.is_closing()) and self.cycle.response_complete:
            # What came begins no request: line breaks, or more of a body whose request is answered.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _parse(self, data: bytes) -> None:
        """Parse `data`, and every head that has an `Upgrade` a second time without it.

        The parser ends such a request at its head, as if what follows were another protocol, although it may
        have a body: `curl --http2` and Java's HttpClient send `Upgrade: h2c` with every request.
        """
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as stop:
                rest = rest[stop.args[0] :]
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
            lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
            # The old one would skip all that follows `Connection: close`.
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope = cast("dict[str, Any]", self.scope)
        del scope["state"]  # of a lifespan, which there is none of; more than 21 entries take 0.4 KB more
        scope[ON_DISCONNECT], scope[CHUNK_WRITER] = self.on_disconnect, self.chunk_writer
        self._in_head = True
        self._head_bytes = self._data_bytes  # 0 if other bytes may be in front of it
        self._start_head_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        if self._counts_framing:
            self._framing_bytes -= len(body)
        super().on_body(body)

    def on_chunk_header(self) -> None:
        if self._counts_framing:
            self._framing_bytes -= CHUNK_FRAMING_BYTES

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._data_bytes = 0
        self._counts_framing = False
        self._framing_bytes = 0
        self._stop_head_timer()
        if self.parser.get_http_version() not in HTTP_VERSIONS:
            self._refuse(505)
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse(431)
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse(400)
        hosts = sum(name == b"host" for name, _ in self.headers)
        if self.parser.get_http_version() == "1.1" and hosts != 1:
            self._refuse(400)
        if self.parser.get_method() == b"CONNECT":  # has no end that could be known
            self._refuse(400)
        if self.parser.should_upgrade():
            return  # `_parse` begins anew
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:  # its task has not begun
            self.cycle.message_event = Flag()  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        self._data_bytes = 0
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        task = self.loop.create_task(cycle.run_asgi(app))
        task.add_done_callback(self._end_asgi_task)
        self.tasks.add(task)

    def _end_asgi_task(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if self.transport.is_closing():  # by uvicorn, if the application failed in the middle of its answer
            self._watch_flush()

    def _drop_answer(self) -> None:
        """Send no more of the answer in progress, and have its task take that for the end it comes to."""
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _refuse(self, status: int) -> None:
        self._refusal = status
        raise ValueError("refused")  # ends the parse; `data_received` then calls `send_400_response`

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if self.pipeline or (cycle is not None and cycle.response_started and not cycle.response_complete):
            self._close()  # an answer in progress must not have another in its middle
            return
        status = http.HTTPStatus(self._refusal)
        error = {"message": status.phrase, "type": "Bad Request", "param": None, "code": status.value}
        body = orjson.dumps({"error": error})
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s" % (status.value, status.phrase.encode(), len(body), body)
        )
        self._close()

    def _close(self) -> None:
        """Close as soon as the client has taken what waits for it, or takes too little of it."""
        self.transport.close()
        self._watch_flush()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._watch_flush()

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            self._close()

    def eof_received(self) -> None:
        self._watch_flush()  # the transport closes itself

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_flush()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_flush()

    def _watch_flush(self) -> None:
        """Have the connection aborted if the client takes too little of what waits for it."""
        if self._write_timer is None and self.parser is not None:  # which a lost connection has not
            self._write_timer = self.loop.call_later(WRITE_DEADLINE_S, self._write_late, self._taken())

    def _write_late(self, before: int) -> None:
        self._write_timer = None
        if not (self.transport.get_write_buffer_size() or self.transport.is_closing()):
            return
        if self._taken() - before < MIN_TAKEN_BYTES:
            self.transport.abort()
        else:
            self._watch_flush()

    def _taken(self) -> int:
        """Return a count that grows with each byte that the client takes.

        Its kernel says it of a TCP connection. Elsewhere it is the negative of what waits: a transport writes
        on only when a third of the kernel's megabytes are free, and under TLS holds bytes that it does not
        count.
        """
        waiting = self.transport.get_write_buffer_size()
        sock = self.transport.get_extra_info("socket")
        if sys.platform != "win32" and sock is not None:
            with contextlib.suppress(OSError, ValueError):  # closed, or of a kind that does not say
                if sys.platform == "linux" and sock.family in (socket.AF_INET, socket.AF_INET6):
                    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED.stop)
                    if acked := int.from_bytes(info[BYTES_ACKED], sys.byteorder):
                        return acked
                unsent = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
                waiting += int.from_bytes(unsent, sys.byteorder)
        return -waiting

    def resume_writing(self) -> None:
        self._stop_write_timer()
        if self.transport.is_closing():
            self._watch_flush()  # the rest has to be taken, too
        super().resume_writing()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_DEADLINE_S, self._head_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # An incomplete pipelined request must not cut off the response in progress.
            self._start_head_timer()
            return
        self._refusal = 408
        self.send_400_response("")
