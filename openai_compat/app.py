"""Builds the ASGI application: routes from the endpoints' records, and layers around them."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from microvllm.openai_compat.api import (
    absent,
    chat_completions,
    completions,
    docs,
    generate,
    models,
    page,
    render,
    service,
    tokenize,
)
from microvllm.openai_compat.api.formats import warn_of_options
from microvllm.openai_compat.api.messages import create as messages
from microvllm.openai_compat.api.responses import create as responses
from microvllm.openai_compat.api.responses import stored as stored_responses
from microvllm.openai_compat.api.vectors import embeddings, scoring
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.state import ServerState
from microvllm.openai_compat.transport.middleware import inner_layers, outer_layers

if TYPE_CHECKING:
    from microvllm.runtime.process.client import EngineClient


# Adding an endpoint takes its own file, with its record, and a line here. The first one that fits answers.
ENDPOINTS = (
    *completions.ENDPOINTS,
    *chat_completions.ENDPOINTS,
    *messages.ENDPOINTS,
    *render.ENDPOINTS,
    *responses.ENDPOINTS,
    *stored_responses.ENDPOINTS,
    *generate.ENDPOINTS,
    *embeddings.ENDPOINTS,
    *scoring.ENDPOINTS,
    *models.ENDPOINTS,
    *tokenize.ENDPOINTS,
    *service.ENDPOINTS,
    *docs.ENDPOINTS,
    *page.ENDPOINTS,
    *absent.ENDPOINTS,
)


class EndpointRouter(Router):
    """Starlette's, without the three coroutines (0.9 KB of every waiting request) in front of an endpoint."""

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:  # type: ignore[override]
        if scope["type"] == "http":
            for route in self.routes:
                match, found = route.matches(scope)
                if match is Match.FULL and isinstance(route, Route):
                    scope.update(found)
                    return route.app(scope, receive, send)
        return super().__call__(scope, receive, send)


class Application(Starlette):
    """Puts `layers` around the router, the first outermost, and none of Starlette's own."""

    def __init__(self, layers: Sequence[Middleware], routes: Sequence[Route]) -> None:
        super().__init__()
        # A redirect to the path with or without its slash would be built from the Host header.
        self.router = EndpointRouter(routes, redirect_slashes=False)
        self._layers = layers

    def build_middleware_stack(self) -> ASGIApp:
        stack: ASGIApp = self.router
        for layer in reversed(self._layers):
            stack = layer.cls(stack, *layer.args, **layer.kwargs)
        return stack

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:  # type: ignore[override]
        scope["app"] = self
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        return self.middleware_stack(scope, receive, send)


def create_app(client: EngineClient, args: ServerArgs) -> Starlette:
    """Return the server's application for a started engine; `app.state.server` is its `ServerState`."""
    warn_of_options(client, args)
    state = ServerState(client, args)
    open_paths = frozenset(endpoint.path for endpoint in ENDPOINTS if not endpoint.needs_key)
    uncounted = frozenset(endpoint.path for endpoint in ENDPOINTS if not endpoint.in_http_metrics)
    app = Application(
        layers=[*outer_layers(args), *inner_layers(state, open_paths, uncounted)],
        routes=[route for endpoint in ENDPOINTS for route in endpoint.routes(state)],
    )
    app.state.server = state
    app.state.endpoints = ENDPOINTS
    return app
