#!/usr/bin/env python3
"""Overload a server, feed it what is meant to break it, and print one table: figure, target, measured.

    python scripts/faults.py [ROW …] [--model NAME] [-- FLAGS OF serve]

Each row starts its own server (or engine) of the installed microvllm, so a row can be run alone. Exit status:
1 if a figure misses its target.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from bench.servers import Server, memory_of, serving

from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.bench.client import Completion, Measured
from microvllm.openai_compat.bench.figures import percentile
from microvllm.openai_compat.bench.workloads import Case
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.server import HttpServer
from microvllm.openai_compat.transport.protocol import http_config
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.machine import usable_cores
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.process.heartbeat import threads_of
from microvllm.runtime.request import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 600.0
MIB = 1 << 20
SAMPLE_S = 0.02
HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
)
LONG = json.dumps({"prompt": "Hello", "max_tokens": 2000, "ignore_eos": True}).encode()
SHORT = Completion("Hello", 16)
WHOLE_ANSWERS = r'^vllm:request_success_total\{.*finished_reason="length".*\} (\S+)$'
JSON = {"Content-Type": "application/json"}
TRAILER_CONNECTIONS, TRAILER_BYTES = 20, 5 * MIB
LOADS, NICENESS, LONG_PREFILL_S = 50, 15, 60.0
BODY_CONNECTIONS, BODY_BYTES = 60, 15 * MIB


class Figure(NamedTuple):
    """One line of the table."""

    name: str
    target: str
    measured: str
    met: bool


class Goodput(NamedTuple):
    """Whole answers per second, and per second of the engine's processor time, which others disturb less."""

    per_second: float
    per_processor_second: float


@contextmanager
def asking(server: Server) -> Iterator[httpx.Client]:
    """Opens an HTTP client of the server for the block."""
    with httpx.Client(base_url=server.target.url, timeout=60, trust_env=False) as http:
        yield http


@contextmanager
def watching(server: Server) -> Iterator[list[float]]:
    """Polls /health during the block; yields the seconds of each answer, infinite for one that failed."""
    seconds: list[float] = []
    done = threading.Event()

    def watch() -> None:
        with asking(server) as http:
            while not done.wait(SAMPLE_S):
                start = time.monotonic()
                try:
                    good = http.get("/health").status_code == 200
                except httpx.HTTPError:
                    good = False
                seconds.append(time.monotonic() - start if good else float("inf"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seconds
    finally:
        done.set()
        thread.join()


@contextmanager
def held(server: Server, count: int) -> Iterator[None]:
    """Holds `count` long requests open for the block, each on a connection of its own that is never read."""
    request = HEAD.format(framing=f"Content-Length: {len(LONG)}").encode() + LONG
    with ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60))
            sock.sendall(request)
        time.sleep(3)
        yield


def health(during: str, seconds: list[float]) -> Figure:
    worst = max(seconds, default=float("inf"))
    return Figure(f"/health during {during}, worst", "1 s", f"{worst:.2f} s of {len(seconds)}", worst < 1)


# ---- overload ---------------------------------------------------------------------------------------


def callback(args: argparse.Namespace) -> Iterator[Figure]:
    longest, where = asyncio.run(_longest_callback(args.model))
    name = "longest callback of the event loop, processor time"
    yield Figure(name, "50 ms", f"{1e3 * longest:.0f} ms ({where})", longest < 0.05)


def stall(args: argparse.Namespace) -> Iterator[Figure]:
    quiet, longest = asyncio.run(_engine_stall(args.model))
    name = "longest stall of the engine, n 128 and 49,000 allowed ids"
    measured = f"{1e3 * longest:.0f} ms (p99 before: {1e3 * quiet:.0f} ms)"
    yield Figure(name, "1 s", measured, longest < 1)


async def _longest_callback(model: str) -> tuple[float, str]:
    """Processor time of the longest callback of the server's loop while the largest bodies come, and where.

    The client is in a thread, so that what it computes is not counted. Each body comes twice and its lesser
    time counts: memory that is fresh from the system costs time, too.
    """
    client = await EngineClient.start(EngineArgs(model=model).resolve())
    config = http_config(create_app(client, ServerArgs()), log_level="error")
    server = HttpServer(config, on_ready=lambda: None)
    gc.collect()
    gc.freeze()  # as the server does: a collection would walk the tokenizer and every module
    calls: list[tuple[float, str]] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        name, began = _entered_by(handle), time.thread_time()
        run(handle)
        calls.append((time.thread_time() - began, name))

    many = {"prompt": [[i % 90 + 3, 5] for i in range(1024)], "n": 4, "max_tokens": 1, "temperature": 1.0}
    sealed = "mv1." + base64.urlsafe_b64encode(b"x" * (10 * MIB)).decode()
    user = {"role": "user", "content": "hi"}
    call = {"type": "function_call", "call_id": "a", "name": "b"}
    parts = {**user, "content": [{"type": "text", "text": "x"}] * 15_000}
    several: dict[str, Any] = {**many, "prompt": [5, 6], "n": 128}
    bodies: list[tuple[str, str, dict[str, Any]]] = [
        ("log probabilities", "/v1/completions", {**many, "logprobs": 20}),
        ("allowed ids", "/v1/completions", {**several, "allowed_token_ids": list(range(3, 49_000))}),
        ("a long prompt", "/v1/completions", {"prompt": "x" * (15 * MIB)}),
        (
            *("sealed reasoning", "/v1/responses"),
            {"input": [{"type": "reasoning", "encrypted_content": sealed}, user]},
        ),
        (
            *("long arguments", "/v1/responses"),
            {"input": [{**call, "arguments": '{"a": "' + "\\n" * (5 * MIB) + '"}'}, user]},
        ),
        (
            *("unfinished arguments", "/v1/responses"),
            {"input": [{**call, "arguments": '{"a": "' + "\\n" * 125_000}, user]},
        ),
        ("an unknown field", "/v1/responses", {"input": [{**user, "unknown": "x" * (15 * MIB)}]}),
        ("many parts", "/v1/messages", {"messages": [parts]}),
        ("metadata", "/v1/messages", {"messages": [user], "metadata": {"user_id": "x" * (15 * MIB)}}),
        ("many parts", "/v1/chat/completions", {"messages": [parts]}),
        ("many messages", "/v1/chat/completions", {"messages": [user] * 9_000}),
    ]
    limits = {"/v1/messages": "max_tokens", "/v1/responses": "max_output_tokens"}
    try:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            serving = asyncio.ensure_future(server.serve(sockets=[sock]))
            with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as http:

                def post(path: str, body: dict[str, Any]) -> None:
                    content = json.dumps({limits.get(path, "max_tokens"): 1, **body})
                    answer = http.post(path, content=content, headers=JSON)
                    if answer.status_code not in (200, 400):
                        answer.raise_for_status()

                for path in {path for _, path, _ in bodies}:  # what is imported at first use
                    await asyncio.to_thread(post, path, {"prompt": "a", "input": "a", "messages": [user]})
                longest: list[tuple[float, str]] = []
                asyncio.Handle._run = timed  # type: ignore[method-assign]
                for name, path, body in bodies:
                    twice = []
                    for _ in range(2):
                        calls.clear()
                        await asyncio.to_thread(post, path, body)
                        twice.append(max(calls))
                    seconds, entered = min(twice)
                    longest.append((seconds, f"{path}, {name}: {entered}"))
            server.should_exit = True
            await serving
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]
        await client.close()
    return max(longest)


def _entered_by(handle: asyncio.Handle) -> str:
    """Name of what the event loop enters by `handle`: a function, or the innermost coroutines of a task."""
    callback = handle._callback  # type: ignore[attr-defined]
    task = getattr(callback, "__self__", None)
    if not isinstance(task, asyncio.Task):
        return getattr(callback, "__qualname__", repr(callback))
    names: list[str] = []
    inner: Any = task.get_coro()
    while hasattr(inner, "__qualname__"):  # behind the last one is the future that it awaited
        names.append(inner.__qualname__)
        inner = getattr(inner, "cr_await", None) or getattr(inner, "ag_await", None)
    return " > ".join(names[-3:])


async def _engine_stall(model: str) -> tuple[float, float]:
    """Gaps between two tokens of a request: (p99 alone, longest) while one of 49,000 allowed ids arrives."""
    client = await EngineClient.start(EngineArgs(model=model, max_num_seqs=16).resolve())
    gaps: list[float] = []

    async def neighbour() -> None:
        (stream,) = client.submit([5, 6], SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
        last = time.perf_counter()
        async for _ in stream:
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
        stream.abort()

    try:
        watching = asyncio.ensure_future(neighbour())
        await asyncio.sleep(2)
        quiet = percentile(gaps, 99)
        gaps.clear()
        params = SamplingParams(n=128, max_tokens=2, allowed_token_ids=list(range(3, 49_000)))
        streams = await client.submit_all([[7, 8]], params)
        for stream in streams:
            async for _ in stream:
                pass
        longest = max(gaps)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    finally:
        await client.close()
    return quiet, longest


def burst(args: argparse.Namespace, count: int = 10_000) -> Iterator[Figure]:
    """Prompts sent at once to a server with default limits."""
    with serving(args.model, *args.flags) as server:
        measured = server.measure([Completion("Hello", 1)] * count, timeout_s=PATIENCE_S)
    good, errors = len(measured.good), Counter(found.error for found in measured.requests if found.error)
    why = "".join(f"; {times:,} x {error[:80]}" for error, times in errors.most_common(1))
    yield Figure(f"{count:,} prompts at once", "all answered", f"{good:,} of {count:,}{why}", good == count)


def refusal(args: argparse.Namespace) -> Iterator[Figure]:
    """Latency of a 503 and its Retry-After, while the queue is full."""
    flags = ("--max-num-seqs", "4", "--max-num-queued-reqs", "16", *args.flags)
    times, retry = [], ""
    with serving(args.model, *flags) as server, held(server, 20), asking(server) as http:
        for _ in range(200):
            began = time.perf_counter()
            with http.stream("POST", "/v1/completions", content=LONG, headers=JSON) as answer:
                if answer.status_code == 503:
                    times.append(time.perf_counter() - began)
                    retry = answer.headers.get("retry-after", "?")
    if not times:
        yield Figure("refusal while the queue is full", "50 ms", "none was refused", False)
        return
    middle, high = percentile(times, 50), percentile(times, 99)
    measured = f"p50 {1e3 * middle:.0f} ms, p99 {1e3 * high:.0f} ms, Retry-After {retry} s"
    yield Figure("refusal while the queue is full", "50 ms", measured, high < 0.05)


def memory(args: argparse.Namespace, count: int = 4000) -> Iterator[Figure]:
    """What the API process grows by for each waiting request, its connection included."""
    with serving(args.model, "--max-num-seqs", "1", *args.flags) as server, held(server, 50):
        before = memory_of(server.pid)
        with held(server, count):
            time.sleep(30)
            grown = (memory_of(server.pid) - before) / count
    yield Figure("memory of a waiting request", "16 KiB", f"{grown / 1024:.1f} KiB", grown < 16 << 10)


def overload(args: argparse.Namespace) -> Iterator[Figure]:
    """With `auto`: TTFT p99 of admitted requests and goodput at 10 x load, relative to 0.9 x and to the peak.

    The client that offers ten times the load, and the process that refuses nine tenths of it, need a
    processor: the engine leaves them one. All loads come in turns, as a shared machine changes its speed.
    """
    threads = ("--cpu-threads", str(max(1, usable_cores() - 1)))
    flags = ("--max-num-seqs", "8", "--max-num-queued-reqs", "auto", "--queue-timeout", "0.5", *threads)
    with serving(args.model, *flags, *args.flags) as server:
        rate = 64.0 / 20
        for _ in range(2):  # the first run only finds how many requests take some 20 s
            _, (rate, _) = _saturate(server, round(20 * rate))
        _offer(server, 10 * rate, 5)
        before = memory_of(server.pid)
        usual, extreme, peaks = [], [], []
        for _ in range(3):
            usual.append(_offer(server, 0.9 * rate, 10))
            extreme.append(_offer(server, 10 * rate, 10))
            peaks.append(_saturate(server, round(10 * rate)))
        grown = memory_of(server.pid) - before
    ttft, usual_ttft = (
        percentile([r.ttft for measured, _ in each for r in measured.good], 99) for each in (extreme, usual)
    )
    kept, by_processor = (
        statistics.mean(rates[i] for _, rates in extreme) / statistics.mean(rates[i] for _, rates in peaks)
        for i in (0, 1)
    )
    name = "10 x overload with auto, TTFT p99 of those admitted"
    yield Figure(name, "1.5 x that at 0.9 x", f"{ttft:.2f} s ({usual_ttft:.2f} s)", ttft < 1.5 * usual_ttft)
    measured = f"{kept:.0%} (for a second of the engine's processor time {by_processor:.0%})"
    yield Figure("10 x overload with auto, goodput", "95 % of the peak", measured, kept > 0.95)
    name = "10 x overload with auto, growth of the API process"
    yield Figure(name, "4 MB", f"{grown / MIB:.1f} MB", grown < 4 * MIB)


def _offer(server: Server, rate: float, seconds: float) -> tuple[Measured, Goodput]:
    """Poisson arrivals at `rate` -> what came of them."""
    case = Case("overload", "", ((1, SHORT.output_len),) * round(rate * seconds), request_rate=rate)
    with _answering(server, seconds) as goodput:
        measured = server.measure(
            [SHORT] * len(case.lengths), arrivals=case.arrivals(1), timeout_s=PATIENCE_S
        )
    return measured, goodput()


def _saturate(server: Server, count: int) -> tuple[Measured, Goodput]:
    """So many requests, 8 at a time -> what came of them."""
    with _answering(server, math.inf) as goodput:
        measured = server.measure([SHORT] * count, concurrency=8, timeout_s=PATIENCE_S)
    return measured, goodput()


@contextmanager
def _answering(server: Server, seconds: float) -> Iterator[Callable[[], Goodput]]:
    """Counts the answers that end in the block; yields what then returns how many there were.

    Of the first `seconds` the tenth at the beginning and the one at the end do not count: there the batch is
    not full yet, or any more.
    """
    counts: list[tuple[float, float, float]] = []
    done = threading.Event()

    def count() -> None:
        with asking(server) as http:
            while not done.wait(0.1):
                text = http.get("/metrics").text
                ended = re.findall(WHOLE_ANSWERS, text, re.MULTILINE)
                used = threads_of(server.engine_pid)[1] / os.sysconf("SC_CLK_TCK")
                counts.append((sum(map(float, ended)), time.monotonic(), used))

    def goodput() -> Goodput:
        begin = counts[0][1]
        length = min(seconds, counts[-1][1] - begin)
        full = [each for each in counts if 0.1 * length <= each[1] - begin <= 0.9 * length]
        answers, passed, used = (last - first for first, last in zip(full[0], full[-1], strict=True))
        return Goodput(answers / passed, answers / used)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield goodput
    finally:
        done.set()
        thread.join()


# ---- a frozen engine --------------------------------------------------------------------------------


def frozen(args: argparse.Namespace) -> Iterator[Figure]:
    """`kill -STOP` of the engine, idle and busy: when /health says so, and when another engine serves."""
    with tempfile.NamedTemporaryFile() as log, serving(args.model, *args.flags, log=Path(log.name)) as server:
        for state, requests in (("idle", 0), ("busy", 3)):
            with held(server, requests):
                pid, start = server.engine_pid, time.monotonic()
                os.kill(pid, signal.SIGSTOP)
                seen, again = (_wait_for_health(server, good) - start for good in (False, True))
            name = f"kill -STOP of an engine that is {state}: /health 503"
            yield Figure(name, "10 s", f"after {seen:.1f} s", seen < 10)
            replaced = server.engine_pid != pid
            yield Figure("another engine serves", "60 s", f"after {again:.1f} s", replaced and again < 60)
        text = Path(log.name).read_text()
    named = re.search(r"it is killed with 3 requests: (cmpl-\w+, ){2}cmpl-\w+\.", text) is not None
    yield Figure("its requests in the log, by id", "3", "3" if named else "others", named)


def _wait_for_health(server: Server, good: bool) -> float:
    """Wait until /health is 200 (`good`) or something else -> when that was; infinite if it does not come."""
    with asking(server) as http:
        for _ in range(round(PATIENCE_S / 5 / SAMPLE_S)):
            with suppress(httpx.HTTPError):
                if (http.get("/health").status_code == 200) == good:
                    return time.monotonic()
            time.sleep(SAMPLE_S)
    return float("inf")


def false_alarm(args: argparse.Namespace) -> Iterator[Figure]:
    """/health while one step is a prefill of a minute, as 50 others want the processors.

    All of them are nice, the server too, so that other work on the machine goes on.
    """
    flags = ("--max-num-batched-tokens", "8192", *args.flags)
    with serving(args.model, *flags) as server, ExitStack() as stack, asking(server) as http:
        http.timeout = PATIENCE_S
        for pid in server.processes():
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(thread.name), NICENESS)
        for _ in range(LOADS):
            load = subprocess.Popen(["nice", "-n", str(NICENESS), "sh", "-c", "while :; do :; done"])
            stack.callback(load.wait)
            stack.callback(load.kill)
        pid, took, tokens = server.engine_pid, 0.0, 50
        with watching(server) as seconds:
            while took < LONG_PREFILL_S and tokens < 8000:
                tokens = min(8000, round(tokens * max(1.5, 1.2 * LONG_PREFILL_S / max(took, 1.0))))
                began, body = time.monotonic(), {"prompt": [1000 + tokens] * tokens, "max_tokens": 1}
                http.post("/v1/completions", json=body).raise_for_status()
                took = time.monotonic() - began
        alarms = sum(map(math.isinf, seconds)) + (server.engine_pid != pid)
    name = f"/health not 200 in a prefill of {took:.0f} s among {LOADS} loads"
    yield Figure(name, "never, in 60 s", f"{alarms} of {len(seconds)}", not alarms and took >= LONG_PREFILL_S)


# ---- attacks ----------------------------------------------------------------------------------------


def trailers(args: argparse.Namespace) -> Iterator[Figure]:
    """Chunked bodies that go on with trailers for ever, short ones and one without an end."""
    head = HEAD.format(framing="Transfer-Encoding: chunked").encode() + b"2\r\n{}\r\n0\r\n"
    with serving(args.model, *args.flags) as server, watching(server) as seconds:
        before, most, sent = memory_of(server.pid), 0, 0
        for number in range(TRAILER_CONNECTIONS):
            endless = b"X: " + b"y" * MIB if number % 2 else b"X: y\r\n" * (MIB // 6)
            with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 10) as sock:
                sock.sendall(head)
                for _ in range(TRAILER_BYTES // MIB):
                    sock.sendall(endless)
                    sent += MIB
            most = max(most, memory_of(server.pid) - before)
        figure = f"memory for {TRAILER_CONNECTIONS} bodies with {TRAILER_BYTES // MIB} MB of trailers"
        yield Figure(figure, "10 MB", f"{most / MIB:.1f} MB, {sent // MIB} MB sent", most < 10 * MIB)
        time.sleep(0.5)
    yield health("trailers", seconds)


def pipelined(args: argparse.Namespace) -> Iterator[Figure]:
    """Requests of 30 bytes one behind the other, whose answers are not read."""
    with serving(args.model, *args.flags) as server, watching(server) as seconds, ExitStack() as stack:
        before = memory_of(server.pid)
        for _ in range(20):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))
            sock.settimeout(1)
            with suppress(OSError):
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 30_000)
        time.sleep(1)
        grown = memory_of(server.pid) - before
        figure = "memory for 20 x 30,000 requests one behind the other"
        yield Figure(figure, "10 MB", f"{grown / MIB:.1f} MB", grown < 10 * MIB)
    yield health("requests one behind the other", seconds)


def unfinished_bodies(args: argparse.Namespace) -> Iterator[Figure]:
    """Bodies that stop before their end, from many connections at once."""
    head = HEAD.format(framing=f"Content-Length: {BODY_BYTES + 1}").encode()
    with serving(args.model, *args.flags) as server, watching(server) as seconds:
        before, socks = memory_of(server.pid), []
        for _ in range(BODY_CONNECTIONS):
            sock = socket.create_connection(("127.0.0.1", server.port), 10)
            socks.append(sock)
            with suppress(OSError):
                sock.sendall(head + b" " * BODY_BYTES)
        time.sleep(1)
        grown = memory_of(server.pid) - before
        for sock in socks:
            sock.close()
        figure = f"memory for {BODY_CONNECTIONS} unfinished bodies of {BODY_BYTES // MIB} MB"
        yield Figure(figure, "200 MB", f"{grown / MIB:.0f} MB", grown < 200 * MIB)
    yield health("unfinished bodies", seconds)


def template_bombs(args: argparse.Namespace) -> Iterator[Figure]:
    """Templates that would run for ever or take all memory, rendered as the server renders them."""
    sys.path.insert(0, str(ROOT / "tests" / "text"))
    from template_bombs import bombs

    from microvllm.runtime.errors import InvalidRequestError
    from microvllm.runtime.text.template_process import SandboxProcesses

    found = list(bombs())
    sandbox = SandboxProcesses()
    sandbox.content_format("")  # the processes start
    done, most = threading.Event(), 0

    def sample() -> None:
        nonlocal most
        while not done.wait(SAMPLE_S):
            for children in Path("/proc/self/task").glob("*/children"):
                with suppress(OSError):
                    for pid in children.read_text().split():
                        most = max(most, memory_of(int(pid), "VmHWM"))

    def render(source: str) -> float:
        start = time.monotonic()
        with suppress(InvalidRequestError):
            sandbox.render(source, {"messages": [{"role": "user", "content": "hi"}]})
        return time.monotonic() - start

    thread = threading.Thread(target=sample)
    thread.start()
    times = [render(source) for _, source in found]
    done.set()
    thread.join()
    yield Figure(f"{len(found)} template bombs, longest", "5 s", f"{max(times):.2f} s", max(times) < 5)
    yield Figure(f"{len(found)} template bombs, most memory", "1 GB", f"{most / MIB:.0f} MB", most < 1 << 30)
    yield from _served_bombs(args, found)


def _served_bombs(args: argparse.Namespace, found: list[tuple[str, str]]) -> Iterator[Figure]:
    # What the compiler computes by itself is a bomb for every conversation: here each is a branch.
    kinds = ("compares", "prints", "doubles")
    whole = [(kind, source) for kind, source in found if kind.split()[0] in kinds][::6]
    branches = [
        f"{{% if messages[0].content == '{i}' %}}{each}{{% endif %}}" for i, (_, each) in enumerate(whole)
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as file:
        file.write("".join(branches) + "{{ messages[0].content }}")
        file.flush()
        with (
            serving(args.model, "--chat-template", file.name, *args.flags) as server,
            asking(server) as http,
            watching(server) as seconds,
        ):

            def chat(content: object) -> tuple[int, float]:
                body = {"messages": [{"role": "user", "content": str(content)}], "max_tokens": 1}
                start = time.monotonic()
                answer = http.post("/v1/chat/completions", json=body)
                return answer.status_code, time.monotonic() - start

            answers = [chat(index) for index in range(len(whole))]
            refused = [took for status, took in answers if status == 400]
            yield Figure(
                f"{len(answers)} of them by HTTP, longest",
                "5 s, 400 each",
                f"{max(took for _, took in answers):.2f} s, {len(refused)} x 400",
                len(refused) == len(answers) and max(refused) < 5,
            )
            yield Figure("the next chat", "200", str(chat("hi")[0]), chat("hi")[0] == 200)
        yield health("template bombs", seconds)


ROWS: dict[str, Callable[[argparse.Namespace], Iterator[Figure]]] = {
    row.__name__: row
    for row in (
        *(callback, stall, burst, refusal, memory, overload),
        *(frozen, false_alarm),
        *(trailers, pipelined, unfinished_bodies, template_bombs),
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all if none is given")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    argv = sys.argv[1:]
    own = argv[: argv.index("--")] if "--" in argv else argv
    args = parser.parse_args(own)
    args.flags = argv[len(own) + 1 :]
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"there is no row {', '.join(unknown)}")
    os.environ.pop("MICROVLLM_API_KEY", None)
    met = True
    print("| figure | target | measured | |\n|---|---|---|---|", flush=True)
    for name in args.rows or ROWS:
        for figure in ROWS[name](args):
            missed = "" if figure.met else "missed"
            print(f"| {figure.name} | {figure.target} | {figure.measured} | {missed} |", flush=True)
            met &= figure.met
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
