#!/usr/bin/env python3
"""Measures the engine alone, without a server or text: random token ids in, token ids out, at full speed.

    python scripts/bench_offline.py --model DIR --load-format dummy --requests 256 --input 100-1024

Prints output tokens a second over the whole run and, for steps in which every request decodes, the time
of a step and what part of it the host takes, and at the end the longest of all these steps, which a garbage
collection would be in: as in the engine's own process, what exists after the start is exempt from those,
unless --no-freeze. The first run of a size compiles kernels: there is a warm-up.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from bench.options import span

from microvllm.openai_compat.bench.workloads import Span
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.core.engine_core import EngineCore
from microvllm.runtime.machine import freeze_objects
from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.model_runner import LaunchedStep
from microvllm.runtime.worker.parallel.runner import start_runner


@dataclass
class Run:
    seconds: float = 0.0
    tokens: int = 0
    first_s: float = 0.0  # until every request had its first token
    decode_s: list[float] = field(default_factory=list)  # steps that only decode
    host_s: list[float] = field(default_factory=list)  # of these, what the host was busy for


def run(core: EngineCore[LaunchedStep], requests: list[EngineRequest]) -> Run:
    """All requests at once, to their ends."""
    result, started = Run(), time.perf_counter()
    waiting = {request.request_id for request in requests}
    for request in requests:
        refused = core.add(request)
        if refused is not None:
            raise SystemExit(f"a request was refused: {refused.error}")
    while core.has_work():
        before, busy = time.perf_counter(), time.thread_time()
        decoding = not waiting and core.scheduler.num_waiting == 0
        outputs = core.step()
        if decoding:
            result.decode_s.append(time.perf_counter() - before)
            result.host_s.append(time.thread_time() - busy)
        result.tokens += sum(len(output.token_ids) for output in outputs)
        if waiting:
            waiting -= {output.request_id for output in outputs if output.token_ids}
            result.first_s = time.perf_counter() - started
    result.seconds = time.perf_counter() - started
    return result


class Collections:
    """Counts the garbage collections of each generation, and the longest in seconds."""

    def __init__(self) -> None:
        self.counts, self.longest_s = [0, 0, 0], 0.0
        self._started = 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._started = time.perf_counter()
        else:
            self.counts[info["generation"]] += 1
            self.longest_s = max(self.longest_s, time.perf_counter() - self._started)


def summary(steps: list[float], collections: Collections) -> str:
    ordered = sorted(steps)
    median, rare = statistics.median(ordered), ordered[len(ordered) * 999 // 1000]
    longest = ", ".join(f"{seconds * 1e3:.3f}" for seconds in ordered[:-4:-1])
    return (
        f"{len(ordered)} decode steps: median {median * 1e3:.3f} ms, 1 of 1000 above {rare * 1e3:.3f} ms, "
        f"longest {longest} ms; collections of generations 0, 1, 2: "
        f"{', '.join(map(str, collections.counts))}, the longest {collections.longest_s * 1e3:.3f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--requests", type=int, nargs="+", default=[256], help="at once, one after another")
    parser.add_argument("--input", type=span, default=Span(100, 1024))
    parser.add_argument("--output", type=span, default=Span(100, 1024))
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--no-freeze", action="store_true", help="let collections walk what exists already")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="fields of EngineArgs")
    args = parser.parse_args()
    options: dict[str, Any] = {}
    for each in args.set:
        name, _, value = each.partition("=")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    started = time.perf_counter()
    config = EngineArgs(model=args.model, load_format=args.load_format, **options).resolve()
    runner = start_runner(config)
    core = EngineCore(runner.config, runner)
    print(
        f"{args.model}: {config.device} {config.dtype} {config.attention_backend}, block {config.block_size},"
        f" {runner.config.num_blocks} blocks, ready in {time.perf_counter() - started:.1f} s"
    )
    draw = random.Random(0)
    params = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "ignore_eos": True}
    params["repetition_penalty"] = args.repetition_penalty
    next_id, steps = 0, list[float]()
    if not args.no_freeze:
        freeze_objects()
    collections = Collections()
    for count, repeat in itertools.product(args.requests, range(args.repeat + 1)):
        requests = []
        for _ in range(count if repeat else min(count, 4)):
            prompt = [draw.randrange(config.spec.vocab_size) for _ in range(args.input.draw(draw))]
            output = args.output.draw(draw) if repeat else 8
            requests.append(EngineRequest(next_id, prompt, SamplingParams(max_tokens=output, **params)))
            next_id += 1
        result = run(core, requests)
        if repeat == 0:
            continue
        rate = result.tokens / result.seconds
        line = f"{count} requests, run {repeat}: {result.tokens} tokens in {result.seconds:.2f} s"
        line += f" = {rate:,.0f} tok/s, all first tokens after {result.first_s * 1e3:.0f} ms"
        steps += result.decode_s
        if result.decode_s:
            step, host = statistics.median(result.decode_s), statistics.median(result.host_s)
            line += f", decode step {step * 1e3:.3f} ms (host {host * 1e3:.3f} ms)"
        print(line, flush=True)
    core.kv.check()
    if steps:
        print(summary(steps, collections))


if __name__ == "__main__":
    main()
