"""Server-sent events: the chunks of one request, framed and sent with as little work a token as can be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from microvllm.openai_compat.api.usage import stream_usage
from microvllm.openai_compat.errors import INTERNAL, ClientGoneError, ServerStoppingError, error_event
from microvllm.openai_compat.transport.middleware import SHORTCUT
from microvllm.runtime.errors import EngineError, RequestError

if TYPE_CHECKING:
    from microvllm.openai_compat.api.generation import Generation
    from microvllm.openai_compat.config import ServerArgs
    from microvllm.openai_compat.transport.lifecycle import Lifecycle
    from microvllm.runtime.text.detokenizer import TextDelta

logger = logging.getLogger("microvllm.server")

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class StreamOptions:
    """Which chunks carry token counts: a last one of its own, and with `continuous` all of them.

    `interval` is the number of tokens a chunk; `details` and `metrics` say more in the last chunk. `slow`
    chunks are those with the log probabilities of a prompt or of a whole vocabulary.
    """

    include_usage: bool
    continuous: bool
    interval: int
    details: bool
    metrics: bool
    slow: bool

    @classmethod
    def of(cls, fields: Mapping[str, Any], args: ServerArgs) -> StreamOptions:
        options = fields["stream_options"] or {}
        forced = args.enable_force_include_usage
        include = forced or options.get("include_usage", False)
        scored = fields["logprobs"] is not None and fields["logprobs"] is not False
        whole_vocabulary = -1 in (fields["logprobs"], fields.get("top_logprobs"))
        return cls(
            include_usage=include,
            continuous=include and (forced or options.get("continuous_usage_stats", False)),
            interval=max(fields["stream_interval"] or 1, args.stream_interval),
            details=args.enable_prompt_tokens_details,
            metrics=args.enable_per_request_metrics,
            slow=scored and (fields["echo"] or whole_vocabulary),
        )


class ChunkWriter(Protocol):
    """The chunks of one endpoint as ready bytes, `data: ` and blank line included."""

    def opening(self) -> list[bytes]:
        """What goes out before the first token."""

    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        """One delta of choice `index`; `usage` is b"" or a `"usage":{...}` member with a leading comma."""

    def final_usage(self, counts: bytes, metrics: bytes) -> bytes:
        """The chunk without choices that closes a stream.

        `counts` is a `usage` object, `metrics` b"" or a `"metrics":{...}` member with a leading comma.
        """


def fingerprint_member(fingerprint: str | None) -> bytes:
    """The `system_fingerprint` member of a chunk with a leading comma; b"" for a server that shows none."""
    return b"" if fingerprint is None else b',"system_fingerprint":' + orjson.dumps(fingerprint)


async def event_chunks(
    generation: Generation, writer: ChunkWriter, options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    """Every event of a stream, up to `[DONE]`. An error after the start becomes an event, too."""
    streams = generation.streams
    counts = [0] * len(streams)
    opened = False
    try:
        async with aclosing(generation.deltas(options.interval)) as deltas:
            async for index, delta in deltas:
                if not opened:
                    opened = True
                    for event in writer.opening():
                        yield event
                counts[index] += len(delta.token_ids)
                usage = b""
                if options.continuous:
                    usage = b',"usage":' + stream_usage(len(streams[index].prompt_token_ids), counts[index])
                if options.slow:  # a thread lets other requests in between
                    yield await asyncio.to_thread(writer.chunk, index, delta, usage)
                else:
                    yield writer.chunk(index, delta, usage)
        if options.include_usage:
            cached = generation.cached_tokens if options.details else None
            times = generation.metrics(sum(counts)) if options.metrics else None
            metrics = b"" if times is None else b',"metrics":' + orjson.dumps(_without_nulls(times))
            yield writer.final_usage(stream_usage(generation.prompt_tokens, sum(counts), cached), metrics)
    except (EngineError, RequestError) as error:
        yield error_event(error)
    except Exception:
        # A bug of ours. The 200 is out, so the stream is the only place left to say that it failed.
        logger.exception("Streaming %s failed.", generation.id)
        yield error_event(EngineError(INTERNAL))
    finally:
        generation.abort()
    yield DONE


def _without_nulls(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


class EventStream(Response):
    """Sends the events of a generation; a client that leaves ends it at once, wherever it waits."""

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, events: AsyncGenerator[bytes, None], lifecycle: Lifecycle
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._generation = generation
        self._events = events
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._lifecycle.run(self._send_events(send, scope.get(SHORTCUT, send)), receive)
        except ServerStoppingError as error:
            farewell = error_event(error) + DONE
            await send({"type": "http.response.body", "body": farewell, "more_body": False})
        except ClientGoneError:
            pass
        finally:
            self._generation.abort()

    async def _send_events(self, send: Send, shortcut: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await shortcut({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
