#!/usr/bin/env python3
"""Overload a server, feed it what is meant to break it, and print one table: figure, target, measured.

    python scripts/faults.py [ROW …] [--model NAME] [-- FLAGS OF serve]

Each row starts its own server (or engine) of the installed microvllm, so a row can be run alone. Exit status:
1 if a figure misses its target.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
import threading
import time
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
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.process.client import EngineClient
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
JSON = {"Content-Type": "application/json"}
TRAILER_CONNECTIONS, TRAILER_BYTES = 20, 5 * MIB
BODY_CONNECTIONS, BODY_BYTES = 60, 15 * MIB


class Figure(NamedTuple):
    """One line of the table."""

    name: str
    target: str
    measured: str
    met: bool


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
    longest = asyncio.run(_longest_callback(args.model))
    name = "longest callback of the event loop, processor time"
    yield Figure(name, "50 ms", f"{1e3 * longest:.0f} ms", longest < 0.05)


def stall(args: argparse.Namespace) -> Iterator[Figure]:
    quiet, longest = asyncio.run(_engine_stall(args.model))
    name = "longest stall of the engine, n 128 and 49,000 allowed ids"
    measured = f"{1e3 * longest:.0f} ms (p99 before: {1e3 * quiet:.0f} ms)"
    yield Figure(name, "1 s", measured, longest < 1)


async def _longest_callback(model: str) -> float:
    """Processor time of the event loop's longest callback while the largest bodies are answered."""
    client = await EngineClient.start(EngineArgs(model=model).resolve())
    times: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        times.append(time.thread_time() - began)

    many = {"prompt": [[i % 90 + 3, 5] for i in range(1024)], "n": 4, "max_tokens": 1, "temperature": 1.0}
    bodies: list[dict[str, Any]] = [
        {**many, "logprobs": 20},
        {**many, "prompt": [5, 6], "n": 128, "allowed_token_ids": list(range(3, 49_000))},
    ]
    try:
        transport = httpx.ASGITransport(create_app(client, ServerArgs(allowed_hosts=("*",))))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://server", timeout=PATIENCE_S
        ) as http:
            await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "logprobs": 1})
            for body in bodies:
                content = json.dumps(body)
                asyncio.Handle._run = timed  # type: ignore[method-assign]
                answer = await http.post(
                    "/v1/completions", content=content, headers={"content-type": "application/json"}
                )
                asyncio.Handle._run = run  # type: ignore[method-assign]
                answer.raise_for_status()
    finally:
        await client.close()
    return max(times)


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
        good = len(server.measure([Completion("Hello", 1)] * count, timeout_s=PATIENCE_S).good)
    yield Figure(f"{count:,} prompts at once", "all answered", f"{good:,} of {count:,}", good == count)


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
    """With `auto`: TTFT p99 of admitted requests and goodput at 10 x load, relative to 0.9 x."""
    flags = ("--max-num-seqs", "8", "--max-num-queued-reqs", "auto", "--queue-timeout", "0.5", *args.flags)
    with serving(args.model, *flags) as server:
        rate = 64.0 / 20
        for _ in range(2):  # the first run only finds how many requests take some 20 s
            closed = server.measure([SHORT] * round(20 * rate), concurrency=8, timeout_s=PATIENCE_S)
            rate = peak = _goodput(closed)
        usual, extreme = (_offer(server, share * peak, 20) for share in (0.9, 10))
    ttft, usual_ttft = (percentile([r.ttft for r in each.good], 99) for each in (extreme, usual))
    kept = _goodput(extreme) / max(peak, _goodput(usual))
    name = "10 x overload with auto, TTFT p99 of those admitted"
    yield Figure(name, "1.5 x that at 0.9 x", f"{ttft:.2f} s ({usual_ttft:.2f} s)", ttft < 1.5 * usual_ttft)
    yield Figure("10 x overload with auto, goodput", "95 % of the peak", f"{kept:.0%}", kept > 0.95)


def _offer(server: Server, rate: float, seconds: float) -> Measured:
    """Poisson arrivals at `rate`."""
    case = Case("overload", "", ((1, SHORT.output_len),) * round(rate * seconds), request_rate=rate)
    return server.measure([SHORT] * len(case.lengths), arrivals=case.arrivals(1), timeout_s=PATIENCE_S)


def _goodput(measured: Measured) -> float:
    """Whole answers a second."""
    return len(measured.good) / measured.duration


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
        *(trailers, unfinished_bodies, template_bombs),
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
