"""Defines `Endpoint`, the record by which each API file declares a path to the rest of the server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from microvllm.openai_compat.api.reading import read_request
from microvllm.openai_compat.api.requests import Body
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.state import ServerState
from microvllm.openai_compat.transport.middleware import LoadMiddleware
from microvllm.runtime.errors import InvalidRequestError

BodyT = TypeVar("BodyT", bound=Body)
NOT_IMPLEMENTED_KIND = "NotImplementedError"
WRONG_RUNNER = {
    False: "needs a model that makes vectors, and this server's generates texts (see --runner pooling)",
    True: "needs a model that generates texts, and this server's makes vectors (see --runner generate)",
}
# handler(request, state), or handler(request, state, body) for an endpoint with a `body`.
Handler = Callable[..., Awaitable[Response]]


class Switch(NamedTuple):
    """Decides whether a server has an endpoint. If not, a 400 names `remedy`, or without one it is a 404."""

    on: Callable[[ServerArgs], bool]
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One path. The routes, the OpenAPI document and the middleware read these records.

    The handler's docstring is the description in the document. A body is read and checked before the handler
    runs. `answer` and `event` name the schemas (in `answers.SCHEMAS`) of a JSON answer and of the data of an
    event where the endpoint streams; with `named_events` each has a name, and no `[DONE]` is the last.
    `generates` and `pools`: it needs a model that generates texts, or one that makes vectors; its requests in
    progress are the load that /load reports.
    """

    path: str
    handler: Handler
    methods: tuple[str, ...] = ("GET",)
    body: type[Body] | None = None
    query: Mapping[str, Any] = field(default_factory=dict)
    answer: str | None = None
    event: str | None = None
    named_events: bool = False
    generates: bool = False
    pools: bool = False
    needs_key: bool = True
    in_http_metrics: bool = True
    documented: bool = True
    switch: Switch | None = None

    def is_on(self, args: ServerArgs, *, pooling: bool = False) -> bool:
        """Return whether a server with these options has it; `pooling`: its model makes vectors."""
        return self._fits(pooling) and (self.switch is None or self.switch.on(args))

    def _fits(self, pooling: bool) -> bool:
        return not (self.generates if pooling else self.pools)

    def routes(self, state: ServerState) -> list[Route]:
        """Return Starlette's route to the handler; if the endpoint is off, to its refusal, or none."""
        pooling = state.client.config.spec.pooling is not None
        if self.is_on(state.args, pooling=pooling):
            answer = self._answering(state)
        elif not self._fits(pooling):
            answer = _refusing(WRONG_RUNNER[pooling])
        elif self.switch is not None and self.switch.remedy is not None:
            answer = _refusing(f"is switched off: start the server with {self.switch.remedy}")
        else:
            return []
        load = [Middleware(LoadMiddleware, state=state)] if self.generates or self.pools else []
        return [Route(self.path, _Application(answer), methods=list(self.methods), middleware=load)]

    def _answering(self, state: ServerState) -> ASGIApp:
        handler, body = self.handler, self.body

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive, send)
            if body is None:
                response = await handler(request, state)
            else:
                response = await handler(request, state, await read_body(request, state, body))
            await response(scope, receive, send)

        return answer


def _refusing(problem: str) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        where = f"{scope['method']} {scope['path']}"
        raise InvalidRequestError(f"{where} {problem}.", kind=NOT_IMPLEMENTED_KIND)

    return answer


class _Application:
    """Keeps Starlette from wrapping an ASGI function as if it took a request.

    The wrapper's four coroutines and closures take 1.9 KB of every waiting request. The handler around the
    router turns the same exceptions into answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return self._app(scope, receive, send)


async def read_body(request: Request, state: ServerState, kind: type[BodyT]) -> BodyT:
    """Read and check the body of a request. Raises `InvalidRequestError`."""
    return read_request(kind, await state.bodies.read_object(request))
