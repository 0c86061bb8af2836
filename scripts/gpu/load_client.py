"""vLLM's own load client, `vllm bench serve`, imported once and run as often as asked, in several processes.

    PYTHONPATH=VLLM_SITE python scripts/gpu/load_client.py < jobs > results

A job is a line of JSON: url, model, tokenizer, input, output, ratio (--random-range-ratio), prompts,
concurrency, clients, seed, log. Its requests are shared evenly by `clients` processes, which begin together:
one process of this client reads some 20,000 tokens a second. A result is a line of JSON, see `combine`; its
times are the client's, its counts of tokens those of each answer's `usage`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import traceback
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

import vllm.benchmarks.serve as client
from vllm.utils.argparse_utils import FlexibleArgumentParser

FORK = multiprocessing.get_context("fork")


def arguments(job: dict[str, Any], part: int) -> list[str]:
    """The command line of one process."""
    share = job["prompts"] // job["clients"]
    return [
        *("--backend", "openai", "--base-url", job["url"], "--model", job["model"]),
        *("--tokenizer", job["tokenizer"], "--dataset-name", "random"),
        *("--random-input-len", str(job["input"]), "--random-output-len", str(job["output"])),
        *("--random-range-ratio", str(job["ratio"]), "--num-prompts", str(share)),
        *("--max-concurrency", str(max(1, job["concurrency"] // job["clients"]))),
        *("--ignore-eos", "--temperature", "0", "--seed", str(1000 * job["seed"] + part)),
        *("--ready-check-timeout-sec", "0", "--num-warmups", "0", "--disable-tqdm", "--save-detailed"),
    ]


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def one_process(job: dict[str, Any], part: int, barrier: Any, reply: Connection) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    asked: list[int] = []
    before = 0.0  # CPU seconds until the load began
    samples, requests = client.get_samples, client.get_request

    def counting(*args: Any, **kwargs: Any) -> Any:
        made = samples(*args, **kwargs)
        asked.extend(sample.expected_output_len for sample in made)
        return made

    async def together(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        nonlocal before
        barrier.wait()
        before = cpu_seconds()
        async for item in requests(*args, **kwargs):
            yield item

    client.get_samples, client.get_request = counting, together
    try:
        parser = FlexibleArgumentParser()
        client.add_cli_args(parser)
        result = asyncio.run(client.main_async(parser.parse_args(arguments(job, part))))
        reply.send({"asked": asked, "cpu": cpu_seconds() - before, "result": result})
    except BaseException:
        barrier.abort()
        reply.send({"error": traceback.format_exc()})


def combine(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """All processes' requests as one load: from the first one's start to the last one's end."""
    errors = [part["error"] for part in parts if "error" in part]
    if errors:
        return {"error": errors[0]}
    results = [part["result"] for part in parts]
    starts = [s for r in results for s in r["start_times"]]
    ttfts = [t for r in results for t in r["ttfts"]]
    waits = [sum(gaps) for r in results for gaps in r["itls"]]
    outputs = [n for r in results for n in r["output_lens"]]
    inputs = [n for r in results for n in r["input_lens"]]
    seconds = max(s + t + w for s, t, w in zip(starts, ttfts, waits, strict=True)) - min(starts)
    tpots = [w / (n - 1) for w, n in zip(waits, outputs, strict=True) if n > 1]
    return {
        "seconds": seconds,
        "tokens": sum(outputs),
        "asked": sum(sum(part["asked"]) for part in parts),
        "failed": sum(len(part["asked"]) for part in parts) - sum(r["completed"] for r in results),
        "tok_s": sum(outputs) / seconds,
        "ttft_ms": 1e3 * statistics.median(ttfts),
        "tpot_ms": 1e3 * statistics.fmean(tpots),
        "own_tok_s": [r["output_throughput"] for r in results],
        "start_spread_ms": 1e3 * (max(min(r["start_times"]) for r in results) - min(starts)),
        "client_cpu": [part["cpu"] / seconds for part in parts],
        "inputs": inputs,
        "outputs": outputs,
        "prompt_lengths": [min(inputs), max(inputs)],
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    barrier = FORK.Barrier(job["clients"])
    started = []
    for part in range(job["clients"]):
        receive, send = FORK.Pipe(duplex=False)
        process = FORK.Process(target=one_process, args=(job, part, barrier, send))
        process.start()
        send.close()
        started.append((process, receive))
    parts = []
    for process, receive in started:
        try:
            parts.append(receive.recv())
        except EOFError:
            parts.append({"error": f"a client process ended: {process.exitcode}"})
        process.join()
    return combine(parts)


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    client.get_tokenizer = functools.cache(client.get_tokenizer)
    for line in sys.stdin:
        job = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            client.get_tokenizer(job["tokenizer"], tokenizer_mode="auto", trust_remote_code=False)
            result = run(job)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
