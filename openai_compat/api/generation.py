"""Runs every request that generates, from its checked body to the last byte of the response.

Chat, completions and /generate subclass `Generation` and define what differs: how the sampling parameters
and the prompts follow from the fields, and how a whole response and a chunk are written. The rest is here:

1. `__init__` checks the request, refuses it while the queue is full, and gives it its id.
2. `prepare` reads the sampling parameters and the prompts.
3. `respond` submits them and collects the choices, or streams them as server-sent events.
4. `abort` frees what the engine still holds, however the request ended, and logs the end.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from microvllm.openai_compat.api import beam
from microvllm.openai_compat.api.request_log import log_end, log_start
from microvllm.openai_compat.api.requests import GenerationRequest, StreamOptions
from microvllm.openai_compat.api.streams import Outcome, close, collect, merged
from microvllm.openai_compat.api.usage import request_metrics, stream_usage, usage, without_nulls
from microvllm.openai_compat.errors import (
    INTERNAL,
    ClientGoneError,
    Fault,
    ServerStoppingError,
    clip,
    error_event,
    shape_error,
)
from microvllm.openai_compat.transport.middleware import CHUNK_SEND, SAFE_ID
from microvllm.openai_compat.transport.protocol import CHUNK_WRITER
from microvllm.runtime.errors import EngineError, InvalidRequestError, ModelNotFoundError, RequestError
from microvllm.runtime.process.token_stream import TokenStream
from microvllm.runtime.request import INT64_MAX, INT64_MIN

if TYPE_CHECKING:
    from microvllm.openai_compat.api.streams import Stream
    from microvllm.openai_compat.api.vectors.requests import VectorRequest
    from microvllm.openai_compat.state import ServerState
    from microvllm.openai_compat.transport.protocol import ChunkWriter
    from microvllm.runtime.request import SamplingParams
    from microvllm.runtime.text.detokenizer import TextDelta

RequestT = TypeVar("RequestT", bound=GenerationRequest)
logger = logging.getLogger("microvllm.server")

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"  # clients skip it
INLINE_CHOICES = 64  # responses with more are built in a worker thread
INLINE_CHARS = 8192  # so are longer ones: reading calls takes 0.3 to 5 us for each character


class Chunks(ABC):
    """Writes the events of one endpoint's streams as bytes, `data: ` and blank line included."""

    def opening(self) -> Sequence[bytes]:
        """Return the events that precede the first token."""
        return ()

    @property
    def stateless(self) -> bool:
        """Whether the event of a delta in the middle follows from it alone, and there is always one."""
        return False

    @abstractmethod
    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        """Return the event of one delta of choice `index`.

        `usage` is b"" or a `"usage":{...}` member with a leading comma. The result may be several events, or
        b"" for none.
        """

    def closing(self) -> Sequence[bytes]:
        """Return the events that follow the last token."""
        return ()

    @abstractmethod
    def final_usage(self, counts: bytes, metrics: bytes) -> bytes:
        """Return the event without choices that closes a stream.

        `counts` is a `usage` object, `metrics` b"" or a `"metrics":{...}` member with a leading comma.
        """


class ObjectChunks(Chunks):
    """Writes OpenAI's object around the choices, which the chunks of chat and of completions share.

    The system fingerprint goes into the usage chunk, or without one into each choice's last.
    """

    def __init__(self, generation: Generation[Any], kind: str) -> None:
        head = {"id": generation.id, "object": kind, "created": generation.created, "model": generation.model}
        self._bare = b"data: " + orjson.dumps({**head, "choices": []})[:-1]  # ends in `"choices":[]`
        self._head = self._bare[:-1] + b'{"index":'
        self._streams = generation.streams
        self._with_ids: bool = generation.body.return_token_ids
        fingerprint = generation.state.fingerprint
        shown = b"" if fingerprint is None else b',"system_fingerprint":' + orjson.dumps(fingerprint)
        self._last = b"" if generation.include_usage else shown
        self._fingerprint = shown

    def final_usage(self, counts: bytes, metrics: bytes) -> bytes:
        return self._bare + b',"usage":' + counts + self._fingerprint + metrics + b"}\n\n"


class Generation(ABC, Generic[RequestT]):
    """One request that generates, and the base of each endpoint's own.

    The streams are ordered prompt by prompt: sample i of prompt p is number p * n + i. With
    `include_usage` a last chunk has the token counts, with `continuous_usage` every chunk has them.
    """

    id_prefix: ClassVar[str]
    end: ClassVar[bytes] = DONE  # the last event of a stream
    params: SamplingParams

    def __init__(self, request: Request, state: ServerState, body: RequestT) -> None:
        _check_fields(body, state)
        state.client.check_room()  # before the prompt is rendered and tokenised
        self.request, self.state, self.body = request, state, body
        self.id = f"{self.id_prefix}-{id_suffix(request, body)}"
        self.created = int(time.time())
        self.model = state.model_names[0]
        self.priority = request_priority(request, body)
        self.rank = request_rank(request, state)
        options = body.stream_options or StreamOptions()
        forced = state.args.enable_force_include_usage
        self.include_usage = forced or options.include_usage
        self.continuous_usage = forced or (options.include_usage and options.continuous_usage_stats is True)
        self.streams: list[Stream] = []
        self._ended = False

    # ---- what an endpoint defines -------------------------------------------------------------------

    @abstractmethod
    def sampling_params(self) -> SamplingParams:
        """Return how to sample. Raises `InvalidRequestError` naming the field at fault."""

    @abstractmethod
    async def read_prompts(self) -> list[list[int]]:
        """Return the checked token ids of every prompt. Raises `InvalidRequestError`."""

    @abstractmethod
    def answer(
        self, outcomes: Sequence[Outcome], usage: dict[str, Any], metrics: dict[str, float | None] | None
    ) -> bytes:
        """Return the JSON body of a whole response; may run in a worker thread."""

    @abstractmethod
    def chunks(self) -> Chunks:
        """Return the writer of this request's events; called once there is one to write."""

    def read_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Read the finished choices, before they are counted and written."""

    @property
    def reasoning_tokens(self) -> int | None:
        """Number of output tokens that are reasoning; None if that is not known."""
        return None

    def failure(self, error: RequestError | EngineError) -> bytes:
        """Return the event of an error after the start of a stream; `end` follows it."""
        return error_event(error)

    # ---- the pipeline -------------------------------------------------------------------------------

    async def prepare(self) -> list[list[int]]:
        """Read the sampling parameters, then the prompts; return the prompts."""
        self.params = self.sampling_params()
        return await self.read_prompts()

    async def respond(self) -> Response:
        """Return the response, whole or as a stream of events."""
        await self.submit(await self.prepare())
        if self.body.stream:
            return EventStream(self)
        try:
            with self.state.lifecycle.interruptible(self.request.scope):
                body = await self._whole_answer()
        finally:
            self.abort()
        return Response(body, media_type="application/json")

    async def submit(self, prompts: Sequence[list[int]]) -> None:
        """Submit every prompt to the engine or none: a refusal aborts those that were accepted before it."""
        if self.state.args.enable_log_requests:
            log_start(self.id, prompts, self.params)
        options: dict[str, Any] = {"priority": self.priority, "cache_salt": self.body.cache_salt}
        if self.rank is not None:
            options["rank"] = self.rank
        client = self.state.client
        if self.body.use_beam_search:
            penalty = self.body.length_penalty
            self.streams += await beam.submit_all(client, prompts, self.params, penalty, **options)
        else:
            self.streams += await client.submit_all(prompts, self.params, **options)
        for stream in self.streams:
            stream.name = self.id
        # The engine has the ids. The strings they came from would take memory until the response ends.
        self.body.drop_prompt()

    async def _whole_answer(self) -> bytes:
        outcomes = await collect(self.streams, self.state.client.start_again)
        short = sum(len(outcome.text) for outcome in outcomes) <= INLINE_CHARS
        if short:
            self.read_outcomes(outcomes)
        else:
            await self.state.client.run_blocking(self.read_outcomes, outcomes)
        tokens = sum(len(outcome.token_ids) for outcome in outcomes)
        spent = usage(self.prompt_tokens, tokens, self.cached_tokens, self.reasoning_tokens)
        metrics = self._metrics(tokens)
        params = self.params
        short = short and len(outcomes) <= INLINE_CHOICES and not self.body.return_token_ids
        if short and params.logprobs is None and params.prompt_logprobs is None:
            return self.answer(outcomes, spent, metrics)
        # Log probabilities can take a hundred times as much text as the output.
        return await self.state.client.run_blocking(self.answer, outcomes, spent, metrics)

    async def events(self, writer: ChunkWriter | None = None) -> AsyncGenerator[bytes, None]:
        """Yield every event of a stream, up to `end`. An error after the start becomes an event, too.

        Between two of them, plain ones may go to the writer instead, when their tokens arrive.
        """
        streams = self.streams
        counts = [0] * len(streams)
        interval = max(self.body.stream_interval or 1, self.state.args.stream_interval)
        logprobs = self.params.logprobs
        # With log probabilities of a prompt or a whole vocabulary, chunks are written in a thread: other
        # requests must not wait for them.
        slow = logprobs is not None and (self.body.echo or logprobs == -1)
        deltas = merged(streams, interval)
        chunks: Chunks | None = None  # made for the first delta: a queued request has none
        try:
            async for delta in deltas:
                index = delta.choice
                if chunks is None:
                    chunks = self.chunks()
                    for event in chunks.opening():
                        yield event
                counts[index] += len(delta.token_ids)
                spent = b""
                if self.continuous_usage:
                    prompt_tokens = len(streams[index].prompt_token_ids)
                    spent = b',"usage":' + stream_usage(prompt_tokens, counts[index])
                if slow:
                    event = await asyncio.to_thread(chunks.chunk, index, delta, spent)
                else:
                    event = chunks.chunk(index, delta, spent)
                if event:
                    yield event
                if writer is not None and interval == 1:
                    self._write_directly(chunks, writer, counts)
                    writer = None
            chunks = chunks or self.chunks()
            for event in chunks.closing():
                yield event
            if self.include_usage:
                times = self._metrics(sum(counts))
                metrics = b"" if times is None else b',"metrics":' + orjson.dumps(without_nulls(times))
                spent = stream_usage(
                    self.prompt_tokens, sum(counts), self.cached_tokens, self.reasoning_tokens
                )
                yield chunks.final_usage(spent, metrics)
        except (EngineError, RequestError) as error:
            yield self.failure(error)
        except Exception:
            # A bug. The headers are already sent, so only an event can still report the failure.
            logger.exception("Streaming %s failed.", self.id)
            yield self.failure(EngineError(INTERNAL))
        finally:
            await close(deltas)
            self.abort()
        yield self.end

    def _write_directly(self, chunks: Chunks, writer: ChunkWriter, counts: list[int]) -> None:
        """Let a lone stream write its plain events itself; `counts` are its tokens."""
        stream = self.streams[0]
        if len(self.streams) > 1 or not isinstance(stream, TokenStream):
            return
        if self.continuous_usage or not chunks.stateless:
            return

        def write(delta: TextDelta) -> bool:
            if not writer.open:
                return False
            writer.write(chunks.chunk(0, delta, b""))
            counts[0] += len(delta.token_ids)
            return True

        stream.direct = write

    def abort(self) -> None:
        """Free what the engine still holds for this request and log its end; may be called again."""
        for stream in self.streams:
            stream.abort()
        if self.streams and not self._ended:
            self._ended = True
            log_end(self.id, self.streams, self.prompt_tokens)

    # ---- usage --------------------------------------------------------------------------------------

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of all prompts, each counted once however many samples it has."""
        return sum(len(stream.prompt_token_ids) for stream in self.streams[:: self.params.n])

    @property
    def cached_tokens(self) -> int | None:
        """Number of prompt tokens found in the prefix cache; None unless the server reports them."""
        if not self.state.args.enable_prompt_tokens_details:
            return None
        return sum(stream.num_cached_tokens for stream in self.streams[:: self.params.n])

    def _metrics(self, completion_tokens: int) -> dict[str, float | None] | None:
        """Return the times of a request with one sequence, if the server reports them."""
        if not self.state.args.enable_per_request_metrics or len(self.streams) != 1:
            return None
        return request_metrics(self.streams[0].timing, completion_tokens)


class EventStream(Response):
    """Sends a request's events; a client that leaves ends them at once, wherever they wait.

    With --sse-keep-alive-interval a comment goes out whenever the stream was silent for so long, so that no
    proxy takes it for dead. Whole events travel in one message each, so it never lands inside one.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation[Any]) -> None:
        super().__init__()
        del self.headers["content-length"]
        state = generation.state
        self._generation = generation
        self._lifecycle = state.lifecycle
        self._interval = state.args.sse_keep_alive_interval
        self._last = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        comments: asyncio.Task[None] | None = None
        send_chunk: Send = scope.get(CHUNK_SEND, send)
        # A comment counts the time since the last event, which a writer would not know of.
        make_writer = None if self._interval else scope.get(CHUNK_WRITER)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with self._lifecycle.interruptible(scope):
                if self._interval:
                    comments = asyncio.ensure_future(self._send_comments(send_chunk))
                try:
                    async with aclosing(self._generation.events(make_writer and make_writer())) as events:
                        async for event in events:
                            if comments is not None:
                                self._last = time.monotonic()
                            await send_chunk({"type": "http.response.body", "body": event, "more_body": True})
                finally:
                    if comments is not None:
                        comments.cancel()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ServerStoppingError as error:
            last = self._generation.failure(error) + self._generation.end
            await send({"type": "http.response.body", "body": last, "more_body": False})
        except ClientGoneError:
            pass
        finally:
            self._generation.abort()

    async def _send_comments(self, send_chunk: Send) -> None:
        while True:
            silent = time.monotonic() - self._last
            if silent < self._interval:
                await asyncio.sleep(self._interval - silent)
                continue
            self._last = time.monotonic()
            await send_chunk({"type": "http.response.body", "body": COMMENT, "more_body": True})


def check_model(name: str | None, state: ServerState) -> None:
    """Raise `ModelNotFoundError` unless the name is a served one, the `root` of `/v1/models`, or left open.

    A client that loads the tokenizer from where the model's name says is given `root` as the name.
    """
    served = state.model_names
    if name and name not in served and name != state.client.tokenizer_root:
        raise ModelNotFoundError(
            f"The model `{clip(name)}` does not exist. Valid aliases: {', '.join(served)}.", "model"
        )


def _check_fields(body: GenerationRequest, state: ServerState) -> None:
    """Check what concerns several fields, or the server's limits."""
    if not state.args.skip_model_name_validation:
        check_model(body.model, state)
    if body.stream_options and not body.stream:
        raise InvalidRequestError("Stream options can only be defined when `stream=True`.", "stream_options")
    if body.stream_options and body.stream_options.include_obfuscation:
        name = "stream_options.include_obfuscation"
        raise InvalidRequestError(f"{name} is not supported by this server.", "stream_options")
    if body.stream and body.prompt_logprobs:  # 0 has no effect in a stream
        raise InvalidRequestError(
            "`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs"
        )
    stop, limit = body.stop_strings, state.args.max_stop_strings
    if len(stop) > limit:
        problem = f"List should have at most {limit} items, not {len(stop)} (see --max-stop-strings)"
        raise shape_error([("body.stop", Fault(problem))])
    if body.use_beam_search:
        beam.check_fields(body, state.client)
    elif body.length_penalty != 1:
        raise InvalidRequestError("length_penalty needs use_beam_search.", "length_penalty")


def id_suffix(request: Request, body: GenerationRequest | VectorRequest) -> str:
    """Return the client's own id if it has one; the header wins over the body, as in vLLM.

    It is only echoed: the engine has its own ids, so two requests with the same one do not affect each other.
    """
    header = request.headers.get("x-request-id", "")
    return header if SAFE_ID.fullmatch(header) else body.request_id or uuid.uuid4().hex


def request_priority(request: Request, body: GenerationRequest | VectorRequest) -> int:
    """Return the priority (lower is served earlier); the header X-Vllm-Priority wins over the body."""
    header = request.headers.get("x-vllm-priority")
    if header is None:
        return body.priority
    try:
        value = int(header[:32])
    except ValueError:
        value = INT64_MAX + 1
    if not INT64_MIN <= value <= INT64_MAX:
        raise InvalidRequestError("The header X-Vllm-Priority must be a 64-bit integer.", "priority")
    return value


def request_rank(request: Request, state: ServerState) -> int | None:
    """Return the number of the engine that the header X-data-parallel-rank asks for, None without it."""
    header = request.headers.get("x-data-parallel-rank")
    if header is None:
        return None
    last = state.client.config.data_parallel_size - 1
    if not (header.isascii() and header.isdigit() and int(header[:20]) <= last):
        raise InvalidRequestError(
            f"The header X-data-parallel-rank must be an integer in [0, {last}].", "data_parallel_rank"
        )
    return int(header)
