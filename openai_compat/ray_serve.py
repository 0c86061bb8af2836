"""Serves by Ray Serve, on one machine or many: `serve run microvllm.openai_compat.ray_serve:app model=DIR`.

A replica is an engine with the whole application, as `microvllm serve` has it, in one Ray actor. A front
takes the requests from Ray's proxy and sends each to a replica; until the first byte of the answer it may
send it to another one, so that a replica that dies loses only what had begun. Needs `microvllm[ray]`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
import typer
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.errors import error_event, error_response
from microvllm.openai_compat.flags.argv import option_words
from microvllm.openai_compat.flags.command import Command
from microvllm.openai_compat.flags.options import Fields, with_options
from microvllm.openai_compat.metrics import log_stats
from microvllm.openai_compat.transport.lifecycle import ON_DISCONNECT
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError, EngineDeadError
from microvllm.runtime.options.flag import check_flags
from microvllm.runtime.process.client import EngineClient

logger = logging.getLogger("microvllm.server")

# What Ray's proxy does in place of a server's own sockets: to give one is an error.
OF_THE_PROXY = (
    *("port", "uds", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"),
    *("enable_ssl_refresh", "http_timeout_keep_alive", "uvicorn_log_level", "disable_uvicorn_access_log"),
    "disable_access_log_for_endpoints",
)
ATTEMPTS = 3  # a request that no engine survives ends so many
PAUSE_S = 0.2  # before an attempt that follows another
UNAVAILABLE = 503  # a full queue, or an engine that is being started again
MAX_ONGOING = 4096  # requests at a replica, beyond which Ray lets them wait in the front
EVENTS = "text/event-stream"
LOST = "The replica that was answering has died."


class Scale(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many replicas, and what each takes of a machine; None: see `_resources`.

    target_ongoing_requests: of each replica; more, those that wait included, for `upscale_delay_s` seconds
    start another, fewer for `downscale_delay_s` end one.
    """

    min_replicas: Annotated[int, msgspec.Meta(ge=0)] = 1
    max_replicas: Annotated[int, msgspec.Meta(ge=1)] | None = None
    target_ongoing_requests: Annotated[float, msgspec.Meta(gt=0)] = 64.0
    upscale_delay_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    downscale_delay_s: Annotated[float, msgspec.Meta(ge=0)] = 600.0
    front_replicas: Annotated[int, msgspec.Meta(ge=1)] = 1
    num_cpus: Annotated[float, msgspec.Meta(ge=0)] | None = None
    num_gpus: Annotated[float, msgspec.Meta(ge=0)] | None = None


class Head(NamedTuple):
    """The first item of an answer: its status and headers."""

    status: int
    headers: list[tuple[bytes, bytes]]


class EngineReplica:
    """An engine and its application. Raises `ConfigError` where `microvllm serve` would end with one line."""

    async def __init__(self, engine: EngineArgs, args: ServerArgs) -> None:  # type: ignore[misc]  # Ray awaits it
        config = await asyncio.to_thread(engine.prepare)
        self._client = await EngineClient.start(config, chat_template=args.chat_template)
        self._app = create_app(self._client, args)
        self._tasks = [asyncio.ensure_future(self._client.wait_given_up())]
        metrics = self._app.state.server.metrics
        if metrics is not None:
            self._tasks.append(asyncio.ensure_future(log_stats(metrics, args.stats_interval, config.device)))

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica where this raises: the engine cannot be started again."""
        if self._tasks[0].done():
            self._tasks[0].result()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Head | bytes]:
        """Yield the head of the answer to a request, then what of its body has been written each time."""
        exchange = _Exchange(body)
        scope[ON_DISCONNECT] = exchange.on_disconnect
        task = asyncio.ensure_future(self._app(scope, exchange.receive, exchange.send))
        task.add_done_callback(lambda _: exchange.end())
        try:
            async for item in exchange.items():
                yield item
            await task
        finally:
            exchange.leave()
            if not task.done():
                await asyncio.wait((task,))


class _Exchange:
    """One request of an application whose client is a Ray actor."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._sent: asyncio.Queue[Any] = asyncio.Queue()
        self._gone = asyncio.Event()
        self._client_left: Callable[[], None] | None = None

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self._sent.put_nowait(message)

    def end(self) -> None:
        self._sent.put_nowait(None)

    def on_disconnect(self, callback: Callable[[], None] | None) -> bool:
        """Call back when the client leaves, see `ON_DISCONNECT`; False if it has."""
        self._client_left = callback
        return not self._gone.is_set()

    def leave(self) -> None:
        """The client has its answer, or waits for none."""
        self._gone.set()
        if self._client_left is not None:
            self._client_left()

    async def items(self) -> AsyncIterator[Head | bytes]:
        """The answer; parts of the body that are there together are one."""
        while (message := await self._sent.get()) is not None:
            if message["type"] == "http.response.start":
                headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
                yield Head(message["status"], headers)
                continue
            parts = [message.get("body", b"")]
            while not self._sent.empty():
                following = self._sent.get_nowait()
                if following is None:
                    self._sent.put_nowait(None)
                    break
                parts.append(following.get("body", b""))
            if body := b"".join(parts):
                yield body


class Front:
    """Sends each request to a replica, and to another one if that fails before it has begun to answer."""

    def __init__(self, replicas: Any, max_body_bytes: int) -> None:
        self._replicas = replicas.options(stream=True)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        given = request.scope
        names = ("type", "http_version", "method", "scheme", "query_string", "client", "server")
        scope = {name: given[name] for name in names}
        scope["headers"] = [(bytes(name), bytes(value)) for name, value in given["headers"]]
        scope["path"] = given["path"].removeprefix(given["root_path"])  # of Ray's `route_prefix`
        scope["root_path"] = ""
        parts, length = [], 0
        async for part in request.stream():
            parts.append(part)
            length += len(part)
            if length > self._max_body_bytes:  # which the application refuses, whatever follows
                break
        body = b"".join(parts)
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_S * attempt)
            stream = self._replicas.answer.remote(scope, body)
            try:
                head = await anext(stream)
                first = await anext(stream, b"")
            except (RayError, RayServeException, StopAsyncIteration) as error:
                logger.warning("A replica did not answer %s (%s).", scope["path"], type(error).__name__)
                stream.cancel()  # it may only have been out of reach
                continue
            except asyncio.CancelledError:  # the client has left
                stream.cancel()
                raise
            if head.status != UNAVAILABLE or attempt == ATTEMPTS - 1:
                return _Answer(head, first, stream)
            stream.cancel()
        return error_response(EngineDeadError("No replica answers."), scope["path"])


class _Answer(Response):
    """Passes an answer on. Ray cancels it where the client leaves, and so the request of the replica."""

    def __init__(self, head: Head, first: bytes, stream: Any) -> None:
        super().__init__(status_code=head.status)
        self.raw_headers = head.headers
        self._first, self._stream = first, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for part in self._stream:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except (RayError, RayServeException):
            if not self.headers.get("content-type", "").startswith(EVENTS):
                raise  # the connection is closed in the middle of the body
            lost = error_event(EngineDeadError(LOST))
            await send({"type": "http.response.body", "body": lost, "more_body": True})
        except asyncio.CancelledError:
            self._stream.cancel()
            raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def app(options: Mapping[str, Any]) -> serve.Application:
    """Build the application: `options` are fields of `Scale`, and flags of `microvllm serve` with _ for -.

    `host` says for whom Ray's proxy listens: with a loopback address, the default, requests for other hosts
    are refused. Raises `ConfigError` or a usage error for what `microvllm serve` would not start with.
    """
    own = {name: value for name, value in options.items() if name in Scale.__struct_fields__}
    try:
        scale = msgspec.convert(own, Scale, strict=False)  # the command line gives texts
    except msgspec.ValidationError as error:
        raise ConfigError(f"ray_serve: {error}") from None
    most = scale.max_replicas or scale.min_replicas
    if most < max(1, scale.min_replicas):
        raise ConfigError(f"ray_serve: max_replicas {most} is below min_replicas {scale.min_replicas}")
    engine, args = read_options({name: value for name, value in options.items() if name not in own})
    cpus, gpus = _resources(scale, engine)
    timeout = max(args.shutdown_timeout, 0.0)
    replicas = serve.deployment(
        name="EngineReplica",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # All ranks of an engine are processes of the actor: one bundle, so one machine.
        placement_group_bundles=[{"CPU": cpus, **({"GPU": gpus} if gpus else {})}],
        placement_group_strategy="STRICT_PACK",
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "initial_replicas": max(1, scale.min_replicas),
            "max_replicas": most,
            "target_ongoing_requests": scale.target_ongoing_requests,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
        },
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=timeout,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
    )(EngineReplica).bind(engine, args)
    front = serve.deployment(
        name="Front",
        num_replicas=scale.front_replicas,
        max_ongoing_requests=MAX_ONGOING * 4,
        graceful_shutdown_timeout_s=timeout,
        ray_actor_options={"num_cpus": 0},
    )(Front)
    return front.bind(replicas, args.max_body_bytes)


def read_options(options: Mapping[str, Any]) -> tuple[EngineArgs, ServerArgs]:
    """Read flags as the command line does. Raises `ConfigError` or `click.UsageError` naming one at fault."""
    found: list[tuple[EngineArgs, ServerArgs]] = []

    @with_options
    def options_of(engine: EngineArgs, server: Annotated[ServerArgs, Fields(without=OF_THE_PROXY)]) -> None:
        found.append((engine, server))

    program = typer.Typer(add_completion=False, rich_markup_mode=None)
    program.command(cls=Command)(options_of)
    words = []
    for name, value in options.items():
        switch = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else None
        words += option_words(name.replace("_", "-"), value if switch is None else switch, takes_several=True)
    typer.main.get_command(program).main(args=words, prog_name="ray_serve", standalone_mode=False)
    engine, args = found[0]
    if not engine.model:
        raise ConfigError("ray_serve: no model was given", remedy="name one: model=DIR")
    check_flags(engine)
    check_flags(args)
    return engine, args


def _resources(scale: Scale, engine: EngineArgs) -> tuple[float, float]:
    """CPUs and GPUs of a replica: those that were given, or a GPU for each rank unless on a CPU."""
    ranks = engine.tensor_parallel_size * engine.data_parallel_size
    gpus = scale.num_gpus if scale.num_gpus is not None else 0.0 if engine.device == "cpu" else float(ranks)
    cpus = scale.num_cpus if scale.num_cpus is not None else float(engine.cpu_threads or ranks)
    return cpus, gpus
