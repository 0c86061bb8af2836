"""The ASGI application: routes, error handlers, and the middlewares in front of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from microvllm.openai_compat import errors, models, monitoring
from microvllm.openai_compat.auth import AuthMiddleware
from microvllm.openai_compat.chat import create_chat_completion
from microvllm.openai_compat.completions import create_completion
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.http_metrics import HttpMetricsMiddleware
from microvllm.openai_compat.lifecycle import AdmissionMiddleware
from microvllm.openai_compat.state import ServerState
from microvllm.openai_compat.tokenize import detokenize, tokenize
from microvllm.runtime.errors import EngineError, RequestError

if TYPE_CHECKING:
    from microvllm.runtime.client import EngineClient


def create_app(client: EngineClient, args: ServerArgs) -> Starlette:
    """The server's application for a started engine; `app.state.server` is its `ServerState`."""
    state = ServerState(client, args)
    middleware = [Middleware(AdmissionMiddleware, lifecycle=state.lifecycle)]
    if args.api_keys:
        middleware.insert(0, Middleware(AuthMiddleware, keys=args.api_keys))
    middleware.insert(0, Middleware(HttpMetricsMiddleware, metrics=state.http_metrics))
    load = [Middleware(monitoring.LoadMiddleware, state=state)]
    app = Starlette(
        routes=[
            Route("/v1/completions", create_completion, methods=["POST"], middleware=load),
            Route("/v1/chat/completions", create_chat_completion, methods=["POST"], middleware=load),
            Route("/v1/models", models.list_models, methods=["GET"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/health", models.health, methods=["GET"]),
            Route("/ping", models.health, methods=["GET", "POST"]),
            Route("/version", models.version, methods=["GET"]),
            Route("/metrics", monitoring.metrics, methods=["GET"]),
            Route("/metrics/", monitoring.metrics, methods=["GET"]),
            Route("/load", monitoring.load, methods=["GET"]),
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
