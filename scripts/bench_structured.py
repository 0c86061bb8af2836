#!/usr/bin/env python3
"""Measure what a JSON schema costs per token: batches with one and without, in turns.

    python scripts/bench_structured.py [--model MODEL] [--batch 8] [--tokens 96] [--rounds 8]

Both batches decode the same number of tokens from the same prompts at temperature 1. Prints the time of a
step that decodes for each, and the ratio of each pair of rounds. The vocabulary and the schema are compiled
in a warm-up, whose time is printed too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from microvllm import InferenceEngine
from microvllm.runtime.request import SamplingParams, StructuredOutput

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


def step_ms(
    engine: InferenceEngine, form: StructuredOutput | None, args: argparse.Namespace, seed: int
) -> float:
    """The time below which an eighth of the steps that only decode are, in milliseconds.

    Whatever else runs on the machine makes steps slower, never faster.
    """
    params = SamplingParams(
        max_tokens=args.tokens, min_tokens=args.tokens, seed=seed, structured_outputs=form, ignore_eos=True
    )
    prompts = [
        engine.tokenizer.encode(f"List {n + 2} things that I sell, as JSON:") for n in range(args.batch)
    ]
    wanted = [request for prompt in prompts for request in engine.processor.requests(prompt, params)]
    core = engine.core
    for request in wanted:
        core.add_samples([request])
    times = []
    while core.has_work():
        start = time.perf_counter()
        outputs = core.step()
        if len(outputs) == args.batch and all(output.error is None for output in outputs):
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.quantiles(times[2:], n=8)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of EngineArgs, JSON"
    )
    args = parser.parse_args()
    options: dict[str, Any] = {n: json.loads(v) for n, v in (option.split("=", 1) for option in args.option)}
    engine = InferenceEngine(args.model, max_batch_size=args.batch, **options)
    form = StructuredOutput(kind="json", spec=json.dumps(SCHEMA))
    start = time.perf_counter()
    for warm_up in (None, form):
        step_ms(engine, warm_up, args, 0)
    print(f"warm-up {time.perf_counter() - start:.1f} s")
    free, constrained = [], []
    for round_ in range(args.rounds):
        free.append(step_ms(engine, None, args, round_))
        constrained.append(step_ms(engine, form, args, round_))
        print(
            f"free {free[-1]:7.3f} ms   schema {constrained[-1]:7.3f} ms   {constrained[-1] / free[-1]:.3f}"
        )
    ratio = statistics.median(b / a for a, b in zip(free, constrained, strict=True))
    print(
        f"batch {args.batch}: a step takes {statistics.median(free):.3f} ms free and "
        f"{statistics.median(constrained):.3f} ms with a JSON schema, ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    main()
