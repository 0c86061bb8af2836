"""Shows where the time of a decode step goes on a GPU: the host's parts, kernels by name, and gaps.

The GPU is idle between the last work of a step, which brings its tokens to the host, and the first kernel of
the next: then it waits for the host. That is meant both in the table of `--log-step-times`, which comes first
and has it from events, and in the profile. Gaps between the kernels of a step are counted separately.

python scripts/gpu/profile_decode.py --model DIR --load-format dummy --batch 1 64 --context 600
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.core.engine_core import EngineCore
from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.model_runner import LaunchedStep, ModelGraphRunner

STEPS = 30


def decode_steps(core: EngineCore[LaunchedStep], steps: int) -> float:
    """Mean seconds of a step."""
    started = time.perf_counter()
    for _ in range(steps):
        core.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def report(core: EngineCore[LaunchedStep], batch: int, context: int, first_id: int) -> None:
    draw, vocab = random.Random(0), core.config.spec.vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=8 * STEPS, ignore_eos=True)
    for i in range(batch):
        core.add(EngineRequest(first_id + i, [draw.randrange(vocab) for _ in range(context)], params))
    while any(request.num_output < 2 for request in core.scheduler._running) or core.scheduler.num_waiting:
        core.step()
    if core.report is not None:
        core.report.write()  # of the prompts
    plain = decode_steps(core, STEPS)
    if core.report is not None:
        core.report.write()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        decode_steps(core, STEPS)
    events = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in recorded.events()
        if e.device_type.name == "CUDA"
    )
    busy: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    between, inside, begin, end = 0.0, 0.0, events[0][0], events[0][0]
    after_step = False
    for start, stop, name in events:
        busy[name][0] += 1
        busy[name][1] += stop - max(start, end) if stop > end else 0.0
        if name.startswith("Memcpy HtoD"):
            continue  # the inputs of the next step: until its first kernel the GPU is idle
        if after_step:
            between += max(0.0, start - end)
        else:
            inside += max(0.0, start - end)
        # A replayed step ends with the kernel that writes its tokens to the host's memory.
        end, after_step = max(end, stop), name.startswith(("Memcpy DtoH", "filter_kernel"))
    total = end - begin
    print(
        f"\nbatch {batch}, context {context}: {plain * 1e3:.3f} ms a step; idle in the profile: "
        f"{between / STEPS:.1f} us between steps ({between / total:.2%}), {inside / STEPS:.1f} us inside"
    )
    for name, (count, time_us) in sorted(busy.items(), key=lambda kv: -kv[1][1])[:14]:
        print(
            f"  {time_us / STEPS:9.1f} us {count / STEPS:6.1f} x {time_us / count:8.2f} us each  {name[:80]}"
        )
    for i in range(batch):
        core.abort(first_id + i)
    while core.has_work():
        core.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--max-model-len", type=int, default=2048)
    args = parser.parse_args()
    config = EngineArgs(
        model=args.model,
        load_format=args.load_format,
        max_model_len=args.max_model_len,
        max_num_seqs=max(args.batch),
        enable_prefix_caching=False,
        log_step_times=True,
    ).resolve()
    runner = ModelGraphRunner(config)
    core = EngineCore(runner.config, runner)
    for index, batch in enumerate(args.batch):
        report(core, batch, args.context, 100_000 * (index + 1))


if __name__ == "__main__":
    main()
