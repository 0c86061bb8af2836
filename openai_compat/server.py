"""Serves a model over HTTP: binds, loads, answers, drains."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import inspect
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.metrics import log_stats
from microvllm.openai_compat.state import ServerState
from microvllm.openai_compat.transport.lifecycle import Lifecycle
from microvllm.openai_compat.transport.listen import (
    HANDSHAKE_DEADLINE_S,
    RenewableContext,
    address_of,
    bind_socket,
    refresh_certificate,
    release_socket,
    start_listening,
    tls_context,
)
from microvllm.openai_compat.transport.protocol import TLS_SHUTDOWN_S, GuardedProtocol, http_config
from microvllm.runtime.config import EngineArgs, EngineConfig
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.process.spawn import STOP_SIGNALS, SpawnedEngine
from microvllm.runtime.progress import OnProgress
from microvllm.runtime.text.chat_template import template_problem

logger = logging.getLogger("microvllm.server")

T = TypeVar("T")

MAX_CONNECTIONS = 16_384
RESERVED_FILES = 256  # open files that are no connections of clients
# Lines of uvicorn that need no key.
PROVOKED_LINES = ("Invalid HTTP request received.", "Exceeded concurrency limit.")
SELDOM_S = 60.0
FINAL_FLUSH_S = 2.0  # for the last error events to reach their clients


def print_line(line: str) -> None:
    """Print a line. Output that cannot be written does not end a server."""
    try:
        print(line, flush=True)
    except OSError as error:
        # What is buffered would fail again at the exit, and each line of the access log.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        logger.warning("stdout cannot be written (%s): nothing more goes there", error.strerror)


def serve(
    engine_args: EngineArgs,
    args: ServerArgs,
    *,
    on_progress: OnProgress | None = None,
    spawned: SpawnedEngine | None = None,
    announce: Callable[[str], None] = print_line,
) -> None:
    """Serve until one of `STOP_SIGNALS`, then let running requests finish and return.

    `spawned` is an engine process that runs already, which makes the start shorter.
    `on_progress` is called as the engine's start advances, `announce` with the few lines meant for people.
    The port is bound first: kernels may have to be compiled, and then the model loads. A signal
    during loading ends in `SystemExit` with 128 + its number.
    Raises `ConfigError` with one line that names what is wrong, `EngineError` if the engine does not start,
    or cannot be started again.
    """
    if args.chat_template is not None and (problem := template_problem(args.chat_template)):
        raise ConfigError(f"--chat-template: {problem}")
    tls = tls_context(args)
    sock = bind_socket(args)
    try:
        _run_event_loop(
            _serve(engine_args.prepare(on_progress), args, sock, tls, on_progress, spawned, announce)
        )
    finally:
        release_socket(sock, args)


def _run_event_loop(main: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        asyncio.run(main)
    else:
        uvloop.run(main)


async def _serve(
    config: EngineConfig,
    args: ServerArgs,
    sock: socket.socket,
    tls: RenewableContext | None,
    on_progress: OnProgress | None,
    spawned: SpawnedEngine | None,
    announce: Callable[[str], None],
) -> None:
    signals = Signals()
    client = await signals.run(
        EngineClient.start(config, chat_template=args.chat_template, on_progress=on_progress, spawned=spawned)
    )
    try:
        app = create_app(client, args)
        # What is alive now stays: a collection need not walk it, which would hold up every request.
        gc.collect()
        gc.freeze()
        start_listening(sock, args)
        http = http_config(
            app,
            log_config=_log_config(args),
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            server_header=False,
            limit_concurrency=_raise_file_limit(),
            timeout_keep_alive=args.http_timeout_keep_alive,
            timeout_graceful_shutdown=int(FINAL_FLUSH_S),
        )
        http.load()
        http.ssl = tls
        state: ServerState = app.state.server
        pooling = client.config.spec.pooling is not None
        on_ready = functools.partial(_announce, args, state.model_names[0], announce, pooling)
        server = HttpServer(http, on_ready)
        serving = asyncio.ensure_future(server.serve(sockets=[sock]))
        helpers = []
        for number, metrics in enumerate(state.metrics):
            logged = log_stats(metrics, args.stats_interval, client.config.device, number)
            helpers.append(asyncio.ensure_future(logged))
        if tls is not None and args.enable_ssl_refresh:
            helpers.append(asyncio.ensure_future(refresh_certificate(tls, args)))
        stopped = asyncio.ensure_future(signals.wait(1))
        given_up = asyncio.ensure_future(client.wait_given_up())
        await asyncio.wait((serving, stopped, given_up), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not serving.done() and not given_up.done():
            await drain(state.lifecycle, args.shutdown_timeout, signals)
        helpers.append(asyncio.ensure_future(force_exit(server, signals)))
        server.should_exit = True
        await serving
        for helper in helpers:
            helper.cancel()
        if given_up.done():
            given_up.result()  # raises
        given_up.cancel()
    finally:
        await client.close()


class Signals:
    """Counts the signals that stop a service: the first starts a drain, the second ends it at once."""

    def __init__(self) -> None:
        self.count = 0
        self.last: int = signal.SIGTERM
        self._arrived = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        self.last = number
        self.count += 1
        self._arrived.set()
        self._arrived = asyncio.Event()

    async def wait(self, count: int) -> None:
        """Wait until so many signals have arrived."""
        while self.count < count:
            await self._arrived.wait()

    async def run(self, work: Awaitable[T]) -> T:
        """Await the work. The first signal cancels it and raises `SystemExit` with 128 + its number."""
        task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(self.wait(1))
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise SystemExit(128 + self.last)


async def drain(lifecycle: Lifecycle, timeout: float, signals: Signals) -> None:
    """Refuse new requests and wait for running ones, `timeout` seconds or until a second signal.

    Requests that still run then end with a 503, or an error event in a stream.
    """
    lifecycle.draining = True
    if lifecycle.active:
        logger.info(
            "Stopping: %d requests have %g s to finish; a second signal ends them at once.",
            *(lifecycle.active, timeout),
        )
    waiting = asyncio.ensure_future(signals.wait(2))
    idle = asyncio.ensure_future(_idle(lifecycle))
    await asyncio.wait((waiting, idle), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    why = "at a second signal" if waiting.done() else f"that did not finish within {timeout:g} s"
    waiting.cancel()
    idle.cancel()
    if lifecycle.active:
        logger.warning("Ending %d requests %s.", lifecycle.active, why)
        lifecycle.cut()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_idle(lifecycle), FINAL_FLUSH_S)


async def force_exit(server: uvicorn.Server, signals: Signals) -> None:
    """Wait for no connection any more after a further signal, as uvicorn says while it waits for them."""
    await signals.wait(signals.count + 1)
    server.force_exit = True


async def _idle(lifecycle: Lifecycle) -> None:
    while lifecycle.active:
        await asyncio.sleep(0.02)


class HttpServer(uvicorn.Server):
    """uvicorn's server without its signal handlers, which cut streams and exit by the signal."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own, for sockets that are bound already, with other deadlines of TLS."""
        loop = asyncio.get_running_loop()
        tls: dict[str, Any] = {}
        if self.config.ssl:
            tls = {"ssl": self.config.ssl, "ssl_handshake_timeout": HANDSHAKE_DEADLINE_S}
            if isinstance(self.config.ssl, RenewableContext):
                self.config.ssl.room = self._room
            if "ssl_shutdown_timeout" in inspect.signature(loop.create_server).parameters:
                tls["ssl_shutdown_timeout"] = TLS_SHUTDOWN_S
        protocol = functools.partial(GuardedProtocol, self.config, self.server_state, {})
        self.servers = [
            await loop.create_server(protocol, sock=sock, backlog=self.config.backlog, **tls)
            for sock in sockets or ()
        ]
        self.started = True
        self._on_ready()

    def _room(self) -> int:
        """Return how many connections may be in their handshake."""
        return (self.config.limit_concurrency or MAX_CONNECTIONS) - len(self.server_state.connections)


def _raise_file_limit() -> int:
    """Raise the limit of open files to what the system allows; returns how many connections fit.

    Past that limit accepting fails, so that new clients would wait instead of being refused.
    """
    try:
        import resource
    except ImportError:  # there is none for Windows
        return MAX_CONNECTIONS
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most > MAX_CONNECTIONS + RESERVED_FILES:
        most = MAX_CONNECTIONS + RESERVED_FILES
    if files != resource.RLIM_INFINITY and files < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        files = most
    return (
        MAX_CONNECTIONS
        if files == resource.RLIM_INFINITY
        else max(min(files - RESERVED_FILES, MAX_CONNECTIONS), 1)
    )


def _announce(args: ServerArgs, model: str, announce: Callable[[str], None], pooling: bool) -> None:
    address = address_of(args)
    announce(f"Starting microvllm server on {address}")
    scheme = "https" if args.ssl_certfile is not None else "http"
    where = f"--unix-socket {args.uds} {scheme}://localhost" if args.uds is not None else address
    key = " -H 'Authorization: Bearer YOUR_KEY'" if args.api_keys else ""
    path, field = "chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
    if pooling:
        path, field = "embeddings", '"input": "Hello!"'
    announce(
        f"Try: curl {where}/v1/{path} -H 'Content-Type: application/json'{key} "
        f'-d \'{{"model": "{model}", {field}}}\''
    )
    if args.page and args.uds is None and not pooling:
        announce(f"Or open {address}/ in a browser.")
    announce("Application startup complete.")


def _log_config(args: ServerArgs) -> dict[str, Any]:
    """Return uvicorn's logging configuration with our loggers, without access lines of the excluded paths."""
    config = copy.deepcopy(LOGGING_CONFIG)
    level = args.log_level.upper()
    config["loggers"]["microvllm"] = {"handlers": ["default"], "level": level, "propagate": False}
    config["filters"] = {"seldom": {"()": SeldomLines}}
    config["loggers"]["uvicorn.error"]["filters"] = ["seldom"]
    if args.disable_access_log_for_endpoints:
        quiet = frozenset(args.disable_access_log_for_endpoints)
        config["filters"]["quiet"] = {"()": QuietPaths, "paths": quiet}
        config["handlers"]["access"]["filters"] = ["quiet"]
    return config


class QuietPaths(logging.Filter):
    """Drops uvicorn's access lines for some paths, whatever their query."""

    def __init__(self, paths: frozenset[str]) -> None:
        super().__init__()
        self._paths = paths

    def filter(self, record: logging.LogRecord) -> bool:
        # uvicorn logs (client, method, path with query, HTTP version, status).
        arguments = record.args
        path = arguments[2] if isinstance(arguments, tuple) and len(arguments) == 5 else ""
        return str(path).partition("?")[0] not in self._paths


class SeldomLines(logging.Filter):
    """Passes a line that anyone can provoke once a minute, with the number of those dropped before it."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[str, tuple[float, int]] = {}  # by line: when, and how many were dropped since

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg not in PROVOKED_LINES:
            return True
        passed, dropped = self._passed.get(record.msg, (-math.inf, 0))
        if 0 <= record.created - passed < SELDOM_S:  # negative when the clock was set back
            self._passed[record.msg] = passed, dropped + 1
            return False
        self._passed[record.msg] = record.created, 0
        if dropped:
            record.msg += f" ({dropped} more since the last line of this)"
        return True
