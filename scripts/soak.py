#!/usr/bin/env python3
"""Keep a server busy for a long time and report how much its memory grows.

    python scripts/soak.py [--minutes 60] [--warm-up 10] [--clients 8] [--model NAME] [-- FLAGS OF serve]

Starts `microvllm serve` on a free port, fills its KV cache once, so that no page of that is new later, and
sends it all sorts of requests: chats and completions, streamed and whole, several samples, log probabilities,
stop strings, bodies that are refused, clients that leave in the middle. Prints the resident memory of the API
process and of the engine process every minute, and at the end the growth: the median of the last fifth of the
time after the warm-up against that of the first fifth.
Exit status 1: a process grew by more than `--most` percent, a request failed, or blocks are still held.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from bench.servers import Server, memory_of, serving

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven old clocks count every hour of the night".split()
)
EXPECTED = {200, 400}
SAMPLE_S = 5.0
MIB = 1 << 20


class Memory:
    """The resident memory of a server's API process and of its engine process over time."""

    def __init__(self, server: Server) -> None:
        self._pids = {"api": server.pid, "engine": server.engine_pid}
        self.samples: dict[str, list[tuple[float, int]]] = {"api": [], "engine": []}

    def sample(self, at: float) -> None:
        for name, pid in self._pids.items():
            self.samples[name].append((at, memory_of(pid)))

    def growth(self, name: str, start: float, end: float) -> tuple[float, float]:
        """Medians, in bytes, of the first and of the last fifth of the time from `start` to `end`."""
        fifth = (end - start) / 5
        first = [size for at, size in self.samples[name] if start <= at < start + fifth]
        last = [size for at, size in self.samples[name] if at >= end - fifth]
        return statistics.median(first), statistics.median(last)


def request(rng: random.Random, model: str) -> tuple[str, dict[str, Any]]:
    """The path and the body of a random request."""
    text = " ".join(rng.choices(WORDS, k=rng.choice([3, 20, 150])))
    body: dict[str, Any] = {"model": model, "max_tokens": rng.choice([1, 8, 32, 64])}
    kind = rng.random()
    if kind < 0.05:
        body["temperature"] = -1  # refused
    elif kind < 0.2:
        body |= {"n": 3, "temperature": 1.0, "seed": rng.randrange(1000)}
    elif kind < 0.35:
        body |= {"stop": ["the", "."], "temperature": 0.8}
    elif kind < 0.5:
        body |= {"presence_penalty": 0.5, "logit_bias": {"5": 1}}
    body["stream"] = rng.random() < 0.6
    if rng.random() < 0.5:
        body["messages"] = [{"role": "user", "content": text}]
        if kind > 0.8:
            body |= {"logprobs": True, "top_logprobs": 3}
        return "/v1/chat/completions", body
    body["prompt"] = [text, text + " again"] if kind > 0.9 else text
    if 0.7 < kind < 0.8:
        body["logprobs"] = 2
    return "/v1/completions", body


async def client(http: httpx.AsyncClient, model: str, seed: int, end: float, counts: dict[str, int]) -> None:
    """Send one request after the other until `end`; leave some of them in the middle."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        path, body = request(rng, model)
        leaves = rng.random() < 0.15
        try:
            async with http.stream("POST", path, json=body) as answer:
                async for chunk in answer.aiter_bytes():
                    counts["error events"] += b'"error"' in chunk and answer.status_code == 200
                    if leaves:
                        break
            counts[str(answer.status_code)] = counts.get(str(answer.status_code), 0) + 1
        except httpx.HTTPError as error:
            counts[type(error).__name__] = counts.get(type(error).__name__, 0) + 1


async def fill(http: httpx.AsyncClient, model: str, clients: int) -> None:
    """Send prompts that have nothing in common until all blocks of the KV cache have been written."""
    load = (await http.get("/v1/loads")).json()["loads"][0]
    card = (await http.get("/v1/models")).json()["data"][0]
    length, rng = min(card["max_model_len"] - 1, 1000), random.Random(0)
    prompts = iter(range(-(-5 * load["max_total_num_tokens"] // (4 * length))))

    async def send() -> None:
        for _ in prompts:
            ids = [rng.randrange(10, 250) for _ in range(length)]
            body = {"model": model, "prompt": ids, "max_tokens": 1}
            (await http.post("/v1/completions", json=body)).raise_for_status()

    await asyncio.gather(*(send() for _ in range(clients)))


async def soak(url: str, memory: Memory, args: argparse.Namespace) -> dict[str, int]:
    counts = {"error events": 0}
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        await fill(http, model, args.clients)
        start = time.monotonic()
        end = start + 60 * args.minutes
        work = [asyncio.ensure_future(client(http, model, seed, end, counts)) for seed in range(args.clients)]
        printed = 0.0
        while not all(task.done() for task in work):
            at = time.monotonic() - start
            memory.sample(at)
            if at >= printed:
                printed = at - at % 60 + 60
                sizes = "  ".join(
                    f"{name} {found[-1][1] / MIB:8.1f} MiB" for name, found in memory.samples.items()
                )
                print(f"{at / 60:6.1f} min  {sizes}  {counts}", flush=True)
            await asyncio.sleep(SAMPLE_S)
        await asyncio.gather(*work)
        for _ in range(100):
            loads = (await http.get("/v1/loads")).json()["loads"][0]
            if not loads["num_total_reqs"] and not loads["num_used_tokens"]:
                break
            await asyncio.sleep(0.1)
        else:
            counts["tokens still held"] = loads["num_used_tokens"] or 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--warm-up", type=float, default=10, help="minutes that do not count")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--most", type=float, default=1.0, help="growth in percent that is allowed")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--log", type=Path, default=Path("soak.log"), help="the server's output")
    parser.add_argument("flags", nargs="*", help="flags of serve, after --")
    args = parser.parse_args()
    if args.warm_up >= args.minutes:
        parser.error("--warm-up must be shorter than --minutes")
    with serving(args.model, *args.flags, log=args.log) as server:
        memory = Memory(server)
        counts = asyncio.run(soak(server.target.url, memory, args))
    failed = sum(count for name, count in counts.items() if name not in map(str, EXPECTED))
    print(f"\n| process | after {args.warm_up:g} min, MiB | at the end, MiB | growth | target |")
    print("|---|---:|---:|---:|---:|")
    for name in memory.samples:
        first, last = memory.growth(name, 60 * args.warm_up, 60 * args.minutes)
        percent = 100 * (last / first - 1)
        failed += percent > args.most
        print(f"| {name} | {first / MIB:.1f} | {last / MIB:.1f} | {percent:+.2f} % | < {args.most:g} % |")
    print(f"\nanswers: {counts}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
