"""The protocol on bytes in any pieces: a request with `Upgrade` is the same request without it."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fake_client import FakeClient
from http_tools import real_server, server_lines
from process_tools import PATIENCE_S
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from microvllm.openai_compat.transport import protocol
from microvllm.openai_compat.transport.lifecycle import ON_DISCONNECT
from microvllm.openai_compat.transport.protocol import GuardedProtocol, http_config

HEAD = b"POST /a%20b?c=d HTTP/1.1\r\nHost: a\r\nX: y z\r\n"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nuPGRADE: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"
WITH_LENGTH = b"Content-Length: 12\r\n\r\nGET / HTTP/1"  # a body that reads like a request
IN_CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\n\r\n\r\n0\r\nUpgrade: h2c\r\n\r\n"


class Pipe(asyncio.Transport):
    """A transport that keeps what is written; `waiting`: how many bytes its client has not taken."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = self.aborted = False
        self.waiting = 0

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def abort(self) -> None:
        self.closed = self.aborted = True

    def write(self, data: Any) -> None:
        if self.closed:
            raise RuntimeError("the handler is closed")  # as uvloop
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the request, but for `Upgrade` and what goes with it."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    hop_by_hop = (b"connection", b"upgrade", b"http2-settings")
    headers = [header for header in scope["headers"] if header[0] not in hop_by_hop]
    seen = repr([scope[key] for key in ("method", "path", "query_string", "http_version")] + [headers, body])
    length = b"%d" % len(seen)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": seen.encode()})


async def exchange(*parts: bytes) -> tuple[bytes, bool]:
    """Return what the protocol answers to `parts`, one after the other, and whether it closed."""
    connection = GuardedProtocol(CONFIG, ServerState(), {})
    pipe = Pipe()
    connection.connection_made(pipe)
    for part in parts:
        connection.data_received(part)
        await asyncio.sleep(0)
    for _ in range(1000):  # nothing but bytes is waited for
        if pipe.closed or not connection.tasks:
            break
        await asyncio.sleep(0)
    answer = pipe.written, pipe.closed
    connection.connection_lost(None)
    return answer


CONFIG = http_config(echo, log_level="error")
CONFIG.load()


def count(answer: bytes) -> int:
    return answer.count(b"HTTP/1.1 200 OK")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "rest",
    [
        WITH_LENGTH + NEXT,
        IN_CHUNKS + NEXT,
        b"\r\n" + NEXT,
        b"Connection: close\r\n" + WITH_LENGTH,
        IN_CHUNKS + HEAD + UPGRADE + WITH_LENGTH + NEXT,
    ],
    ids=["length", "chunks", "no body", "close", "two"],
)
async def test_upgrade_is_ignored_wherever_the_bytes_are_cut(rest: bytes) -> None:
    expected = await exchange(HEAD + rest.replace(UPGRADE, b""))
    assert count(expected[0]) == 1 + rest.count(b"Host:") and expected[1] == (b"close" in rest)
    sent = HEAD + UPGRADE + rest
    for cut in range(len(sent)):
        assert await exchange(sent[:cut], sent[cut:]) == expected, cut
    assert await exchange(*(sent[at : at + 1] for at in range(len(sent)))) == expected


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"X: " + b"y" * protocol.MAX_HEAD_BYTES + b"\r\n\r\n", b"431"),
        (b"X: y\r\n" * protocol.MAX_HEADERS + b"\r\n", b"431"),
        (b"X: " + b"y" * 2 * protocol.MAX_HEAD_BYTES, b"431"),
        (b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"y" * 20_000, b"431"),
        (b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 4000, b"431"),
        (b"Transfer-Encoding: chunked\r\n\r\n1;" + b"y" * 20_000, b"431"),
        (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", b"400"),
        (b"Transfer-Encoding: chunked\r\n" + WITH_LENGTH, b"400"),
        (b"Content-Length: 1\r\n" + WITH_LENGTH, b"400"),
        (WITH_LENGTH + b"no request\r\n\r\n", b"400"),
        (b"Host: b\r\n\r\n", b"400"),
        (b"X: y\r\n z\r\n\r\n", b"400"),
    ],
    ids=range(13),
)
async def test_a_request_with_upgrade_has_the_limits_of_any_other(rest: bytes, status: bytes) -> None:
    def pieces(sent: bytes) -> list[bytes]:
        return [sent[at : at + 4096] for at in range(0, len(sent), 4096)]

    assert await exchange(HEAD + UPGRADE + rest) == await exchange(HEAD + rest)
    answer, closed = await exchange(*pieces(HEAD + UPGRADE + rest))
    assert (answer, closed) == await exchange(*pieces(HEAD + rest))
    assert closed and answer.startswith(b"HTTP/1.1 %s " % status)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "before", [b"", NEXT, HEAD + WITH_LENGTH, HEAD + IN_CHUNKS.replace(b"Upgrade", b"X")]
)
async def test_a_long_head_is_refused_with_the_bytes_it_comes_in(before: bytes) -> None:
    endless = HEAD + b"X: " + b"y" * protocol.MAX_HEAD_BYTES
    answer, closed = await exchange(*[before] * bool(before), endless)
    assert closed and answer.endswith(b'"code":431}}') and count(answer) == bool(before)
    within = HEAD + b"X: " + b"y" * (protocol.MAX_HEAD_BYTES - len(HEAD) - 3)
    assert not (await exchange(*[before] * bool(before), within))[1]
    # Where a request ends in the same bytes, it is unknown how many are of the next one.
    assert not (await exchange((before or NEXT) + within))[1]


@pytest.mark.asyncio
@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("behind", [0, 2])
async def test_what_is_left_of_an_answer_is_dropped_with_its_client(
    behind: int, lost: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever waits behind the request: uvicorn marks only the last one of a connection as disconnected."""
    gone, seen = asyncio.Event(), []

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        for body in (b"a", b"b"):
            if body == b"a":
                await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body, "more_body": body == b"a"})
            await gone.wait()
            seen.append(scope[ON_DISCONNECT](None))
            if not lost:
                return

    config = http_config(slow, log_level="error")
    config.load()
    connection, pipe = GuardedProtocol(config, ServerState(), {}), Pipe()
    connection.connection_made(pipe)
    connection.data_received(NEXT * (1 + behind))
    await asyncio.sleep(0)
    assert pipe.written.count(b"HTTP/1.1") == 1
    pipe.close()
    if lost:
        connection.connection_lost(None)
    gone.set()
    with server_lines(caplog) as lines:
        await asyncio.gather(*connection.tasks)
    assert not lines and pipe.written.count(b"HTTP/1.1") == 1 and not any(seen)


class Deadlines:
    """An event loop whose timers the test fires."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.due: dict[Any, tuple[Any, ...]] = {}  # by deadline

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)

    def call_later(self, seconds: float, function: Any, *args: Any) -> Any:
        self.due[seconds] = (function, *args)
        return SimpleNamespace(cancel=lambda: self.due.pop(seconds, None))

    def fire(self, seconds: float) -> None:
        function, *args = self.due.pop(seconds)
        function(*args)


KEEP_ALIVE_S, WRITE_S, TAKEN = 7.0, 11.0, protocol.MIN_TAKEN_BYTES


@pytest.mark.asyncio
@pytest.mark.parametrize("waiting", [1000, 10 * TAKEN])
@pytest.mark.parametrize(
    "how",
    ["close", "taken in part", "keep-alive over", "refused", "half closed", "paused", "failed", "incomplete"],
)
async def test_what_a_client_does_not_take_holds_no_connection(
    monkeypatch: pytest.MonkeyPatch, how: str, waiting: int
) -> None:
    """A transport that is closed goes on waiting for its last bytes to be taken, however few they are."""
    monkeypatch.setattr(protocol, "WRITE_DEADLINE_S", WRITE_S)

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        if how == "failed":
            raise ValueError("no answer any more")

    config = CONFIG
    if how in ("failed", "incomplete"):
        config = http_config(fails, log_level="critical")
        config.load()
    connection, pipe, loop = GuardedProtocol(config, ServerState(), {}), Pipe(), Deadlines()
    connection.loop, connection.timeout_keep_alive = loop, KEEP_ALIVE_S  # type: ignore[assignment]
    connection.connection_made(pipe)
    pipe.waiting = waiting
    if how == "paused":
        connection.pause_writing()
    elif how == "half closed":
        connection.eof_received()
    elif how == "refused":
        connection.data_received(b"no request\r\n\r\n")
    else:
        last = how in ("close", "taken in part")
        connection.data_received(NEXT[:-2] + b"Connection: close\r\n" * last + b"\r\n")
        await asyncio.gather(*connection.tasks)
        await asyncio.sleep(0)
        if how == "taken in part":  # of more than a transport holds back
            connection.pause_writing()
            connection.resume_writing()
        if how == "keep-alive over":
            assert not pipe.closed
            loop.fire(KEEP_ALIVE_S)
    for _ in range(waiting // TAKEN - 3):  # as long as it takes enough, it is left alone
        pipe.waiting -= TAKEN
        loop.fire(WRITE_S)
        assert not pipe.aborted
    pipe.waiting -= min(TAKEN - 1, waiting - 1)
    loop.fire(WRITE_S)
    assert pipe.aborted
    connection.connection_lost(None)
    assert not loop.due


@pytest.mark.asyncio
@pytest.mark.skipif(sys.platform != "linux", reason="where the kernel says what waits in it")
async def test_what_a_client_takes_from_the_kernel_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport writes on only when a third of the kernel's buffer is free."""
    monkeypatch.setattr(protocol, "WRITE_DEADLINE_S", WRITE_S)
    connection, pipe, loop = GuardedProtocol(CONFIG, ServerState(), {}), Pipe(), Deadlines()
    connection.loop = loop  # type: ignore[assignment]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * TAKEN)
        ours.setblocking(False)
        for _ in range(64):
            ours.send(bytes(TAKEN // 32))  # what a read takes a part of may count as a whole
        pipe._extra = {"socket": ours}
        connection.connection_made(pipe)
        if -connection._taken() < 2 * TAKEN:
            pytest.skip("this kernel does not say it of a pair")
        pipe.waiting = TAKEN
        connection.pause_writing()
        theirs.recv(TAKEN, socket.MSG_WAITALL)
        loop.fire(WRITE_S)
        assert not pipe.aborted
        theirs.recv(1000)
        loop.fire(WRITE_S)
        assert pipe.aborted
    connection.connection_lost(None)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("request_", "rest"),
    [(NEXT, b"\r\n"), (HEAD + b"Content-Length: 9\r\n\r\n", b"x")],
    ids=["idle", "in a body"],
)
async def test_bytes_that_begin_no_request_hold_no_connection(
    request_: bytes, rest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line breaks between requests, or a body behind its answer, end the wait for another request anew."""

    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    config = http_config(early, log_level="error")
    config.load()
    connection, pipe, loop = GuardedProtocol(config, ServerState(), {}), Pipe(), Deadlines()
    connection.loop, connection.timeout_keep_alive = loop, KEEP_ALIVE_S  # type: ignore[assignment]
    connection.connection_made(pipe)
    connection.data_received(request_)
    await asyncio.gather(*connection.tasks)
    connection.data_received(rest)
    if rest == b"\r\n":  # the beginning of a request has its own deadline
        connection.data_received(NEXT[:9])
        assert list(loop.due) == [protocol.HEAD_DEADLINE_S]
        connection.data_received(NEXT[9:])
        assert not loop.due
        await asyncio.gather(*connection.tasks)
        connection.data_received(rest)
    assert list(loop.due) == [KEEP_ALIVE_S] and not pipe.closed
    connection.connection_lost(ConnectionResetError())
    assert not loop.due


@pytest.mark.asyncio
async def test_a_client_that_takes_its_answer_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "WRITE_DEADLINE_S", WRITE_S)
    connection, pipe, loop = GuardedProtocol(CONFIG, ServerState(), {}), Pipe(), Deadlines()
    connection.loop = loop  # type: ignore[assignment]
    connection.connection_made(pipe)
    for taken in (False, True):
        pipe.waiting = 2 * TAKEN
        connection.pause_writing()
        pipe.waiting = 0
        if taken:
            connection.resume_writing()
        else:  # the transport is about to say so
            loop.fire(WRITE_S)
        assert WRITE_S not in loop.due and not pipe.aborted
    connection.connection_lost(None)


@pytest.mark.asyncio
async def test_requests_with_upgrade_behind_one_another_are_bounded() -> None:
    one = HEAD + UPGRADE + b"\r\n"
    answer, closed = await exchange(one * (1 + protocol.MAX_PIPELINED))
    assert count(answer) == 1 + protocol.MAX_PIPELINED and not closed
    answer, closed = await exchange(one * (2 + protocol.MAX_PIPELINED))
    assert count(answer) <= 1 and closed


@pytest.mark.asyncio
async def test_a_tunnel_is_refused() -> None:
    for target in (b"a:80", b"/health"):
        answer, closed = await exchange(b"CONNECT %s HTTP/1.1\r\nHost: a\r\n\r\n" % target + NEXT)
        assert answer.startswith(b"HTTP/1.1 400 ") and count(answer) == 0 and closed


def test_clients_that_offer_http2_are_served(caplog: pytest.LogCaptureFixture) -> None:
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"}
    headers = {**offer, "Content-Type": "application/json"}
    websocket = {"Connection": "Upgrade", "Upgrade": "websocket"}
    with real_server(FakeClient()) as port, server_lines(caplog) as lines:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        client.connect()
        sock = client.sock
        for body in (json.dumps({"prompt": "x"}).encode(), iter([b'{"prompt":', b' "x"}'])):
            client.request("POST", "/tokenize", body, headers)
            answer = client.getresponse()
            assert answer.status == 200 and json.loads(answer.read())["count"] == 2
        for path, status in (("/health", 200), ("/nothing", 404)):
            client.request("GET", path, headers=websocket)
            answer = client.getresponse()
            answer.read()
            assert answer.status == status
        assert client.sock is sock
        client.close()
    assert not [record for record in lines if record.levelno >= logging.WARNING]
