#!/usr/bin/env python3
"""Measure what a JSON schema costs per token: batches with one and without, in turns.

    python scripts/bench_structured.py [--model MODEL] [--batch 8] [--tokens 96] [--rounds 8]
    python scripts/bench_structured.py --model DIR --load-format dummy --batch 64    # on a GPU

Both batches decode the same number of tokens from the same prompts at temperature 1. Prints the time of a
step that decodes for each, and the ratio of each pair of rounds; then the mean parts of a step, of which
"sample" has the wait for masks, and on a GPU how long it was idle. Random text, as of a model without
weights, runs into the bounds of the schema's strings, where masks take longest: the mean shows that, the
fastest steps do not. The vocabulary and the schema are compiled in a warm-up, whose time is printed too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from microvllm import InferenceEngine
from microvllm.runtime.request import SamplingParams, StructuredOutput
from microvllm.runtime.worker.step_times import ALL_PARTS, PARTS

LINE = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "name": {"type": "string", "maxLength": 40},
        "price": {"type": "number"},
        "kind": {"enum": ["new", "used", "unknown"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
    },
    "required": ["id", "name", "price", "kind", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": LINE, "minItems": 1000}


@dataclass
class Rounds:
    """Rounds of one kind: ms of a step in each, and the seconds of all their steps by part."""

    form: StructuredOutput | None
    ms: list[float] = field(default_factory=list)
    parts: list[float] = field(default_factory=lambda: [0.0] * len(ALL_PARTS))
    steps: int = 0

    def run(self, engine: InferenceEngine, args: argparse.Namespace, seed: int) -> float:
        """The time below which an eighth of the steps that only decode are, in milliseconds.

        Whatever else runs on the machine makes steps slower, never faster.
        """
        params = SamplingParams(
            max_tokens=args.tokens, seed=seed, structured_outputs=self.form, ignore_eos=True
        )
        prompts = [
            engine.tokenizer.encode(f"List {n + 2} things that I sell, as JSON:") for n in range(args.batch)
        ]
        core = engine.core
        for prompt in prompts:
            for request in engine.processor.requests(prompt, params):
                core.add_samples([request])
        times, decoded = [], 0
        while core.has_work():
            before, start = core.stats().step_seconds, time.perf_counter()
            outputs = core.step()
            if len(outputs) == args.batch and all(output.error is None for output in outputs):
                decoded += 1
                if decoded > 2:
                    times.append(time.perf_counter() - start)
                    seconds = zip(core.stats().step_seconds, before, strict=True)
                    for part, (now, then) in enumerate(seconds):
                        self.parts[part] += now - then
        self.steps += len(times)
        self.ms.append(1e3 * statistics.quantiles(times, n=8)[0])
        return self.ms[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of EngineArgs, JSON"
    )
    args = parser.parse_args()
    options: dict[str, Any] = {n: json.loads(v) for n, v in (option.split("=", 1) for option in args.option)}
    options.setdefault("log_step_times", torch.cuda.is_available())
    engine = InferenceEngine(args.model, max_batch_size=args.batch, load_format=args.load_format, **options)
    form = StructuredOutput(kind="json", spec=json.dumps(SCHEMA))
    start = time.perf_counter()
    for warm_up in (None, form):
        Rounds(warm_up).run(engine, args, 0)
    print(f"warm-up {time.perf_counter() - start:.1f} s")
    free, schema = Rounds(None), Rounds(form)
    for round_ in range(args.rounds):
        a, b = free.run(engine, args, round_), schema.run(engine, args, round_)
        print(f"free {a:7.3f} ms   schema {b:7.3f} ms   {b / a:.3f}", flush=True)
    print(f"\n{'ms a step':12}{'free':>10}{'schema':>10}")
    for name, a, b in zip(ALL_PARTS, free.parts, schema.parts, strict=True):
        if a or b:
            print(f"{name:12}{1e3 * a / free.steps:10.3f}{1e3 * b / schema.steps:10.3f}")
    mean = [1e3 * sum(kind.parts[: len(PARTS)]) / kind.steps for kind in (free, schema)]
    print(f"{'mean':12}{mean[0]:10.3f}{mean[1]:10.3f}   {mean[1] / mean[0]:.3f}")
    ratio = statistics.median(b / a for a, b in zip(free.ms, schema.ms, strict=True))
    print(
        f"\nbatch {args.batch}: a step takes {statistics.median(free.ms):.3f} ms free and "
        f"{statistics.median(schema.ms):.3f} ms with a JSON schema, ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    main()
