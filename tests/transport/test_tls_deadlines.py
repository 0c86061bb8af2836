"""The begin of a connection under TLS, its handshake, and its end: what a client takes of it, or not."""

from __future__ import annotations

import gc
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop
from fake_client import FakeClient
from http_tools import eventually, raw_exchange, real_server
from process_tools import PATIENCE_S
from starlette.types import ASGIApp, Receive, Scope, Send

from microvllm.openai_compat import server
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.transport import listen, protocol
from microvllm.openai_compat.transport.listen import tls_context

TLS = Path(__file__).parent.parent / "data" / "tls"
CERT, KEY = TLS / "one.cert.pem", TLS / "one.key.pem"
DEADLINE_S = 0.75
SIZE = 6 << 20  # more than the kernel and the transport take at once
PIECE, PAUSE_S = 64 << 10, 0.005


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-length", b"%d" % SIZE), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(SIZE)})


def instead(app: ASGIApp) -> ASGIApp:
    return large


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the server has no connection any more; a client's time to take something is short."""
    gone, before = threading.Event(), protocol.GuardedProtocol.connection_lost

    def connection_lost(connection: protocol.GuardedProtocol, exc: Exception | None) -> None:
        before(connection, exc)
        gone.set()

    monkeypatch.setattr(protocol.GuardedProtocol, "connection_lost", connection_lost)
    monkeypatch.setattr(protocol, "WRITE_DEADLINE_S", DEADLINE_S)
    monkeypatch.setattr(protocol, "MIN_TAKEN_BYTES", 1000)
    return gone


@contextmanager
def asked() -> Iterator[ssl.SSLSocket]:
    """A client of a server's own event loop that has sent a request, and takes little at once."""
    context = tls_context(ServerArgs(ssl_certfile=str(CERT), ssl_keyfile=str(KEY)))
    with (
        real_server(FakeClient(), tls=context, wrap=instead, run=uvloop.run) as port,
        socket.socket() as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE)
        sock.settimeout(PATIENCE_S)
        sock.connect(("127.0.0.1", port))
        asking = ssl.create_default_context(cafile=str(CERT))
        with asking.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            yield client


def taken_slowly(client: ssl.SSLSocket) -> int:
    """Read over many deadlines, up to the server's close_notify or the end that it makes of it."""
    size = 0
    try:
        while data := client.recv(PIECE):
            size += len(data)
            time.sleep(PAUSE_S)
    except (ssl.SSLEOFError, ConnectionResetError):
        pass
    return size


@pytest.mark.parametrize("shutdown_s", [None, DEADLINE_S], ids=["ours", "TLS"])
def test_a_client_that_makes_progress_gets_all_unless_the_deadline_of_tls_decides(
    shutdown_s: float | None, lost: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutdown_s is not None:
        monkeypatch.setattr(server, "TLS_SHUTDOWN_S", shutdown_s)
    with asked() as client:
        began = time.monotonic()
        whole = taken_slowly(client) > SIZE
        assert whole == (shutdown_s is None)
        assert not whole or time.monotonic() - began > 2 * DEADLINE_S
        client.unwrap() if whole else None
        assert lost.wait(PATIENCE_S)


def test_a_client_that_stops_reading_is_ended(lost: threading.Event) -> None:
    with asked() as client:
        client.recv(PIECE)
        assert lost.wait(20), "uvloop's own deadline is 30 s"
        assert taken_slowly(client) < SIZE


def test_a_client_that_never_answers_close_notify_is_ended(lost: threading.Event) -> None:
    with asked() as client:
        size = 0
        while size < SIZE:
            size += len(client.recv(PIECE))
        assert lost.wait(20), "uvloop's own deadline is 30 s"


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_a_handshake_counts_until_its_deadline_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio's own loop keeps the objects of one that failed."""
    context: Any = tls_context(ServerArgs(ssl_certfile=str(CERT), ssl_keyfile=str(KEY)))
    context.room = lambda: 1
    begin = partial(context.wrap_bio, ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
    kept = [begin()]
    with pytest.raises(ConnectionRefusedError):
        begin()
    monkeypatch.setattr(listen, "HANDSHAKE_DEADLINE_S", -1.0)
    kept.append(begin())
    assert len(context._handshakes) == 1


def test_handshakes_count_among_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of one makes room for another, without waiting for a garbage collection."""
    monkeypatch.setattr(server, "HANDSHAKE_DEADLINE_S", 3600.0)
    context: Any = tls_context(ServerArgs(ssl_certfile=str(CERT), ssl_keyfile=str(KEY)))
    most = 4
    asking = ssl.create_default_context(cafile=str(CERT))

    def connect() -> socket.socket:
        return stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))

    def answer(sock: socket.socket) -> bytes:
        """The begin of it; nothing of a connection that was closed instead."""
        try:
            if not isinstance(sock, ssl.SSLSocket):
                sock = stack.enter_context(asking.wrap_socket(sock, server_hostname="localhost"))
            sock.sendall(HEALTH)
            return sock.recv(12)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, BrokenPipeError):
            return b""

    gc.disable()
    try:
        with real_server(FakeClient(), tls=context, connections=most, run=uvloop.run) as port:
            for _ in range(3 * most):
                raw_exchange(port, b"this is no TLS")
            with ExitStack() as stack:
                established = stack.enter_context(asking.wrap_socket(connect(), server_hostname="localhost"))
                silent = [connect() for _ in range(most - 1)]
                assert connect().recv(1) == b"", "it is closed at once"
                assert answer(connect()) == b""
                assert answer(established) == b"HTTP/1.1 200"
                silent.pop().close()
                silent.pop().close()
                eventually(lambda: answer(connect()) == b"HTTP/1.1 200")
            eventually(lambda: context.room() == most and not context._handshakes)
    finally:
        gc.enable()
