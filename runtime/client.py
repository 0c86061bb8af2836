"""The async client of the engine process: starts it, talks to it, starts it again when it dies.

Imports no torch. One `EngineClient` a server; one `TokenStream` a sequence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec

from microvllm.runtime.channel import (
    HEADER_BYTES,
    Abort,
    Add,
    Command,
    Event,
    Failed,
    Progress,
    Ready,
    ResetPrefixCache,
    Start,
    Step,
    frame,
)
from microvllm.runtime.chat_template import ChatTemplate
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import ConfigError, EngineBusyError, EngineDeadError, EngineError
from microvllm.runtime.output import OutputText, TextDelta
from microvllm.runtime.processor import Processor
from microvllm.runtime.request import EngineRequest, EngineStats, SamplingParams, StepOutput
from microvllm.runtime.threads import thread_environment
from microvllm.runtime.tokenizer import Tokenizer

logger = logging.getLogger("microvllm.engine")

P = ParamSpec("P")
T = TypeVar("T")

SILENCE_S = 120.0  # an engine with work that says nothing for so long is taken for hung
EXIT_S = 3.0  # time for the engine process to leave after its socket was closed
RESTART_DELAYS_S = (0.0, 1.0, 5.0, 15.0, 30.0)
WORKER_THREADS = 2  # for tokenising and templating

_DEAD = "The engine process died; it is being started again."
_DEAD_AT_START = "the engine process died while it was loading the model"


class TokenStream:
    """The output of one sequence: an async iterator of `TextDelta`.

    Tokens that arrive while the consumer is busy are merged into one delta, so a slow reader costs
    bounded memory and never holds up the engine.
    """

    def __init__(self, client: EngineClient, request: EngineRequest) -> None:
        self.prompt_token_ids = request.prompt_token_ids
        self.num_cached_tokens = 0
        self._client = client
        self._id = request.request_id
        self._text = OutputText(client.tokenizer, request)
        self._pending: TextDelta | None = None
        self._error: EngineError | None = None
        self._ended = False
        self._wake = asyncio.Event()

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TextDelta:
        """The next delta. Raises `EngineError` when the engine or this request failed."""
        while self._pending is None:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        delta, self._pending = self._pending, None
        return delta

    def abort(self) -> None:
        """End the request now; its blocks are free within one step. May be called at any time."""
        if not self._ended:
            self._ended = True
            self._client._abort(self._id)
        self._wake.set()

    def _take(self, output: StepOutput) -> None:
        try:
            delta = self._text.take(output)
        except EngineError as error:
            self._fail(error)
            return
        except Exception as error:  # this request's text logic failed: no other request is concerned
            logger.exception("Detokenising request %d failed.", self._id)
            self.abort()
            self._fail(EngineError(f"the output could not be turned into text ({type(error).__name__})"))
            return
        self.num_cached_tokens = output.num_cached_tokens
        if self._pending is None:
            self._pending = delta
        else:
            self._pending.merge(delta)
        if delta.finish_reason is not None:
            if output.finish_reason is None:  # a stop string: the engine does not know yet
                self._client._abort(self._id)
            else:
                self._client._forget(self._id)
            self._ended = True
        self._wake.set()

    def _fail(self, error: EngineError) -> None:
        self._client._forget(self._id)
        self._error = error
        self._ended = True
        self._wake.set()


class EngineClient:
    """Owns the engine process. All methods belong to one event loop."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer, processor: Processor) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.processor = processor
        self.stats = EngineStats()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Event)
        self._workers = ThreadPoolExecutor(WORKER_THREADS, thread_name_prefix="text")
        self._streams: dict[int, TokenStream] = {}
        self._submitted = 0  # to the engine process that runs now
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._ready = False
        self._heard = time.monotonic()
        self._keeper: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        chat_template: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> EngineClient:
        """Start the engine process, load the tokenizer meanwhile, wait until the model is ready.

        `chat_template` is used in place of the model's own. Raises `ConfigError` with one line when the
        model or the tokenizer cannot be loaded, `EngineError` when the engine process dies while loading.
        """
        channel = _EngineProcess(config)
        loop = asyncio.get_running_loop()
        try:
            reader, writer = await channel.connect()
            loading = loop.run_in_executor(None, _load_text, config, chat_template)
            tokenizer, processor = await loading
            client = cls(config, tokenizer, processor)
            client._process, client._writer = channel.process, writer
            await client._await_ready(reader, on_progress)
        except EngineDeadError:
            raise EngineError(f"{_DEAD_AT_START}{channel.kill()}") from None
        except BaseException:
            channel.kill()
            raise
        client._keeper = asyncio.ensure_future(client._keep(reader))
        return client

    def healthy(self) -> bool:
        """Whether requests are being served: the engine is loaded, alive, and not silent at work."""
        busy = bool(self._streams)
        return self._ready and not (busy and time.monotonic() - self._heard > SILENCE_S)

    async def run_blocking(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a slow function in a worker thread."""
        call = _Call(function, args, kwargs)
        result: T = await asyncio.get_running_loop().run_in_executor(self._workers, call)
        return result

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> list[TokenStream]:
        """Send one prompt to the engine: `params.n` streams.

        Raises `InvalidRequestError` (and `ContextLengthError`) naming the field, `EngineBusyError` when
        the waiting queue is full, `EngineDeadError` while there is no engine.
        """
        requests = self.processor.requests(prompt_ids, params, priority=priority, cache_salt=cache_salt)
        if not self._ready:
            raise EngineDeadError(_DEAD)
        limit = self.config.max_num_queued_reqs
        on_their_way = self._submitted - self.stats.requests
        if limit is not None and self.stats.num_waiting + on_their_way + len(requests) > limit:
            raise EngineBusyError("The engine is currently busy and cannot accept new requests.")
        self._submitted += len(requests)
        if not self._streams:
            self._heard = time.monotonic()  # an idle engine was silent with good reason
        streams = [TokenStream(self, request) for request in requests]
        for request, stream in zip(requests, streams, strict=True):
            self._streams[request.request_id] = stream
        self._send(Add(requests))
        return streams

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self._send(ResetPrefixCache())

    async def close(self, drain_s: float = 0) -> None:
        """Wait up to `drain_s` seconds for open streams, then end the engine process."""
        deadline = time.monotonic() + drain_s
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._ready = False
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self._fail_all(EngineDeadError("The server is shutting down."))
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            await asyncio.get_running_loop().run_in_executor(None, _end, self._process)
        self._workers.shutdown(wait=False, cancel_futures=True)

    # ---- what streams call ---------------------------------------------------------------------

    def _abort(self, request_id: int) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._send(Abort([request_id]))

    def _forget(self, request_id: int) -> None:
        self._streams.pop(request_id, None)

    # ---- the engine process --------------------------------------------------------------------

    def _send(self, command: Command) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(self._encoder, command))

    async def _await_ready(
        self, reader: asyncio.StreamReader, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._send(Start(self.config))
        while True:
            event = await self._receive(reader)
            if isinstance(event, Progress) and on_progress is not None:
                on_progress(event.done, event.total)
            elif isinstance(event, Failed):
                raise ConfigError(event.message)
            elif isinstance(event, Ready):
                self.stats, self._submitted, self._ready = event.stats, 0, True
                self._heard = time.monotonic()
                return

    async def _receive(self, reader: asyncio.StreamReader) -> Event:
        try:
            size = int.from_bytes(await reader.readexactly(HEADER_BYTES), "little")
            event: Event = self._decoder.decode(await reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EngineDeadError(_DEAD) from error
        return event

    async def _keep(self, reader: asyncio.StreamReader) -> None:
        """Deliver step after step; when the engine dies, tell everyone and start another."""
        while True:
            try:
                while True:
                    self._deliver(await self._receive(reader))
            except (EngineDeadError, msgspec.DecodeError):
                self._ready = False
                self._fail_all(EngineDeadError(_DEAD))
            reader = await self._restart()

    def _deliver(self, event: Event) -> None:
        if not isinstance(event, Step):
            return
        self.stats, self._heard = event.stats, time.monotonic()
        for output in event.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream._take(output)

    def _fail_all(self, error: EngineError) -> None:
        for stream in list(self._streams.values()):
            stream._fail(error)

    async def _restart(self) -> asyncio.StreamReader:
        attempt = 0
        while True:
            await asyncio.sleep(RESTART_DELAYS_S[min(attempt, len(RESTART_DELAYS_S) - 1)])
            attempt += 1
            if self._writer is not None:
                self._writer.close()
            if self._process is not None:
                logger.error("%s%s", _DEAD, _end(self._process, wait_s=0.5))
            channel = _EngineProcess(self.config)
            self._process = channel.process
            reader, self._writer = await channel.connect()
            try:
                await self._await_ready(reader)
            except (ConfigError, EngineError) as error:
                logger.error("The engine could not be started again: %s", error)
                continue
            logger.info("The engine process was started again.")
            return reader


class _EngineProcess:
    """A fresh engine process and our end of the socket pair to it."""

    def __init__(self, config: EngineConfig) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._sock = ours
        # Once the event loop has the socket, only the loop may close it: it would go on watching the
        # number, and be deaf to the next socket that gets it.
        self._ours: socket.socket | asyncio.StreamWriter = ours
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "microvllm.runtime.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **thread_environment(config.cpu_threads)},
            )

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(sock=self._sock, limit=1 << 20)
        self._ours = writer
        return reader, writer

    def kill(self) -> str:
        """End the process now; see `_end` for the result."""
        self._ours.close()
        return _end(self.process, wait_s=0.1)


class _Call:
    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self._function, self._args, self._kwargs = function, args, kwargs

    def __call__(self) -> Any:
        return self._function(*self._args, **self._kwargs)


def _load_text(config: EngineConfig, chat_template: str | None) -> tuple[Tokenizer, Processor]:
    tokenizer = Tokenizer.load(Path(config.tokenizer_path))
    template = None if chat_template is None else ChatTemplate(chat_template, tokenizer.special_tokens)
    return tokenizer, Processor(config, tokenizer, template)


def _end(process: subprocess.Popen[bytes], wait_s: float = EXIT_S) -> str:
    """Wait for a process whose socket is closed, kill it if need be -> " (how it ended)"."""
    try:
        code = process.wait(timeout=wait_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return ""
    return f" (exit status {code})" if code >= 0 else f" (killed by signal {-code})"
