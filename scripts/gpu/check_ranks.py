#!/usr/bin/env python3
"""Checks a model on two GPUs: its tokens against one GPU's, and what happens when one of two ranks dies.

    python scripts/gpu/check_ranks.py --model DIR [--layers N] [--faults] [--set OPTION=VALUE …]

Weights are random and in float32, so that sums in another order change no token. `--faults` starts the engine
of a server instead, kills a rank under load, and prints after how many seconds requests fail and the engine
is back, and which processes are on the GPUs then. Ends with status 1 if a token differs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.core.engine_core import EngineCore
from microvllm.runtime.errors import EngineDeadError, EngineError
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.parallel.runner import start_runner

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 3},
    "filtered": {"temperature": 0.9, "seed": 4, "top_p": 0.8, "top_k": 20},
    "rules": {"temperature": 0.0, "repetition_penalty": 1.3, "min_tokens": 5, "logit_bias": {7: 4.0}},
    "logprobs": {"temperature": 1.0, "seed": 5, "logprobs": 3, "prompt_logprobs": 2},
}


def requests(vocab: int, count: int, max_tokens: int, **params: Any) -> list[EngineRequest]:
    draw = random.Random(1)
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
    return [
        EngineRequest(i, [draw.randrange(vocab) for _ in range(1 + 7 * i)], sampling) for i in range(count)
    ]


def tokens_of(core: EngineCore[Any], wanted: Sequence[EngineRequest]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {request.request_id: [] for request in wanted}
    for request in wanted:
        core.add(request)
    while core.has_work():
        for output in core.step():
            found[output.request_id] += output.token_ids
    return found


def compare(args: EngineArgs) -> bool:
    found: list[dict[str, dict[int, list[int]]]] = []
    for ranks in (1, 2):
        started = time.perf_counter()
        args.tensor_parallel_size = ranks
        runner = start_runner(args.resolve())
        core = EngineCore(runner.config, runner)
        ready = time.perf_counter()
        vocab = runner.config.spec.vocab_size
        found.append(
            {name: tokens_of(core, requests(vocab, 10, 24, **params)) for name, params in CASES.items()}
        )
        core.kv.check()
        stats = core.stats()
        if ranks > 1:
            kill_one(core, vocab, rank_process())
        print(
            f"{ranks} ranks: ready in {ready - started:.1f} s, tokens in {time.perf_counter() - ready:.1f} s,"
            f" {stats.graph_replays} of {stats.steps} steps as graphs, {stats.preemptions} preemptions",
            flush=True,
        )
        del core, runner
    alike = True
    for name, one in found[0].items():
        differing = [i for i, tokens in one.items() if found[1][name][i] != tokens]
        alike = alike and not differing
        print(f"{name}: {'equal' if not differing else f'DIFFERENT in requests {differing}'}")
    return alike


def kill_one(core: EngineCore[Any], vocab: int, rank: int) -> None:
    """Kill the process of a rank under load, and print what comes of it."""
    for request in requests(vocab, 4, core.config.max_model_len - 64, temperature=0.0):
        core.add(request)
    for _ in range(20):
        core.step()
    started = time.monotonic()
    os.kill(rank, signal.SIGKILL)
    try:
        while core.has_work():
            core.step()
    except EngineError as error:
        print(f"after {time.monotonic() - started:.2f} s: {error}; on the GPUs: {on_gpus()}", flush=True)


def on_gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    listed = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    return subprocess.run(listed, capture_output=True, text=True, check=False).stdout.splitlines()


def rank_process() -> int:
    """The process of rank 1, which this one has started, or its engine process."""

    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            above = parent(int(folder.name)) if folder.name.isdigit() else 0
            if (
                os.getpid() in (above, parent(above))
                and b"parallel.rank_main" in (folder / "cmdline").read_bytes()
            ):
                return int(folder.name)
    raise SystemExit("there is no other rank")


async def fail(args: EngineArgs) -> None:
    args.tensor_parallel_size = 2
    config = args.resolve()
    client = await EngineClient.start(config)
    params = SamplingParams(max_tokens=config.max_model_len - 4, ignore_eos=True)
    for name in ("SIGKILL", "SIGSTOP"):
        streams = [client.submit([5, 70, 200, 31 + i], params)[0] for i in range(8)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        rank = rank_process()
        print(f"on the GPUs: {on_gpus()}; {name} to rank 1, process {rank}", flush=True)
        started = time.monotonic()
        os.kill(rank, getattr(signal, name))
        try:
            async for _ in streams[0]:
                pass
        except EngineDeadError:
            print(f"requests failed after {time.monotonic() - started:.1f} s", flush=True)
        await asyncio.sleep(0.5)
        print(f"on the GPUs half a second later: {on_gpus()}", flush=True)
        while not client.healthy():
            await asyncio.sleep(0.05)
        (delta, *_) = [part async for part in client.submit([1, 2, 3], params.with_max_tokens(2))[0]]
        print(f"served again after {time.monotonic() - started:.1f} s: {delta.token_ids}", flush=True)
    await client.close()
    print(f"on the GPUs at the end: {on_gpus()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, help="of the model's")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="fields of EngineArgs")
    args = parser.parse_args()
    options: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 512}
    for each in args.set:
        name, _, value = each.partition("=")
        options[name] = int(value) if value.isdigit() else {"true": True}.get(value, value)
    if args.layers is not None:
        options["hf_overrides"] = {"num_hidden_layers": args.layers}
    engine = EngineArgs(model=args.model, load_format="dummy", **{"dtype": "float32", **options})
    if args.faults:
        asyncio.run(fail(engine))
    elif not compare(engine):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
