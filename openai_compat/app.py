"""Builds the ASGI application: routes from the endpoints' records, error handlers, and layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from microvllm.openai_compat import errors
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
from microvllm.runtime.errors import EngineError, RequestError

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


class Application(Starlette):
    """Puts `layers` around all of Starlette, its handler of unexpected errors included, first outermost.

    What Starlette calls middleware is inside of that handler, so a 500 would go out without their headers.
    """

    def __init__(self, layers: Sequence[Middleware], **options: Any) -> None:
        super().__init__(**options)
        self._layers = layers

    def build_middleware_stack(self) -> ASGIApp:
        stack = super().build_middleware_stack()
        for layer in reversed(self._layers):
            stack = layer.cls(stack, *layer.args, **layer.kwargs)
        return stack


def create_app(client: EngineClient, args: ServerArgs) -> Starlette:
    """Return the server's application for a started engine; `app.state.server` is its `ServerState`."""
    warn_of_options(client, args)
    state = ServerState(client, args)
    open_paths = frozenset(endpoint.path for endpoint in ENDPOINTS if not endpoint.needs_key)
    uncounted = frozenset(endpoint.path for endpoint in ENDPOINTS if not endpoint.in_http_metrics)
    app = Application(
        layers=outer_layers(args),
        routes=[route for endpoint in ENDPOINTS for route in endpoint.routes(state)],
        middleware=inner_layers(state, open_paths, uncounted),
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
    app.state.endpoints = ENDPOINTS
    return app
