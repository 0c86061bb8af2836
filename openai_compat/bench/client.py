"""Streams and times OpenAI completions and chats over HTTP, from any engine.

While the clock runs it only notes which bytes came when; it reads them after the last answer (those of a chat
after each turn, as the next one repeats them), so that it takes as little as it can from a server on the same
cores. What it took is in the report (`client_cpu_s`).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson

Prompt = str | list[int]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class BenchError(Exception):
    """Something cannot be measured, in one line: nothing answers, a program or a file is not there."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured, and how a request to it has to look."""

    url: str
    """Such as `http://127.0.0.1:8000`; a path in front of `/v1` may follow."""
    model: str | None = None
    """Name for the requests; None leaves the field out, which servers of one model accept."""
    api_key: str | None = None
    ignore_eos: bool = True
    """Send `ignore_eos`, which vLLM understands; others need their own way, in `extra_body`."""
    temperature: float = 0.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Fields added to each request; a value of None takes the field of that name out."""

    def body(self, content: Mapping[str, Any], output_len: int) -> bytes:
        """Return the JSON of one streaming request; `content` is its `prompt` or its `messages`."""
        fields: dict[str, Any] = {
            "model": self.model,
            **content,
            "max_tokens": output_len,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": self.ignore_eos or None,
            **self.extra_body,
        }
        return orjson.dumps({name: value for name, value in fields.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Completion:
    """A user who sends one prompt."""

    prompt: Prompt
    output_len: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """A user who sends a message as soon as the last one is answered; each request repeats all before it."""

    system: str
    messages: tuple[str, ...]
    output_len: int
    """Tokens of each answer."""


User = Completion | Conversation


@dataclass(slots=True)
class Exchange:
    """One HTTP request and its answer as it came: `pieces` are (seconds, bytes of the body)."""

    started: float
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str = ""
    """Why there is no whole answer; "" if there is one."""

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.pieces)


@dataclass(slots=True)
class RequestResult:
    """One measured request; times in seconds. `error` is "" if it gave what it was asked for."""

    error: str = ""
    ttft: float = 0.0
    """From sending the request to the first chunk with text."""
    latency: float = 0.0
    """To the last chunk that belongs to the choice."""
    itls: list[float] = field(default_factory=list)
    """Gaps between the chunks with text; where a chunk holds several tokens, that shows here."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens that the server says it took from its cache; None if it does not say."""
    counted_by: str = "usage"
    """Where the server sends no usage in the stream: "finish_reason" if that was "length", else "chunks"."""
    text: str = ""
    started: float = 0.0
    """From the start of the measurement."""
    queued: float = 0.0
    """How long the client held it back because enough others were running."""

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None with fewer than two tokens."""
        if self.completion_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.completion_tokens - 1)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run of `measure` gave."""

    requests: list[RequestResult]
    duration: float
    """Seconds from the start to the end of the last answer."""
    client_cpu_s: float
    """Processor time of this client within `duration`."""

    @property
    def good(self) -> list[RequestResult]:
        return [request for request in self.requests if not request.error]

    @property
    def errors(self) -> list[str]:
        """What went wrong, once each."""
        return sorted({request.error for request in self.requests if request.error})

    @property
    def output_throughput(self) -> float:
        """Output tokens a second of all requests together, from the start to the last answer."""
        return sum(request.completion_tokens for request in self.good) / self.duration

    @property
    def input_throughput(self) -> float:
        """Prompt tokens a second, likewise."""
        return sum(request.prompt_tokens for request in self.good) / self.duration


def measure(
    target: Target,
    users: Sequence[User],
    *,
    concurrency: int | None = None,
    arrivals: Sequence[float] = (),
    timeout_s: float = 600.0,
) -> Measured:
    """Let every user ask, at most `concurrency` of them at a time, and wait for all answers.

    `arrivals` are the seconds after which each user comes; without them all come at once (a closed loop).
    A request that fails is in the result with its error; nothing is raised for it.
    """
    if not users:
        raise ValueError("no users")
    # Encoded beforehand: the clock runs for the server.
    bodies = [
        target.body({"prompt": user.prompt}, user.output_len) if isinstance(user, Completion) else None
        for user in users
    ]

    async def run() -> tuple[list[list[Exchange | RequestResult]], list[float], float, float, float]:
        limit = asyncio.Semaphore(concurrency or len(users))
        queued = [0.0] * len(users)
        start, start_cpu = time.perf_counter(), time.process_time()

        async def visit(index: int) -> list[Exchange | RequestResult]:
            user, body = users[index], bodies[index]
            if arrivals:
                await asyncio.sleep(start + arrivals[index] - time.perf_counter())
            arrived = time.perf_counter()
            async with limit:
                queued[index] = time.perf_counter() - arrived
                if isinstance(user, Conversation):
                    return list(await _converse(target, user, start, timeout_s))
                return [await _exchange(target, COMPLETIONS, body or b"", timeout_s)]

        answers = await asyncio.gather(*(visit(index) for index in range(len(users))))
        return (
            list(answers),
            queued,
            start,
            time.perf_counter() - start,
            time.process_time() - start_cpu,
        )

    answers, queued, start, duration, cpu = asyncio.run(run())
    results = []
    for user, answer, waited in zip(users, answers, queued, strict=True):
        for each in answer:
            result = each
            if isinstance(result, Exchange):
                result = read_stream(result, user.output_len, start)
            result.queued = waited
            results.append(result)
    return Measured(results, duration, cpu)


async def _converse(
    target: Target, user: Conversation, start: float, timeout_s: float
) -> list[RequestResult]:
    """All turns of a conversation; after one that fails the rest is not sent, and counts as failed."""
    messages = [{"role": "system", "content": user.system}] if user.system else []
    results: list[RequestResult] = []
    for text in user.messages:
        if results and results[-1].error:
            results.append(RequestResult("not sent, as the turn before it failed"))
            continue
        messages.append({"role": "user", "content": text})
        body = target.body({"messages": messages}, user.output_len)
        result = read_stream(await _exchange(target, CHAT, body, timeout_s), user.output_len, start)
        messages.append({"role": "assistant", "content": result.text})
        results.append(result)
    return results


def first_model(target: Target, timeout_s: float = 10.0) -> str:
    """Return the name of the first model that the server lists. Raises `BenchError`."""
    exchange = asyncio.run(_exchange(target, "/v1/models", b"", timeout_s))
    if exchange.failure or exchange.status != 200:
        raise BenchError(f"{target.url}/v1/models: {exchange.failure or f'HTTP status {exchange.status}'}")
    try:
        return str(orjson.loads(exchange.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{target.url}/v1/models: lists no model; name one with --model") from error


def read_stream(exchange: Exchange, output_len: int, start: float = 0.0) -> RequestResult:
    """Read the events of a stream; anything but `output_len` tokens is an error.

    `start` is the moment at which the measurement began.
    """
    result = RequestResult(error=exchange.failure, started=exchange.started - start)
    if not result.error and exchange.status != 200:
        text = exchange.body[:200].decode(errors="replace")
        result.error = f"HTTP status {exchange.status}: {text}"
    if result.error:
        return result
    usage: dict[str, Any] | None = None
    texts: list[str] = []
    moments: list[float] = []
    chunks: list[float] = []
    finish_reason = None
    for moment, event in read_events(exchange.pieces):
        if not isinstance(event, dict) or event.get("error"):
            result.error = f"the stream says {str(event)[:200]}"
            return result
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            chunks.append(moment)
            finish_reason = choice.get("finish_reason") or finish_reason
            # A completion has its text in the choice, a chat in its delta.
            piece = choice.get("text") or (choice.get("delta") or {}).get("content")
            if piece:
                texts.append(piece)
                moments.append(moment)
    if not chunks:
        result.error = "the stream has no tokens"
        return result
    moments = moments or chunks[:1]  # tokens without a text, such as special ones
    result.text = "".join(texts)
    result.ttft = moments[0] - exchange.started
    result.latency = chunks[-1] - exchange.started
    result.itls = [after - before for before, after in pairwise(moments)]
    if usage is None:
        # A finish reason of "length" says that it gave the tokens it was asked for.
        result.counted_by = "finish_reason" if finish_reason == "length" else "chunks"
        result.completion_tokens = output_len if finish_reason == "length" else len(texts)
    else:
        result.completion_tokens = int(usage["completion_tokens"])
        result.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        result.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if result.completion_tokens != output_len:
        result.error = f"{result.completion_tokens} tokens in place of {output_len}"
    return result


def read_events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, Any]]:
    """(moment at which it was whole, parsed JSON) of each `data:` line but `[DONE]`."""
    rest = b""
    for moment, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # an empty line between events, or a comment
            content = line[5:].strip()
            if content == b"[DONE]":
                continue
            try:
                yield moment, orjson.loads(content)
            except orjson.JSONDecodeError:
                yield moment, {"error": f"not JSON: {content[:100].decode(errors='replace')}"}


class _Client(asyncio.Protocol):
    """Sends one request and notes what comes back; the answer ends with the HTTP message."""

    def __init__(self, request: bytes, exchange: Exchange) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._moment = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._moment = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(f"not HTTP: {error}")

    def on_body(self, body: bytes) -> None:
        self._exchange.pieces.append((self._moment, body))

    def on_message_complete(self) -> None:
        self._exchange.status = self._parser.get_status_code()
        self._finish("")

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(f"the connection broke off{f': {exc}' if exc else ''}")

    def _finish(self, failure: str) -> None:
        if not self.done.done():
            self._exchange.failure = failure
            self.done.set_result(None)
            if self._transport is not None:
                self._transport.close()


async def _exchange(target: Target, path: str, body: bytes, timeout_s: float) -> Exchange:
    """POST `body` (GET if it is empty) on a new connection and wait for the whole answer.

    Failures are noted, not raised.
    """
    parts = urlsplit(target.url)
    secure = parts.scheme == "https"
    request = _http_request(target, "POST" if body else "GET", path, body)
    exchange = Exchange(started=time.perf_counter())

    async def talk() -> None:
        transport, client = await asyncio.get_running_loop().create_connection(
            lambda: _Client(request, exchange),
            parts.hostname or "",
            parts.port or (443 if secure else 80),
            ssl=ssl.create_default_context() if secure else None,
        )
        try:
            await client.done
        finally:
            transport.close()

    try:
        await asyncio.wait_for(talk(), timeout_s)
    except asyncio.TimeoutError:
        exchange.failure = f"no whole answer within {timeout_s:g} s"
    except OSError as error:
        exchange.failure = f"cannot connect: {error.strerror or error}"
    return exchange


def _http_request(target: Target, method: str, path: str, body: bytes) -> bytes:
    """Return the bytes of an HTTP/1.1 request to a path under the target's URL."""
    parts = urlsplit(target.url)
    lines = [
        f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1",
        f"Host: {parts.netloc.rpartition('@')[2]}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    if target.api_key:
        lines.append(f"Authorization: Bearer {target.api_key}")
    return "\r\n".join([*lines, "", ""]).encode() + body
