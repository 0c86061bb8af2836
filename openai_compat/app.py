"""The ASGI application: routes, error handlers, and the middlewares in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp

from microvllm.openai_compat import errors
from microvllm.openai_compat.api import docs, models, service
from microvllm.openai_compat.api.absent import Handler, absent_routes, switched_off
from microvllm.openai_compat.api.chat import create_chat_completion
from microvllm.openai_compat.api.completions import create_completion
from microvllm.openai_compat.api.generate import generate, generate_stream
from microvllm.openai_compat.api.render import render_chat_completion, render_completion
from microvllm.openai_compat.api.tokenize import detokenize, tokenize
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.state import ServerState
from microvllm.openai_compat.transport.middleware import (
    AdmissionMiddleware,
    AuthMiddleware,
    HostMiddleware,
    HttpMetricsMiddleware,
    KeepAliveMiddleware,
    LoadMiddleware,
    RequestIdMiddleware,
    RootPathMiddleware,
    ShortcutMiddleware,
    is_loopback,
)
from microvllm.runtime.errors import EngineError, RequestError

if TYPE_CHECKING:
    from microvllm.runtime.process.client import EngineClient


PROFILER_SWITCH = '--profiler-config \'{"profiler": "torch", "torch_profiler_dir": "FOLDER"}\''
# Origins of pages that this machine serves. A page from elsewhere has to be named: behind a firewall or
# without a key, any site that its user opens could use the server.
LOCAL_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


class Application(Starlette):
    """Starlette with `layers` around everything, its handler of unexpected errors included, first outermost.

    What Starlette calls middleware is inside of that handler, so a 500 would go out without their headers.
    """

    def __init__(self, layers: Sequence[Middleware], **options: Any) -> None:
        super().__init__(**options)
        self._layers = layers

    def build_middleware_stack(self) -> ASGIApp:
        stack: ASGIApp = ShortcutMiddleware(super().build_middleware_stack())
        for layer in reversed(self._layers):
            stack = layer.cls(stack, *layer.args, **layer.kwargs)
        return stack


def create_app(client: EngineClient, args: ServerArgs) -> Starlette:
    """The server's application for a started engine; `app.state.server` is its `ServerState`."""
    state = ServerState(client, args)
    middleware = [Middleware(AdmissionMiddleware, lifecycle=state.lifecycle)]
    if args.api_keys:
        middleware.insert(0, Middleware(AuthMiddleware, keys=args.api_keys))
    middleware.insert(0, Middleware(HttpMetricsMiddleware, metrics=state.http_metrics))
    load = [Middleware(LoadMiddleware, state=state)]
    app = Application(
        layers=_layers(args),
        routes=[
            Route("/v1/completions", create_completion, methods=["POST"], middleware=load),
            Route("/v1/chat/completions", create_chat_completion, methods=["POST"], middleware=load),
            Route("/v1/chat/completions/render", render_chat_completion, methods=["POST"]),
            Route("/v1/completions/render", render_completion, methods=["POST"]),
            Route("/generate", generate, methods=["POST"], middleware=load),
            Route("/generate_stream", generate_stream, methods=["POST"], middleware=load),
            Route("/v1/models", models.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", models.retrieve_model, methods=["GET"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/health", service.health, methods=["GET"]),
            Route("/ready", service.health, methods=["GET"]),
            Route("/ping", service.health, methods=["GET", "POST"]),
            Route("/version", service.version, methods=["GET"]),
            Route("/metrics", service.metrics, methods=["GET"]),
            Route("/metrics/", service.metrics, methods=["GET"], include_in_schema=False),
            Route("/load", service.load, methods=["GET"]),
            Route("/get_load", service.get_load, methods=["GET"]),
            Route("/v1/loads", service.loads, methods=["GET"]),
            Route("/kv_event_sources", service.kv_event_sources, methods=["GET"]),
            Route("/server_info", service.server_info, methods=["GET"]),
            Route("/get_server_info", service.server_info, methods=["GET"], include_in_schema=False),
            Route("/", docs.home, methods=["GET"], include_in_schema=False),
            *_optional_routes(args),
            *absent_routes(),
        ],
        middleware=middleware,
        exception_handlers={
            HTTPException: errors.on_http_exception,
            RequestError: errors.on_deliberate_error,
            EngineError: errors.on_deliberate_error,
            errors.ClientGoneError: errors.on_client_gone,
            Exception: errors.on_unexpected_error,
        },
    )
    # A redirect to the path with or without its slash would be built from the Host header.
    app.router.redirect_slashes = False
    app.state.server = state
    return app


def _optional_routes(args: ServerArgs) -> list[Route]:
    """The endpoints that a switch turns on, and the documentation, which another turns off."""
    tokenizer_info = args.enable_tokenizer_info_endpoint, "--enable-tokenizer-info-endpoint"
    profiler = args.profiler is not None, PROFILER_SWITCH
    dev_mode = args.dev_mode, "VLLM_SERVER_DEV_MODE=1 in the environment"
    routes = [
        _optional("/tokenizer_info", service.tokenizer_info, "GET", *tokenizer_info),
        _optional("/start_profile", service.start_profile, "POST", *profiler),
        _optional("/stop_profile", service.stop_profile, "POST", *profiler),
        _optional("/reset_prefix_cache", service.reset_prefix_cache, "POST", *dev_mode),
        _optional("/is_sleeping", service.is_sleeping, "GET", *dev_mode),
    ]
    if not args.disable_fastapi_docs:
        routes += [
            Route("/openapi.json", docs.openapi, methods=["GET"], include_in_schema=False),
            Route("/docs", docs.docs, methods=["GET"], include_in_schema=False),
            Route("/redoc", docs.docs, methods=["GET"], include_in_schema=False),
        ]
    return routes


def _optional(path: str, endpoint: Handler, method: str, enabled: bool, switch: str) -> Route:
    handler = endpoint if enabled else switched_off(switch)
    return Route(path, handler, methods=[method], include_in_schema=enabled)


def _layers(args: ServerArgs) -> list[Middleware]:
    layers = []
    unguarded = args.uds is None and not args.api_keys and is_loopback(args.host)
    if args.allowed_hosts is not None or unguarded:
        names = args.allowed_hosts or ()
        if "*" not in names:
            layers.append(Middleware(HostMiddleware, names=names))
    if args.root_path:
        layers.append(Middleware(RootPathMiddleware, prefix=args.root_path))
    if args.enable_request_id_headers:
        layers.append(Middleware(RequestIdMiddleware))
    if args.allowed_origins != ():
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=args.allowed_origins or (),
                allow_origin_regex=LOCAL_PAGES if args.allowed_origins is None else None,
                allow_methods=args.allowed_methods,
                allow_headers=args.allowed_headers,
                allow_credentials=args.allow_credentials,
            )
        )
    if args.sse_keep_alive_interval:
        layers.append(Middleware(KeepAliveMiddleware, interval=args.sse_keep_alive_interval))
    return layers
