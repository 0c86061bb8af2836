"""How the tests of the HTTP surface talk to it: in process, or through a real server on a free port."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import pytest
from fake_client import FakeClient
from process_tools import PATIENCE_S
from starlette.types import ASGIApp

from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.server import HttpServer
from microvllm.openai_compat.transport.protocol import http_config


@asynccontextmanager
async def in_process(client: FakeClient, **args: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client wired to the application without a socket; unless `args` say otherwise for any host."""
    args.setdefault("allowed_hosts", ("*",))
    app = create_app(client, ServerArgs(**args))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as session:
        yield session


@contextmanager
def real_server(
    client: FakeClient,
    tls: ssl.SSLContext | None = None,
    connections: int | None = None,
    wrap: Callable[[ASGIApp], ASGIApp] | None = None,
    run: Callable[[Coroutine[Any, Any, None]], object] = asyncio.run,
    **args: Any,
) -> Iterator[int]:
    """The application behind our own protocol on a free port of 127.0.0.1, in a thread; yields the port.

    At most `connections` at once, and unless `args` say otherwise for any host. `wrap` may put something
    around the application, `run` makes the event loop.
    """
    args.setdefault("allowed_hosts", ("*",))
    app: ASGIApp = create_app(client, ServerArgs(**args))  # type: ignore[arg-type]
    app = app if wrap is None else wrap(app)
    config = http_config(app, log_level="error", limit_concurrency=connections)
    config.load()
    config.ssl = tls
    server = HttpServer(config, on_ready=lambda: None)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(PATIENCE_S)
    if thread.is_alive():
        raise RuntimeError("the server did not stop")


@contextmanager
def server_lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    """What a started server logs during the block. uvicorn's loggers do not propagate to the root."""
    logger = logging.getLogger("uvicorn.error")
    with caplog.at_level(logging.DEBUG, logger.name):
        logger.addHandler(caplog.handler)
        try:
            yield caplog.records
        finally:
            logger.removeHandler(caplog.handler)


async def assert_no_callback_is_long(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], Awaitable[object]], most_s: float
) -> None:
    """No callback that the event loop runs during `act` takes more processor time, of a quiet core.

    What the code takes it takes in each of three tries; what others on the machine make of it differs.
    """
    times: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        times.append(time.thread_time() - began)

    longest: list[float] = []
    while not longest or (min(longest) >= most_s and len(longest) < 3):
        times.clear()
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.Handle, "_run", timed)
            await act()
        longest.append(max(times) / slowness())
    if min(longest) >= most_s:
        raise AssertionError(f"callbacks of {longest} s")


def slowness() -> float:
    """How many times the processor time of a quiet core from 2023 a thread needs here and now; at least 1.

    A bound of processor time is a property of the code only as a multiple of it: cores differ, and each is
    slower while others use its caches.
    """
    began = time.thread_time()
    sum(range(1_000_000))
    return max(1.0, (time.thread_time() - began) / 17e-3)


def held_port() -> socket.socket:
    """Keeps a port of 127.0.0.1 for a server that is told its number; nobody else is given it meanwhile.

    A free port that nobody holds may be another test's before the server has bound it.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the server binds it a second time
    sock.bind(("127.0.0.1", 0))
    return sock


def eventually(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Waits until the condition holds; fails the test if it does not within the time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("the condition did not come true in time")
        time.sleep(0.005)


def health_of(port: int) -> int:
    """The status of /health; 0 while nobody listens. It is asked often: a client of httpx takes 30 ms."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def events(text: str) -> list[Any]:
    """The parsed events of a stream; checks the framing and that `[DONE]` comes last, once."""
    frames = text.split("\n\n")
    if frames.pop() != "" or frames.pop() != "data: [DONE]":
        raise AssertionError(f"not closed by [DONE]: {text[-200:]!r}")
    if any(not frame.startswith("data: {") or "\n" in frame for frame in frames):
        raise AssertionError("a frame is not one data line")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def raw_exchange(port: int, *parts: bytes) -> bytes:
    """Sends bytes as they are, returns everything until the server closes; fails the test if it does not."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as sock:
        try:
            for part in parts:
                sock.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before everything was sent: the answer is what counts
        received = b""
        try:
            while chunk := sock.recv(65536):
                received += chunk
        except ConnectionResetError:
            pass
        except TimeoutError:
            raise AssertionError("the connection was not closed") from None
        return received
