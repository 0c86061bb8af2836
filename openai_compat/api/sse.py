"""Server-sent events: sends the events of one request, with as little work per token as can be."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from microvllm.openai_compat.errors import ClientGoneError, ServerStoppingError, error_event
from microvllm.openai_compat.transport.middleware import CHUNK_SEND

if TYPE_CHECKING:
    from microvllm.openai_compat.transport.lifecycle import Lifecycle

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends events; a client that leaves ends them at once, wherever they wait. `on_end` is always called."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], lifecycle: Lifecycle, *, on_end: Callable[[], None]
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._events = events
        self._lifecycle = lifecycle
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._lifecycle.run(self._send_events(send, scope.get(CHUNK_SEND, send)), receive)
        except ServerStoppingError as error:
            last = error_event(error) + DONE
            await send({"type": "http.response.body", "body": last, "more_body": False})
        except ClientGoneError:
            pass
        finally:
            self._on_end()

    async def _send_events(self, send: Send, send_chunk: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await send_chunk({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
