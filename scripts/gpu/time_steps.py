"""Times whole decode steps under different sampling parameters, in turns, in one engine; then prompts alone.

    python scripts/gpu/time_steps.py --model DIR --load-format dummy [--batch 1 35 256] [--prompts 2000 8x250]

Prints for each batch and each kind of request the milliseconds of a step, and for prompts (number x length)
those until all have their first token: the least and the median of the passes. Random weights give flat
distributions, which is the worst case for top-p alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import torch

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.core.engine_core import EngineCore
from microvllm.runtime.machine import freeze_objects
from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.gpu_memory import memory_in_use
from microvllm.runtime.worker.model_runner import LaunchedStep, ModelGraphRunner

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "top-k 20, top-p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top-p 0.5": {"temperature": 1.0, "top_p": 0.5},
    "the same, repetition 1.05": {
        **{"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    },
    "presence and frequency": {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "bias of 5 tokens": {"temperature": 0.0, "logit_bias": dict.fromkeys(range(5), 1.0)},
}


def time_pass(core: EngineCore[LaunchedStep], ids: range, context: int, steps: int, kind: str) -> float:
    """Milliseconds of a step, once all requests decode."""
    draw, vocab = random.Random(ids.start), core.config.spec.vocab_size
    params = SamplingParams(max_tokens=steps + 64, ignore_eos=True, **KINDS[kind])
    for i in ids:
        core.add(EngineRequest(i, [draw.randrange(vocab) for _ in range(context)], params))
    while core.scheduler.num_waiting or any(r.num_output < 2 for r in core.scheduler._running):
        core.step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        core.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    for i in ids:
        core.abort(i)
    while core.has_work():
        core.step()
    return seconds / steps * 1e3


def print_notes(what: str, done: int, total: int, note: str = "", /) -> None:
    if note:
        print(f"{what}: {note}", flush=True)


def time_prompts(core: EngineCore[LaunchedStep], ids: range, length: int) -> float:
    """Milliseconds until all of these prompts have their first token."""
    draw, vocab = random.Random(ids.start), core.config.spec.vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    requests = [EngineRequest(i, [draw.randrange(vocab) for _ in range(length)], params) for i in ids]
    started = time.perf_counter()
    for request in requests:
        core.add(request)
    while core.has_work():
        core.step()
    return (time.perf_counter() - started) * 1e3


def prompts(text: str) -> tuple[int, int]:
    count, _, length = text.rpartition("x")
    return int(count or 1), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 35, 256])
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--prompts", type=prompts, nargs="*", default=[], metavar="NxLENGTH")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    config = EngineArgs(
        model=args.model,
        load_format=args.load_format,
        max_model_len=max([2048, *(length + 16 for _, length in args.prompts)]),
        max_num_seqs=max(args.batch, default=256),
        enable_prefix_caching=False,
    ).resolve()
    runner = ModelGraphRunner(config, print_notes)
    core = EngineCore(runner.config, runner)
    freeze_objects()
    print(f"in use after the start: {memory_in_use('cuda') / 2**30:.2f} GiB", flush=True)
    first = 0
    for batch in args.batch:
        times: dict[str, list[float]] = {kind: [] for kind in args.kinds}
        for _ in range(args.passes):
            for kind in args.kinds:
                ids, first = range(first, first + batch), first + batch
                times[kind].append(time_pass(core, ids, args.context, args.steps, kind))
        for kind, found in times.items():
            print(f"batch {batch:3} {min(found):8.3f} {statistics.median(found):8.3f} ms  {kind}", flush=True)
    for count, length in args.prompts:
        found = []
        for _ in range(args.passes + 1):
            ids, first = range(first, first + count), first + count
            found.append(time_prompts(core, ids, length))
        print(
            f"{count:3} prompts of {length:5} {min(found[1:]):8.3f} {statistics.median(found[1:]):8.3f} ms",
            flush=True,
        )
    print(f"in use at the end: {memory_in_use('cuda') / 2**30:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
