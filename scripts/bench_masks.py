#!/usr/bin/env python3
"""Measure what the host does for grammars in a step, on a pretended GPU: no model, no GPU.

    python scripts/bench_masks.py --model DIR [--batch 64] [--tokens 96] [--step-ms 4.6] [--rounds 3]
                                  [--text random] [--many 16]

The scheduler and the masks are the engine's. The device is a clock: a step takes `--step-ms`, then its tokens
are those of the text, or with `--text random` any that the masks allow; to choose them is not counted. Schema
and text are those of `bench_structured.py`; DIR is a model folder, of which the tokenizer and the number of
logits are read.

`--many` is the number of rows from which on other threads compute the masks: 1 for always.

Prints microseconds of a step, mean, p50 and p99: "host" is all that the engine's thread does, waits for masks
included; "masks" is the time from known tokens to the masks behind them, which a device hides as long as its
step takes longer; "late" is by how much it does not. "engine" and "processor" are processor time, of the
engine's thread and of all, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bench_structured import SCHEMA, tokens_of

from microvllm.runtime.config import EngineArgs, EngineConfig
from microvllm.runtime.core.engine_core import EngineCore
from microvllm.runtime.core.plan import ScheduledRequest, StepPlan, StepResult
from microvllm.runtime.grammar import masks
from microvllm.runtime.grammar.masks import GrammarMasks
from microvllm.runtime.grammar.translate import Specials, translate
from microvllm.runtime.request import EngineRequest, SamplingParams, StructuredOutput
from microvllm.runtime.text.tokenizer import Tokenizer
from microvllm.runtime.worker.step_times import StepClock

PROMPT = [100, 101, 102, 103]


@dataclass
class Step:
    plan: StepPlan
    ends: float  # of its forward pass
    tokens: list[int] | None = None


@dataclass
class Times:
    """Seconds of each step that only decodes."""

    host: list[float] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


class PretendedGPU:
    """A `Runner` whose model takes a fixed time."""

    graph_replays = padded_tokens = 0
    device_clock = None

    def __init__(self, config: EngineConfig, seconds: float, texts: Sequence[Sequence[int]]) -> None:
        """texts: the tokens that each row writes; none for random ones."""
        self.clock = StepClock()
        self.masks = GrammarMasks(config, lambda: None)
        self.times = Times()
        self.uncounted = 0.0  # seconds of the host that stand for the device's
        self.drawn = 0.0  # processor time in them
        self.waited = 0.0
        self._seconds = seconds
        self._texts = texts
        self._free_at = 0.0
        self._known_at = 0.0
        self._draw = random.Random(0)
        self._words = np.empty((config.max_num_seqs, -(-config.spec.vocab_size // 32)), dtype=np.int32)

    def now(self) -> float:
        return time.perf_counter() - self.uncounted

    def launch(self, plan: StepPlan) -> Step:
        for row in plan.released_rows:
            self.masks.clear_row(row)
        for request in plan.admitted:
            self.masks.set_row(request.row, request.source, request.token_ids[request.prompt_len :])
        self._free_at = max(self.now(), self._free_at) + self._seconds
        return Step(plan, self._free_at)

    def finish(self, step: Step) -> Step:
        if step.tokens is not None:
            return step
        at, bits = self.masks.bits_of(step.plan.scheduled)
        words = self._words[: len(step.plan.scheduled)]
        words.fill(-1) if len(at) < len(words) else None
        for i, mask in zip(at, bits, strict=True):
            words[i] = mask
        now = self.now()
        if self._known_at:
            self.times.masks.append(now - self._known_at)
            self.times.late.append(max(0.0, now - step.ends))
        self._free_at = max(self._free_at, now)
        step.ends = max(step.ends, now)
        start, processor = time.perf_counter(), time.thread_time()
        choose = self._read if self._texts else self._choose
        step.tokens = [choose(row, item) for row, item in zip(words, step.plan.scheduled, strict=True)]
        self.drawn += time.thread_time() - processor
        self.uncounted += time.perf_counter() - start
        return step

    def _read(self, words: np.ndarray, item: ScheduledRequest) -> int:
        request = item.request
        token = self._texts[request.row][item.start + item.num_new - request.prompt_len]
        if not int(words[token // 32]) >> token % 32 & 1:
            raise SystemExit(f"the schema does not allow token {token} of text {request.row}")
        return token

    def _choose(self, words: np.ndarray, item: ScheduledRequest) -> int:
        for _ in range(8):
            token = self._draw.randrange(32 * len(words))
            if int(words[token // 32]) >> token % 32 & 1:
                return token
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        return int(allowed[self._draw.randrange(len(allowed))])

    def collect(self, step: Step) -> StepResult:
        self.finish(step)
        start = self.now()
        while (left := step.ends - self.now()) > 0:
            time.sleep(left)
        self._known_at = self.now()
        self.waited += self._known_at - start
        return StepResult([(token,) for token in step.tokens or ()])


def run(core: EngineCore[Step], runner: PretendedGPU, requests: Sequence[EngineRequest]) -> None:
    for request in requests:
        core.add_samples([request])
    decoded = 0
    while core.has_work():
        start, waited = runner.now(), runner.waited
        own, all_ = time.thread_time() - runner.drawn, time.process_time() - runner.drawn
        outputs = core.step()
        if any(output.error for output in outputs):
            raise SystemExit(next(output.error for output in outputs if output.error))
        if len(outputs) == len(requests):
            decoded += 1
        if decoded > 2 and len(outputs) == len(requests):
            runner.times.host.append(runner.now() - start - (runner.waited - waited))
            runner.times.engine.append(time.thread_time() - runner.drawn - own)
            runner.times.processor.append(time.process_time() - runner.drawn - all_)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=4.6)
    parser.add_argument("--text", choices=("real", "random"), default="real")
    parser.add_argument("--many", type=int, default=masks.MANY)
    args = parser.parse_args()
    masks.MANY = args.many
    config = EngineArgs(
        model=args.model, device="cpu", load_format="dummy", max_num_seqs=args.batch, async_scheduling=True
    ).resolve()
    form = StructuredOutput(kind="json", spec=json.dumps(SCHEMA))
    grammar = translate(form, Specials(config.spec.vocab_size, {}))
    params = SamplingParams(max_tokens=args.tokens, structured_outputs=form, ignore_eos=True)
    texts: list[list[int]] = []
    if args.text == "real":
        encode = Tokenizer.load(Path(config.tokenizer_path)).encode
        texts = [tokens_of(encode, seed, args.tokens) for seed in range(args.batch)]
    runner = PretendedGPU(config, args.step_ms / 1e3, texts)
    core = EngineCore(config, runner)

    def requests(first: int) -> list[EngineRequest]:
        return [
            EngineRequest(first + i, [*PROMPT, i], params, None, [], 0, "", grammar=grammar)
            for i in range(args.batch)
        ]

    run(core, runner, requests(0))
    for round_ in range(args.rounds):
        runner.times = Times()
        run(core, runner, requests((round_ + 1) * args.batch))
        report(runner.times)


def report(times: Times) -> None:
    show: Callable[[Sequence[float]], str] = lambda s: (  # noqa: E731
        f"{1e6 * statistics.fmean(s):8.0f}{1e6 * statistics.median(s):8.0f}"
        f"{1e6 * statistics.quantiles(s, n=100)[98]:8.0f}"
    )
    print(f"{'us a step':10}{'mean':>8}{'p50':>8}{'p99':>8}")
    for name in ("host", "masks", "late", "engine", "processor"):
        print(f"{name:10}{show(getattr(times, name))}", flush=True)


if __name__ == "__main__":
    main()
