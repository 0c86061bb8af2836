"""Checks that an engine takes no more of a GPU than --gpu-memory-utilization allows.

    python scripts/gpu/check_memory.py --model DIR --load-format dummy [--utilization 0.3 0.92]

One engine after the other, on a GPU that is otherwise empty. Prints how the start divides the memory, what is
in use after it, and at most while prompts of all lengths, sampled and with penalties, fill every row. Exit
status: 1 if that was more than allowed.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time

import torch

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.core.engine_core import EngineCore
from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.gpu_memory import memory_in_use
from microvllm.runtime.worker.model_runner import LaunchedStep, ModelGraphRunner

GIB = 1 << 30
MAX_TOKENS = 24


def print_notes(what: str, done: int, total: int, note: str = "", /) -> None:
    if note:
        print(f"  {what}: {note}", flush=True)


def load(core: EngineCore[LaunchedStep], seed: int) -> int:
    """Serve prompts of all lengths -> the most bytes in use behind a step."""
    draw, config = random.Random(seed), core.config
    for i in range(2 * config.max_num_seqs):
        longest = min(config.max_model_len - MAX_TOKENS, 2 * config.max_num_batched_tokens)
        length = min(longest, draw.choice([20, 300, 3000, longest]))
        prompt = [draw.randrange(config.spec.vocab_size)] * length
        params = SamplingParams(
            temperature=draw.choice([0.0, 1.0]),
            top_p=draw.choice([1.0, 0.9]),
            presence_penalty=draw.choice([0.0, 0.5]),
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
        )
        refused = core.add(EngineRequest(i, prompt, params, cache_salt=str(i)))
        if refused is not None:
            raise SystemExit(f"a request was refused: {refused.error}")
    most, until = 0, time.monotonic() + 20
    while core.has_work() and time.monotonic() < until:
        core.step()
        most = max(most, memory_in_use("cuda"))
    return most


def check(args: argparse.Namespace, utilization: float, options: dict[str, object]) -> bool:
    _, total = torch.cuda.mem_get_info()
    print(f"utilization {utilization}:", flush=True)
    started = time.perf_counter()
    config = EngineArgs(
        model=args.model, load_format=args.load_format, gpu_memory_utilization=utilization, **options
    ).resolve()
    runner = ModelGraphRunner(config, print_notes)
    core = EngineCore(runner.config, runner)
    seconds, after = time.perf_counter() - started, memory_in_use("cuda")
    most, allowed = load(core, 0), int(total * utilization)
    print(
        f"  ready in {seconds:.1f} s; context {runner.config.max_model_len}; in use after the start "
        f"{after / GIB:.2f}, at most {most / GIB:.2f} GiB, of which torch holds "
        f"{torch.cuda.memory_reserved() / GIB:.2f}; allowed {allowed / GIB:.2f} of {total / GIB:.2f}",
        flush=True,
    )
    del core, runner
    gc.collect()
    torch.cuda.empty_cache()
    return max(most, after) <= allowed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--utilization", type=float, nargs="+", default=[0.3, 0.92])
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    args = parser.parse_args()
    options = {"max_model_len": args.max_model_len, "max_num_seqs": args.max_num_seqs}
    kept = [check(args, utilization, options) for utilization in args.utilization]
    return int(not all(kept))


if __name__ == "__main__":
    sys.exit(main())
