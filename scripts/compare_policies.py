#!/usr/bin/env python3
"""Measures the three scheduling policies on one workload: what `sjf` aligns, what it costs and what it gives.

    python scripts/compare_policies.py                            # the demo model, a few minutes on two cores
    python scripts/compare_policies.py --plots policies           # and plots, as PNG and SVG, in a folder
    python scripts/compare_policies.py --model DIR --load-format dummy --requests 12

First the alignment: requests of 50, 52, 55, 60 and 100 tokens under `sjf` and under `fcfs`, their lengths and
the batch size of every step. Then a workload of mixed lengths, some of it urgent, through the engine's core
without a server: once with all requests at once, for the throughput, and once with random arrivals at a
share of the rate that `fcfs` sustained, for latencies. The policies take turns, and medians over the rounds
are printed as a Markdown table.

Padding is the share of the decoding requests' keys and values that would be padding if a kernel wanted equal
lengths: what alignment saves there. The attention here takes lengths as they are and computes none of it.
Slowdown is a request's latency over what it takes alone on an idle engine (its prompt and its answer at
rates that are measured first); fairness is Jain's index of all slowdowns, (sum x)^2 / (n sum x^2): 1 when all
requests are slowed down alike, 1/n when one bears it all. The longest wait is that for any token, the first
one from the arrival on.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.core.engine_core import EngineCore
from microvllm.runtime.core.plan import StepPlan
from microvllm.runtime.core.policies import MAX_PASSED_OVER, POLICIES
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.model_runner import LaunchedStep, ModelGraphRunner

ALIGNED_LENGTHS, ALIGNED_OUTPUT = (50, 52, 55, 60, 100), 60
SHORT_SHARE, URGENT_SHARE = 0.75, 0.2
SHORT, LONG = ((16, 64), (16, 48)), ((200, 400), (64, 128))  # tokens of the prompt, and of the answer
URGENT, ORDINARY = 0, 1
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Job:
    prompt: list[int]
    max_tokens: int
    priority: int
    gap: float  # to the arrival before, in units of the mean gap


def workload(count: int, vocab: int, seed: int) -> list[Job]:
    draw = random.Random(seed)
    jobs = []
    for _ in range(count):
        prompt, answer = SHORT if draw.random() < SHORT_SHARE else LONG
        urgent = draw.random() < URGENT_SHARE
        tokens = [draw.randrange(vocab) for _ in range(draw.randint(*prompt))]
        jobs.append(Job(tokens, draw.randint(*answer), URGENT if urgent else ORDINARY, draw.expovariate(1.0)))
    return jobs


def describe(jobs: Sequence[Job], seed: int) -> str:
    prompts, outputs = sum(len(job.prompt) for job in jobs), sum(job.max_tokens for job in jobs)
    urgent = sum(job.priority == URGENT for job in jobs)
    return (
        f"{len(jobs)} requests, {SHORT_SHARE:.0%} of them short (prompts of {span(SHORT[0])} tokens, answers "
        f"of {span(SHORT[1])}), the others long ({span(LONG[0])}, {span(LONG[1])}); {prompts:,} prompt and "
        f"{outputs:,} output tokens in all; {urgent} are urgent; seed {seed}"
    )


def span(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]} to {bounds[1]}"


# ---- running ---------------------------------------------------------------------------------------


class Recorder:
    """A runner in front of the engine's own that keeps the plans."""

    def __init__(self, runner: ModelGraphRunner) -> None:
        self._runner = runner
        self.plans: list[StepPlan] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        self.plans.append(plan)
        return self._runner.launch(plan)


@dataclass
class Run:
    """Times in seconds since the run began; by index of the job."""

    arrivals: list[float]
    times: list[list[float]]  # of every token
    tokens: list[list[int]]
    batches: list[int] = field(default_factory=list)  # requests in each step
    decodes: list[list[int]] = field(default_factory=list)  # lengths of those that decode, of each step

    @property
    def seconds(self) -> float:
        return max(times[-1] for times in self.times)

    @property
    def first(self) -> list[float]:
        return [times[0] - arrival for times, arrival in zip(self.times, self.arrivals, strict=True)]

    @property
    def latency(self) -> list[float]:
        return [times[-1] - arrival for times, arrival in zip(self.times, self.arrivals, strict=True)]

    @property
    def padding(self) -> float:
        """Share of a decode batch, padded to its longest, that would be padding."""
        padded = sum(len(lengths) * max(lengths, default=0) for lengths in self.decodes)
        return 1 - sum(map(sum, self.decodes)) / padded if padded else 0.0

    @property
    def longest_wait(self) -> float:
        return max(
            later - earlier
            for arrival, times in zip(self.arrivals, self.times, strict=True)
            for earlier, later in zip([arrival, *times], times, strict=False)
        )


class Engine:
    """One policy's engine. Prefixes are not cached, so that every run computes the same."""

    def __init__(self, options: dict[str, Any], policy: str, clock: Callable[[], float]) -> None:
        config = EngineArgs(
            **options, scheduling_policy=policy, enable_prefix_caching=False, generation_config="vllm"
        ).resolve()
        runner = ModelGraphRunner(config)
        self.vocab = config.spec.vocab_size
        self.recorder = Recorder(runner)
        self.core: EngineCore[LaunchedStep] = EngineCore(runner.config, self.recorder)  # type: ignore[arg-type]
        self._next_id = 0
        self._clock = clock

    def run(self, jobs: Sequence[Job], mean_gap: float = 0.0) -> Run:
        """Without a gap all arrive at once. Time in which there is nothing to do is not spent but skipped."""
        arrivals, at = [], 0.0
        for job in jobs:
            at += job.gap * mean_gap
            arrivals.append(at)
        result = Run(arrivals, [[] for _ in jobs], [[] for _ in jobs])
        first_id, added = self._next_id, 0
        self._next_id += len(jobs)
        self.recorder.plans.clear()
        started = self._clock()
        while added < len(jobs) or self.core.has_work():
            now = self._clock() - started
            while added < len(jobs) and arrivals[added] <= now:
                job = jobs[added]
                params = SamplingParams(max_tokens=job.max_tokens, temperature=0.0, ignore_eos=True)
                request = EngineRequest(first_id + added, job.prompt, params, priority=job.priority)
                refused = self.core.add(request)
                if refused is not None:
                    raise SystemExit(f"a request was refused: {refused.error}")
                added += 1
            if not self.core.has_work():
                started -= max(0.0, arrivals[added] - now)
                continue
            outputs = self.core.step()
            now = self._clock() - started
            for output in outputs:
                result.times[output.request_id - first_id] += [now] * len(output.token_ids)
                result.tokens[output.request_id - first_id] += output.token_ids
        self.core.kv.check()
        plans = [plan.scheduled for plan in self.recorder.plans]
        result.batches = [len(plan) for plan in plans]
        result.decodes = [[item.start + 1 for item in plan if item.num_new == 1] for plan in plans]
        return result


@dataclass(frozen=True)
class Alone:
    """Seconds per token, measured on an idle engine."""

    prompt: float
    output: float

    @classmethod
    def measure(cls, engine: Engine) -> Alone:
        """Also the warm-up: the first run of all is not counted."""
        prompt, output = Job([5] * 256, 1, ORDINARY, 0), Job([5] * 16, 33, ORDINARY, 0)
        engine.run([prompt])
        first = min(engine.run([prompt]).first[0] for _ in range(3))
        times = engine.run([output]).times[0]
        return cls(first / 256, (times[-1] - times[0]) / 32)

    def latency(self, job: Job) -> float:
        return len(job.prompt) * self.prompt + job.max_tokens * self.output


# ---- the alignment ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trajectory:
    """Of each step after the prompts: the length of every request after it, and who had a turn."""

    lengths: list[list[int]]
    turns: list[list[bool]]

    @classmethod
    def record(cls, engine: Engine) -> Trajectory:
        jobs = [Job([7] * (length - 1), ALIGNED_OUTPUT, ORDINARY, 0) for length in ALIGNED_LENGTHS]
        first_id = engine._next_id
        engine.run(jobs)
        lengths, turns = [list(ALIGNED_LENGTHS)], []
        for plan in engine.recorder.plans[1:]:
            there = {item.request.id - first_id for item in plan.scheduled}
            turns.append([i in there for i in range(len(jobs))])
            lengths.append([length + turn for length, turn in zip(lengths[-1], turns[-1], strict=True)])
        return cls(lengths, turns)

    def as_text(self, steps: int) -> str:
        lines = ["step  lengths; * had a turn           batch"]
        for step, (before, turn) in enumerate(zip(self.lengths, self.turns, strict=False)):
            if step == steps:
                break
            shown = "".join(
                f"{length}{'*' if had else ' '}".rjust(6) for length, had in zip(before, turn, strict=True)
            )
            lines.append(f"{step:4d}{shown}   {'#' * sum(turn)}")
        return "\n".join(lines)


# ---- figures ---------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-round(share * 100 * len(ordered)) // 100) - 1)]


def fairness(values: Sequence[float]) -> float:
    """Jain's index (Jain, Chiu and Hawe, 1984)."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def figures(jobs: Sequence[Job], burst: Run, open_loop: Run, alone: Alone) -> dict[str, float]:
    urgent = [first for first, job in zip(open_loop.first, jobs, strict=True) if job.priority == URGENT]
    slowdowns = [latency / alone.latency(job) for latency, job in zip(open_loop.latency, jobs, strict=True)]
    return {
        "tokens/s, all at once": sum(map(len, burst.tokens)) / burst.seconds,
        "requests a step": sum(burst.batches) / len(burst.batches),
        "padding": burst.padding,
        "TTFT p50": 1e3 * percentile(open_loop.first, 0.5),
        "TTFT p99": 1e3 * percentile(open_loop.first, 0.99),
        "TTFT p99, urgent": 1e3 * percentile(urgent, 0.99) if urgent else float("nan"),
        "latency p50": 1e3 * percentile(open_loop.latency, 0.5),
        "latency p99": 1e3 * percentile(open_loop.latency, 0.99),
        "longest wait": 1e3 * open_loop.longest_wait,
        "slowdown, mean": sum(slowdowns) / len(slowdowns),
        "fairness": fairness(slowdowns),
    }


FORMATS = {
    "tokens/s, all at once": "{:.0f}",
    "requests a step": "{:.1f}",
    "padding": "{:.0%}",
    "fairness": "{:.2f}",
    "slowdown, mean": "{:.1f}",
}


def table(rows: dict[str, list[dict[str, float]]], same: dict[str, int], count: int) -> str:
    names = list(next(iter(rows.values()))[0])
    lines = [f"| policy | {' | '.join(names)} | same tokens |", "|---" * (len(names) + 2) + "|"]
    for policy, rounds in rows.items():
        cells = [
            FORMATS.get(name, "{:.0f} ms").format(median(each[name] for each in rounds)) for name in names
        ]
        lines.append(f"| {policy} | {' | '.join(cells)} | {same[policy]} of {count} |")
    return "\n".join(lines)


def draw(folder: Path, trajectories: dict[str, Trajectory], runs: dict[str, tuple[Run, Run]]) -> list[Path]:
    """Write the plots. Raises `ImportError` without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, grid = pyplot.subplots(
        2, len(trajectories), figsize=(11, 6), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    for column, (policy, trajectory) in enumerate(trajectories.items()):
        above, below = grid[0][column], grid[1][column]
        for request, start in enumerate(ALIGNED_LENGTHS):
            end = next(
                i
                for i, each in enumerate(trajectory.lengths)
                if each[request] == trajectory.lengths[-1][request]
            )
            above.plot([each[request] for each in trajectory.lengths[: end + 1]], label=f"begins at {start}")
        above.set(title=policy, ylabel="length in tokens")
        above.legend()
        below.bar(range(len(trajectory.turns)), [sum(turn) for turn in trajectory.turns], width=1.0)
        below.set(xlabel="step", ylabel="requests")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    pictures = {"alignment": figure}
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for policy, (burst, open_loop) in runs.items():
        left.plot(burst.batches, label=policy, alpha=0.8)
        for axes, values in ((middle, open_loop.first), (right, open_loop.latency)):
            axes.step(
                sorted(values),
                [(i + 1) / len(values) for i in range(len(values))],
                label=policy,
                where="post",
            )
    left.set(title="all at once", xlabel="step", ylabel="requests in the step")
    middle.set(title="random arrivals", xlabel="time to first token, s", ylabel="share of the requests")
    right.set(title="random arrivals", xlabel="latency, s", ylabel="share of the requests")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend()
    pictures["policies"] = figure
    written = []
    for name, figure in pictures.items():
        for ending in ("png", "svg"):
            written.append(folder / f"{name}.{ending}")
            figure.savefig(written[-1], dpi=150)
        pyplot.close(figure)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--max-num-seqs", type=int, default=8, help="few, so that there is a queue to order")
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: CPU seconds of this process, on one thread: for a machine that others use too",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.7, help="arrivals, as a share of what fcfs sustained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write plots there (needs matplotlib)")
    args = parser.parse_args(arguments)
    if min(args.requests, args.rounds, args.max_num_seqs) < 1 or args.load <= 0:
        parser.error("--requests, --rounds and --max-num-seqs must be at least 1, and --load above 0")

    options = {
        "model": args.model,
        "load_format": args.load_format,
        "device": args.device,
        "max_model_len": 512,
        "num_gpu_blocks_override": 1024,
        "max_num_seqs": args.max_num_seqs,
        "cpu_threads": 1 if args.clock == "cpu" else None,
    }
    rows: dict[str, list[dict[str, float]]] = {policy: [] for policy in POLICIES}
    runs: dict[str, tuple[Run, Run]] = {}
    trajectories: dict[str, Trajectory] = {}
    same = dict.fromkeys(POLICIES, 0)
    jobs: list[Job] = []
    gap, alone = 0.0, Alone(0.0, 0.0)
    names = list(POLICIES)
    for number in range(args.rounds):
        first = number % len(names)  # each begins a round in its turn; fcfs the first, which sets the rate
        for policy in names[first:] + names[:first]:
            try:
                engine = Engine(options, policy, CLOCKS[args.clock])
            except ConfigError as error:
                print(error, file=sys.stderr)
                return 2
            jobs = jobs or workload(args.requests, engine.vocab, args.seed)
            measured = Alone.measure(engine)
            alone = alone if gap else measured
            burst = engine.run(jobs)
            gap = gap or burst.seconds / len(jobs) / args.load
            open_loop = engine.run(jobs, gap)
            runs[policy] = burst, open_loop
            rows[policy].append(figures(jobs, burst, open_loop, alone))
            if policy != "priority" and policy not in trajectories:
                trajectories[policy] = Trajectory.record(engine)
            print(f"round {number + 1}, {policy}: done", file=sys.stderr, flush=True)
    for policy, (burst, _) in runs.items():
        same[policy] = sum(a == b for a, b in zip(burst.tokens, runs["fcfs"][0].tokens, strict=True))

    trajectories = dict(sorted(trajectories.items(), reverse=True))
    written: list[Path] = []
    if args.plots is not None:
        try:
            written = draw(args.plots, trajectories, runs)
        except ImportError as error:
            print(f"no plots ({error}): pip install 'microvllm[bench]', or matplotlib", file=sys.stderr)
    if not written:
        for policy, trajectory in trajectories.items():
            print(f"{policy}:\n\n```\n{trajectory.as_text(30)}\n```\n")
    print(
        f"{args.model} ({args.device}): {describe(jobs, args.seed)}. All at once, and then at {1 / gap:.2f} "
        f"requests/s, {args.load:.0%} of what fcfs sustained. Medians of {args.rounds} rounds, "
        f"{args.clock} time. {args.max_num_seqs} requests run at once; `sjf` passes one over "
        f"{MAX_PASSED_OVER} times in a row at most.\n\n{table(rows, same, len(jobs))}"
    )
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
