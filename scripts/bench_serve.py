#!/usr/bin/env python3
"""Measure an OpenAI-compatible server: a fixed number of streams, fixed lengths, exact token counts.

    python scripts/bench_serve.py http://127.0.0.1:8000 --streams 8 --input-len 128 --output-len 128

Needs the server's URL and the packages httptools, orjson and rich. While the clock runs the client only notes
which bytes came when; it reads them after the last answer, so that it takes as little as it can from a server
on the same cores. What it took is in the report (`client_cpu_s`).

Prints a table, and last one line of JSON with the names of `vllm bench serve`. Exit status: 0 every request
gave exactly the tokens it was asked for, 1 some did not, 2 an option is wrong or nothing answers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import ssl
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson
from rich.console import Console
from rich.table import Table

Prompt = str | list[int]
PERCENTILES = (50, 90, 99)
# Common words, each one token with its leading space in the usual byte-pair vocabularies.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community name"
).split()


class BenchError(Exception):
    """The server cannot be measured: nothing answers at its URL, or not as an OpenAI-compatible server."""


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
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Fields added to each request; a value of None takes the field of that name out."""

    def body(self, prompt: Prompt, output_len: int) -> bytes:
        """The JSON of one streaming, greedy completion request."""
        fields: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": self.ignore_eos or None,
            **self.extra_body,
        }
        return orjson.dumps({name: value for name, value in fields.items() if value is not None})


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
    counted_by: str = "usage"
    """Where the server sends no usage in the stream: "finish_reason" if that was "length", else "chunks"."""

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None with fewer than two tokens."""
        if self.completion_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.completion_tokens - 1)


@dataclass(frozen=True, slots=True)
class Report:
    """What one run of `measure` gave."""

    requests: list[RequestResult]
    duration: float
    """Seconds from the first request to the end of the last answer."""
    client_cpu_s: float
    """Processor time of this client within `duration`."""
    streams: int

    @property
    def failed(self) -> list[RequestResult]:
        return [request for request in self.requests if request.error]

    @property
    def output_throughput(self) -> float:
        """Output tokens a second of all streams together, from the first request to the last answer."""
        return (
            sum(request.completion_tokens for request in self.requests if not request.error) / self.duration
        )

    def samples(self) -> dict[str, list[float]]:
        """The times in milliseconds by metric, over the requests without error."""
        good = [request for request in self.requests if not request.error]
        return {
            "ttft": [1e3 * request.ttft for request in good],
            "tpot": [1e3 * request.tpot for request in good if request.tpot is not None],
            "itl": [1e3 * gap for request in good for gap in request.itls],
            "e2el": [1e3 * request.latency for request in good],
        }

    def as_dict(self) -> dict[str, Any]:
        """The report under the names of `vllm bench serve --save-result`."""
        good = [request for request in self.requests if not request.error]
        result: dict[str, Any] = {
            "duration": self.duration,
            "completed": len(good),
            "failed": len(self.failed),
            "errors": sorted({request.error for request in self.failed}),
            "max_concurrency": self.streams,
            "total_input_tokens": sum(request.prompt_tokens for request in good),
            "total_output_tokens": sum(request.completion_tokens for request in good),
            "request_throughput": len(good) / self.duration,
            "output_throughput": self.output_throughput,
            "tokens_counted_by": sorted({request.counted_by for request in good}),
            "client_cpu_s": self.client_cpu_s,
        }
        for name, values in self.samples().items():
            if values:
                result[f"mean_{name}_ms"] = fmean(values)
                result |= {f"p{percent}_{name}_ms": percentile(values, percent) for percent in PERCENTILES}
        return result


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of a non-empty list, with linear interpolation (as numpy does it)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def random_ids(count: int, length: int, seed: int, low: int = 1000, high: int = 10000) -> list[Prompt]:
    """`count` different prompts of `length` token ids in [low, high): no two share a cached prefix."""
    source = random.Random(seed)
    return [[source.randrange(low, high) for _ in range(length)] for _ in range(count)]


def random_texts(count: int, length: int, seed: int) -> list[Prompt]:
    """`count` different prompts of `length` words; the server says how many tokens these are to it."""
    source = random.Random(seed)
    return ["".join(" " + source.choice(WORDS) for _ in range(length)) for _ in range(count)]


def measure(
    target: Target, prompts: Iterable[Prompt], *, output_len: int, streams: int, timeout_s: float = 600.0
) -> Report:
    """Send every prompt, `streams` of them at a time, and wait for all answers.

    A request that fails is in the report with its error; nothing is raised for it.
    """
    # Encoded beforehand: the clock runs for the server.
    requests = [_http_request(target, "POST", "/v1/completions", target.body(p, output_len)) for p in prompts]
    if not requests:
        raise ValueError("no prompts")

    async def stream(queue: Iterator[bytes], done: list[Exchange]) -> None:
        for request in queue:
            done.append(await _exchange(target, request, timeout_s))

    async def run() -> tuple[list[Exchange], float, float]:
        queue, done = iter(requests), list[Exchange]()
        start, start_cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(stream(queue, done) for _ in range(streams)))
        return done, time.perf_counter() - start, time.process_time() - start_cpu

    exchanges, duration, cpu = asyncio.run(run())
    results = [read_stream(exchange, output_len) for exchange in exchanges]
    return Report(results, duration, cpu, streams)


def first_model(target: Target, timeout_s: float = 10.0) -> str:
    """The name of the first model that the server lists. Raises `BenchError`."""
    request = _http_request(target, "GET", "/v1/models", b"")
    exchange = asyncio.run(_exchange(target, request, timeout_s))
    if exchange.failure or exchange.status != 200:
        raise BenchError(f"{target.url}/v1/models: {exchange.failure or f'HTTP status {exchange.status}'}")
    try:
        return str(orjson.loads(exchange.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{target.url}/v1/models: lists no model; name one with --model") from error


def read_stream(exchange: Exchange, output_len: int) -> RequestResult:
    """Read the events of a completion stream; anything but `output_len` tokens is an error."""
    result = RequestResult(error=exchange.failure)
    if not result.error and exchange.status != 200:
        text = exchange.body[:200].decode(errors="replace")
        result.error = f"HTTP status {exchange.status}: {text}"
    if result.error:
        return result
    usage: dict[str, Any] | None = None
    texts: list[float] = []
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
            if choice.get("text"):
                texts.append(moment)
    if not chunks:
        result.error = "the stream has no tokens"
        return result
    texts = texts or chunks[:1]  # tokens without a text, such as special ones
    result.ttft = texts[0] - exchange.started
    result.latency = chunks[-1] - exchange.started
    result.itls = [after - before for before, after in pairwise(texts)]
    if usage is None:
        # A finish reason of "length" says that it gave the tokens it was asked for.
        result.counted_by = "finish_reason" if finish_reason == "length" else "chunks"
        result.completion_tokens = output_len if finish_reason == "length" else len(texts)
    else:
        result.completion_tokens = int(usage["completion_tokens"])
        result.prompt_tokens = int(usage.get("prompt_tokens") or 0)
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


async def _exchange(target: Target, request: bytes, timeout_s: float) -> Exchange:
    """Send the request on a new connection and wait for the whole answer; failures are noted, not raised."""
    parts = urlsplit(target.url)
    secure = parts.scheme == "https"
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
    """The bytes of an HTTP/1.1 request to a path under the target's URL."""
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


def print_report(report: Report, console: Console) -> None:
    """The report as a table."""
    result = report.as_dict()
    table = Table(title=f"{result['max_concurrency']} streams, {len(report.requests)} requests")
    table.add_column("ms")
    for column in ("mean", *(f"p{percent}" for percent in PERCENTILES)):
        table.add_column(column, justify="right")
    names = {
        "ttft": "time to first token",
        "tpot": "time per output token",
        "itl": "between chunks",
        "e2el": "whole request",
    }
    for name, label in names.items():
        if f"mean_{name}_ms" in result:
            columns = ("mean", *(f"p{percent}" for percent in PERCENTILES))
            table.add_row(label, *(f"{result[f'{column}_{name}_ms']:.1f}" for column in columns))
    console.print(table)
    console.print(
        f"{result['output_throughput']:.1f} output tokens/s, {result['request_throughput']:.2f} requests/s; "
        f"{result['total_input_tokens']} tokens in, {result['total_output_tokens']} out "
        f"(counted by {', '.join(result['tokens_counted_by']) or 'nothing'}) in {result['duration']:.2f} s; "
        f"the client took {100 * result['client_cpu_s'] / result['duration']:.1f} % of a core",
        highlight=False,
    )
    for error in result["errors"]:
        console.print(f"error: {error}", style="red", markup=False)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def http_url(text: str) -> str:
    """An argparse type: an http or https URL; a closing `/v1` is taken off."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL such as http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", type=http_url, help="such as http://127.0.0.1:8000")
    parser.add_argument("--model", help="name in the requests; the first that the server lists if not given")
    parser.add_argument("--streams", type=positive_int, default=1, help="requests at a time (default 1)")
    parser.add_argument("--requests", type=positive_int, help="requests in all (default: one a stream)")
    parser.add_argument(
        "--warmup", type=positive_int, help="requests before the measured ones (default: --streams)"
    )
    parser.add_argument("--input-len", type=positive_int, default=128, help="tokens, or words, of a prompt")
    parser.add_argument("--output-len", type=positive_int, default=128, help="tokens of an answer")
    parser.add_argument("--prompts", choices=("ids", "text"), default="ids", help="send token ids or words")
    parser.add_argument("--no-ignore-eos", action="store_true", help="do not send ignore_eos")
    parser.add_argument("--extra-body", type=json_object, default={}, help="JSON object of further fields")
    parser.add_argument("--seed", type=int, help="of the prompts (default: another one each time)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds a request may take (default 600)"
    )
    args = parser.parse_args()

    seed = int.from_bytes(os.urandom(4), "big") if args.seed is None else args.seed
    warmup, count = args.warmup or args.streams, args.requests or args.streams
    make = random_ids if args.prompts == "ids" else random_texts
    prompts = make(warmup + count, args.input_len, seed)
    target = Target(
        args.url, args.model, os.environ.get("OPENAI_API_KEY"), not args.no_ignore_eos, args.extra_body
    )
    try:
        if args.model is None:
            target = replace(target, model=first_model(target))
    except BenchError as error:
        print(f"bench_serve: {error}", file=sys.stderr)
        return 2
    measure_now = partial(
        measure, target, output_len=args.output_len, streams=args.streams, timeout_s=args.timeout
    )
    measure_now(prompts[:warmup])
    report = measure_now(prompts[warmup:])
    print_report(report, Console())
    workload = {
        "input_len": args.input_len,
        "output_len": args.output_len,
        "prompts": args.prompts,
        "seed": seed,
    }
    print(orjson.dumps({"url": args.url, "model": target.model, **workload, **report.as_dict()}).decode())
    return 1 if report.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
