#!/usr/bin/env python3
"""What `--data-parallel-size 2` gives on a CPU, and what becomes of requests when an engine dies: one table.

    python scripts/check_replicas.py [ROW …] [--model NAME] [-- FLAGS OF serve]

throughput  one engine on one thread and two on one each, in turns
hits        a chat workload over two engines: where the prefix is, and each in its turn
killed      SIGKILL of an engine under load, and its requests
frozen      SIGSTOP of one

Exit status: 1 if a figure misses its target.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
from bench.servers import Server, serving

TIMEOUT_S = 600.0
ENGINES = ("-dp", "2", "--cpu-threads", "2")
WORDS = "river stone green seven morning letter engine cloud paper winter bridge yellow".split()


class Figure(NamedTuple):
    """One line of the table."""

    name: str
    target: str
    measured: str
    met: bool


@asynccontextmanager
async def asking(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of the server, with as many connections as it needs."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.target.url, timeout=TIMEOUT_S, limits=limits, trust_env=False
    ) as http:
        yield http


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def counter(server: Server, name: str) -> float:
    """The sum of a counter over all engines."""
    return sum(map(float, re.findall(rf"^{name}_total{{.*}} (\S+)$", server.metrics(), re.MULTILINE)))


# ---- throughput -------------------------------------------------------------------------------------


def throughput(args: argparse.Namespace) -> Iterator[Figure]:
    """Tokens a second, as many requests at once for each engine. On GPUs both servers need room.

    Where others use the processor, too, what counts is the processor time of a token: on free cores two
    engines give twice the tokens of one if it is the same.
    """
    rates: dict[int, list[float]] = {1: [], 2: []}
    costs: dict[int, list[float]] = {1: [], 2: []}
    flags = args.flags
    with (
        serving(args.model, "--cpu-threads", "1", *flags) as one,
        serving(args.model, *ENGINES, *flags) as two,
    ):
        for _ in range(args.rounds):
            for engines, server in ((1, one), (2, two)):
                rate, cost = asyncio.run(_rate(server, engines * args.requests))
                rates[engines].append(rate)
                costs[engines].append(cost)
    for name, gains in (
        ("by the clock", [second / first for first, second in zip(rates[1], rates[2], strict=True)]),
        ("by processor time", [2 * first / second for first, second in zip(costs[1], costs[2], strict=True)]),
    ):
        gain = statistics.median(gains)
        measured = f"{gain:.2f} x, {min(gains):.2f} to {max(gains):.2f}"
        yield Figure(f"two engines beside one, {name}", "1.9 x", measured, gain >= 1.9)


async def _rate(server: Server, count: int, tokens: int = 48) -> tuple[float, float]:
    """Returns tokens a second, and seconds of the server's processor time a token."""
    draw = random.Random(1)
    bodies = [
        {"prompt": text(draw, 30), "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        for _ in range(count)
    ]
    async with asking(server) as http:
        start, used = time.perf_counter(), server.cpu_seconds()
        answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
        used, seconds = server.cpu_seconds() - used, time.perf_counter() - start
    for answer in answers:
        answer.raise_for_status()
    return count * tokens / seconds, used / (count * tokens)


# ---- prefixes ---------------------------------------------------------------------------------------


def hits(args: argparse.Namespace) -> Iterator[Figure]:
    """Conversations of several turns: the share of prompt tokens that the prefix caches had."""
    ways: dict[str, tuple[tuple[str, ...], bool]] = {
        "one engine": (("--cpu-threads", "1"), False),
        "two, each in its turn": (ENGINES, True),
        "two, by prefix and load": (ENGINES, False),
    }
    found = {}
    room = ("--kv-cache-memory-bytes", "1G")  # all conversations fit
    for name, (flags, turns) in ways.items():
        with serving(args.model, *flags, *room, *args.flags) as server:
            found[name] = asyncio.run(_talk(server, turns))
    for name, (rate, ttft) in found.items():
        chosen = "prefix" in name
        met = not chosen or rate >= found["two, each in its turn"][0] + 0.05
        target = "5 points above in turn" if chosen else ""
        yield Figure(f"hit rate, {name}", target, f"{rate:.1%}, first token after {ttft:.2f} s", met)


async def _talk(server: Server, in_turns: bool, talks: int = 24, turns: int = 6) -> tuple[float, float]:
    """Returns the hit rate and the mean time to the first token, in seconds. Eight conversations at once."""
    queried, hit = (counter(server, f"vllm:prefix_cache_{name}") for name in ("queries", "hits"))
    numbers, first_tokens, places = iter(range(talks * turns)), list[float](), asyncio.Semaphore(8)

    async def talk(number: int) -> None:
        draw, messages = random.Random(number), [{"role": "system", "content": text(random.Random(7), 60)}]
        for _ in range(turns):
            messages.append({"role": "user", "content": text(draw, 50)})
            headers = {"X-data-parallel-rank": str(next(numbers) % 2)} if in_turns else {}
            body = {"messages": messages, "max_tokens": 16, "temperature": 0, "stream": True}
            async with places:
                start, answer = time.perf_counter(), ""
                async with http.stream(
                    "POST", "/v1/chat/completions", json=body, headers=headers
                ) as response:
                    response.raise_for_status()
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            delta = json.loads(line[6:])["choices"][0]["delta"]
                            if delta.get("content") and not answer:
                                first_tokens.append(time.perf_counter() - start)
                            answer += delta.get("content") or ""
            messages.append({"role": "assistant", "content": answer})
            await asyncio.sleep(draw.random() / 2)

    async with asking(server) as http:
        await asyncio.gather(*map(talk, range(talks)))
    queried = counter(server, "vllm:prefix_cache_queries") - queried
    return (counter(server, "vllm:prefix_cache_hits") - hit) / queried, statistics.mean(first_tokens)


# ---- an engine that dies ----------------------------------------------------------------------------


def killed(args: argparse.Namespace) -> Iterator[Figure]:
    yield from _struck(args, signal.SIGKILL)


def frozen(args: argparse.Namespace) -> Iterator[Figure]:
    yield from _struck(args, signal.SIGSTOP)


def _struck(args: argparse.Namespace, how: signal.Signals) -> Iterator[Figure]:
    with serving(args.model, *ENGINES, "--max-num-seqs", "8", *args.flags) as server:
        ends, seconds, answers = asyncio.run(_under_load(server, how))
    name = f"{how.name} of one of two engines, 96 requests:"
    lost = ends["lost before it began"]
    others = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
    yield Figure(f"{name} lost that had not begun", "0", f"{lost} ({others})", lost == 0)
    yield Figure(f"{name} both serve again", "60 s", f"after {seconds:.1f} s", seconds < 60)
    yield Figure(f"{name} different answers to one prompt", "1", str(answers), answers == 1)


async def _under_load(server: Server, how: signal.Signals) -> tuple[Counter[str], float, int]:
    """Return how requests ended, the seconds until both engines serve again, and how many texts there were.

    Half of the requests stream.
    """
    ends: Counter[str] = Counter()
    texts: set[str] = set()
    body = {"prompt": "The river", "max_tokens": 150, "ignore_eos": True, "temperature": 0}

    async def request(number: int) -> None:
        stream, came = number % 2 == 0, ""
        try:
            async with http.stream("POST", "/v1/completions", json={**body, "stream": stream}) as response:
                async for line in response.aiter_lines():
                    if response.status_code != 200 or '"error"' in line:
                        raise httpx.HTTPError(line)
                    if not stream:
                        came = json.loads(line)["choices"][0]["text"]
                    elif line.startswith("data: {"):
                        came += json.loads(line[6:])["choices"][0]["text"]
        except httpx.HTTPError:
            ends["cut short" if came else "lost before it began"] += 1
            return
        ends["whole"] += 1
        texts.add(came)

    async with asking(server) as http:
        running = [asyncio.ensure_future(request(number)) for number in range(96)]
        await asyncio.sleep(1.5)
        os.kill(server.engine_pid, how)
        start = time.monotonic()
        await _until(http, lambda states: "starting" in states)
        await _until(http, lambda states: "starting" not in states)
        seconds = time.monotonic() - start
        await asyncio.gather(*running)
    return ends, seconds, len(texts)


async def _until(http: httpx.AsyncClient, holds: Callable[[list[str]], bool]) -> None:
    for _ in range(int(TIMEOUT_S / 0.05)):
        states: dict[str, Any] = (await http.get("/health")).json()["engines"]
        if holds(list(states.values())):
            return
        await asyncio.sleep(0.05)


ROWS = {each.__name__: each for each in (throughput, hits, killed, frozen)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all if none is given")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5, help="of throughput")
    parser.add_argument("--requests", type=int, default=64, help="of throughput, at once for each engine")
    given, flags = sys.argv[1:], list[str]()
    if "--" in given:
        flags = given[given.index("--") + 1 :]
        given = given[: given.index("--")]
    args = parser.parse_args(given)
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"there is no row {sorted(unknown)[0]}")
    args.flags = ("--max-model-len", "2048", *flags)
    figures = []
    for name in args.rows or ROWS:
        for figure in ROWS[name](args):
            figures.append(figure)
            print(" | ".join(figure[:3]) + ("" if figure.met else "  MISSED"), flush=True)
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
