"""Overloads a server and prints one table: figure, target, measured.

usage: python scripts/faults.py [--model MODEL] [ROW ...]

Each row starts its own server (or engine) of the installed microvllm, so a row can be run alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.process.client import EngineClient

PATIENCE_S = 600.0
START_S = 120.0


@dataclass(frozen=True)
class Answer:
    """The status of an answer (0: the connection failed), seconds to its first byte, and its Retry-After."""

    status: int
    seconds: float
    retry_after: int


@dataclass(frozen=True)
class Server:
    port: int
    process: subprocess.Popen[bytes]

    def resident_kib(self) -> int:
        """Resident memory of the API process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))

    async def ask(self, body: dict[str, Any], whole: bool = False) -> Answer:
        """Send one completion on a connection of its own; read its head, or `whole` the rest too."""
        text = json.dumps(body).encode()
        began = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                head = (
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                )
                writer.write(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
                received = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
                if whole:
                    await asyncio.wait_for(reader.read(4 if body.get("stream") else -1), PATIENCE_S)
                seconds = time.perf_counter() - began
                if whole and body.get("stream"):
                    await asyncio.wait_for(reader.read(), PATIENCE_S)
            finally:
                writer.close()
        except (OSError, EOFError, asyncio.TimeoutError):
            return Answer(0, time.perf_counter() - began, 0)
        lines = received.decode("latin-1").lower().split("\r\n")
        retry = [int(line.split(":")[1]) for line in lines if line.startswith("retry-after")]
        return Answer(int(lines[0].split()[1]), seconds, retry[0] if retry else 0)


@contextlib.asynccontextmanager
async def server(model: str, *flags: str) -> AsyncIterator[Server]:
    """A server of the model, ready; ended at the end."""
    port = random.randrange(20_000, 30_000)
    command = [str(Path(sys.executable).with_name("microvllm")), "serve", model, "--port", str(port)]
    quiet = ["--disable-uvicorn-access-log", "--log-level", "error"]
    process = subprocess.Popen(
        [*command, *quiet, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        found = Server(port, process)
        deadline = time.monotonic() + START_S
        while (await found.ask({"prompt": "a", "max_tokens": 1}, whole=True)).status != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start (exit status {process.poll()})")
            await asyncio.sleep(0.2)
        yield found
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# ---- rows -----------------------------------------------------------------------------------------


async def longest_callback(model: str) -> str:
    """Processor time of the event loop's longest callback while the largest bodies are answered."""
    import httpx

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
                if answer.status_code != 200:
                    return f"status {answer.status_code}"
    finally:
        await client.close()
    return f"{1e3 * max(times):.0f} ms"


async def engine_stall(model: str) -> str:
    """Longest gap between two tokens of a neighbour while a body of 49,000 allowed ids and n 128 arrives."""
    client = await EngineClient.start(EngineArgs(model=model, max_num_seqs=16).resolve())
    from microvllm.runtime.request import SamplingParams

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
        quiet = percentile(gaps, 0.99)
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
    return f"{1e3 * longest:.0f} ms (before: p99 {1e3 * quiet:.0f} ms)"


async def burst(model: str, count: int = 10_000) -> str:
    """`count` prompts sent at once to a server with default limits; how many are answered 200."""
    async with server(model) as found:
        body = {"prompt": "Hello", "max_tokens": 1}
        answers = await asyncio.gather(*(found.ask(body, whole=True) for _ in range(count)))
    return f"{sum(answer.status == 200 for answer in answers):,} of {count:,}"


async def refusals(model: str) -> str:
    """Latency of a 503 and its Retry-After, while the queue is full."""
    async with server(model, "--max-num-seqs", "4", "--max-num-queued-reqs", "16") as found:
        held = [asyncio.ensure_future(found.ask(LONG, whole=True)) for _ in range(20)]
        await asyncio.sleep(3)
        answers = [await found.ask(LONG) for _ in range(200)]
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
    refused = [answer for answer in answers if answer.status == 503]
    if not refused:
        return "none was refused"
    times = [answer.seconds for answer in refused]
    return (
        f"p50 {1e3 * percentile(times, 0.5):.0f} ms, p99 {1e3 * percentile(times, 0.99):.0f} ms, "
        f"Retry-After {refused[-1].retry_after} s"
    )


async def waiting_memory(model: str, count: int = 4000) -> str:
    """Memory that the API process grows by for each waiting request, its connection included."""
    async with server(model, "--max-num-seqs", "1") as found:
        warm = [asyncio.ensure_future(found.ask(LONG, whole=True)) for _ in range(50)]
        await asyncio.sleep(3)
        before = found.resident_kib()
        held = [asyncio.ensure_future(found.ask(LONG, whole=True)) for _ in range(count)]
        await asyncio.sleep(30)
        grown = found.resident_kib() - before
        for task in (*warm, *held):
            task.cancel()
        await asyncio.gather(*warm, *held, return_exceptions=True)
    return f"{grown / count:.1f} KiB"


async def overload(model: str) -> str:
    """With `auto`: TTFT p99 of admitted requests and goodput at 10 x load, relative to 0.9 x."""
    flags = ("--max-num-seqs", "8", "--max-num-queued-reqs", "auto", "--queue-timeout", "0.5")
    async with server(model, *flags) as found:
        start = time.perf_counter()
        answers = await asyncio.gather(*(_worker(found, start + 20) for _ in range(8)))
        peak = sum(map(len, answers)) / 20
        usual, usual_goodput = await _offer(found, 0.9 * peak, 20)
        extreme, goodput = await _offer(found, 10 * peak, 20)
    return (
        f"TTFT p99 {percentile(extreme, 0.99):.2f} s ({percentile(usual, 0.99):.2f} s at 0.9 x), "
        f"goodput {100 * goodput / max(peak, usual_goodput):.0f} % of the peak"
    )


async def _worker(found: Server, until: float) -> list[Answer]:
    done = []
    while time.perf_counter() < until:
        done.append(await found.ask(SHORT, whole=True))
    return done


async def _offer(found: Server, rate: float, seconds: float) -> tuple[list[float], float]:
    """Poisson arrivals at `rate` -> (seconds to the first event of those admitted, answers per second)."""
    draw, tasks = random.Random(1), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        tasks.append(asyncio.ensure_future(found.ask(SHORT, whole=True)))
        await asyncio.sleep(draw.expovariate(rate))
    answers = await asyncio.gather(*tasks)
    took = time.perf_counter() - end + seconds
    admitted = [answer.seconds for answer in answers if answer.status == 200]
    return admitted or [float("inf")], len(admitted) / took


LONG = {"prompt": "Hello", "max_tokens": 2000, "ignore_eos": True}
SHORT = {"prompt": "Hello", "max_tokens": 16, "ignore_eos": True, "stream": True}
Row = Callable[[str], Coroutine[Any, Any, str]]
ROWS: dict[str, tuple[str, str, Row]] = {
    "callback": ("longest callback of the event loop, processor time", "50 ms", longest_callback),
    "stall": ("longest stall of the engine, n 128 and 49,000 allowed ids", "as before", engine_stall),
    "burst": ("10,000 prompts at once", "all answered", burst),
    "refusal": ("refusal while the queue is full", "50 ms", refusals),
    "memory": ("memory of a waiting request", "16 KiB", waiting_memory),
    "overload": ("10 x overload with auto", "TTFT 1.5 x, goodput 95 %", overload),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all of them if none is given"
    )
    wish = parser.parse_args()
    unknown = [name for name in wish.rows if name not in ROWS]
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}")
    print("| figure | target | measured |\n|---|---|---|", flush=True)
    for name in wish.rows or ROWS:
        figure, target, row = ROWS[name]
        print(f"| {figure} | {target} | {asyncio.run(row(wish.model))} |", flush=True)


if __name__ == "__main__":
    main()
