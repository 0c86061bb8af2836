#!/usr/bin/env python3
"""Measure what a JSON schema costs per token: batches with one and without, in turns.

    python scripts/bench_structured.py [--model MODEL] [--batch 8] [--tokens 96] [--rounds 8] [--text random]
    python scripts/bench_structured.py --model DIR --load-format dummy --batch 64    # on a GPU

Both batches decode the same number of tokens from the same prompts at temperature 1. `--text` is what the
schema's batch writes. "real", the default: JSON as programs write it, with a shop's words in its strings; the
masks are the grammar's, and of each the text's token is all that is left. "random": what the model draws.
Without weights that is noise, which runs into the bounds of the schema's strings, where masks take longest,
and into states of its lexer that no text has. That a schema costs at most 15 % is claimed for "real".

Prints the time of a step that decodes: in each pair of rounds that below which an eighth of the steps are
("fastest": whatever else runs on the machine makes steps slower, never faster), median and mean; the
processor time of all threads; and the mean parts of a step, of which "sample" has the wait for masks, and on
a GPU how long it was idle. Then, of the steps with a schema: how many had to wait for their masks and how
long; what the engine's thread computed itself, as it does for few rows; how long it took until a thread began
the masks of a step, and from then on; how many rows' masks were computed alone, which are those of new rows
and slow ones. The GPU is idle for the part of a wait that it does not hide. The vocabulary and the schema are
compiled in a warm-up, whose time is printed too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from microvllm import InferenceEngine
from microvllm.runtime.core.plan import ScheduledRequest
from microvllm.runtime.grammar.masks import GrammarMasks
from microvllm.runtime.request import SamplingParams, StructuredOutput
from microvllm.runtime.worker.bitmask import Output
from microvllm.runtime.worker.step_times import ALL_PARTS

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


WORDS = (
    "oak chair table lamp bicycle mountain winter jacket blue leather sofa vintage record player garden hose "
    "wooden small large book shelf phone charger kitchen knife running shoes desk mirror carpet guitar"
).split()
KINDS = ("new", "used", "unknown")


def shop(seed: int, lines: int) -> str:
    """JSON that fits `SCHEMA`, but for the number of lines; every other seed's is indented."""
    draw = random.Random(seed)
    words: Callable[[int, int], list[str]] = lambda low, high: draw.sample(WORDS, draw.randint(low, high))  # noqa: E731
    made = [
        {
            "id": 100 + seed + i,
            "name": " ".join(words(1, 5)).capitalize()[:40].strip(),
            "price": round(draw.uniform(1, 900), 2),
            "kind": draw.choice(KINDS),
            "tags": words(0, 4),
        }
        for i in range(lines)
    ]
    return json.dumps(made, indent=2 if seed % 2 else None)


def tokens_of(encode: Callable[[str], list[int]], seed: int, number: int) -> list[int]:
    """The first tokens of a text of `shop`."""
    lines = 4
    while len(tokens := encode(shop(seed, lines))[:number]) < number:
        lines *= 2
    return tokens


class Replay:
    """Leaves of every mask of `masks` the one token that a text has there; each row has a text."""

    def __init__(self, masks: GrammarMasks, texts: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._texts = texts
        self._only = np.zeros((len(texts), -(-vocab_size // 32)), dtype=np.int32)
        self._last = [0] * len(texts)
        self._bits, self._bits_of = masks.bits, masks.bits_of
        masks.bits, masks.bits_of = self.bits, self.bits_of  # type: ignore[method-assign]

    def bits(
        self, rows: Sequence[int], output: Callable[[int], Output]
    ) -> tuple[list[int], list[np.ndarray]]:
        at, masks = self._bits(rows, output)
        lengths = [len(known) + in_flight for known, in_flight in map(output, at)]
        return at, [self._leave(rows[i], *each) for i, *each in zip(at, lengths, masks, strict=True)]

    def bits_of(self, scheduled: Sequence[ScheduledRequest]) -> tuple[list[int], list[np.ndarray]]:
        at, masks = self._bits_of(scheduled)
        items = [scheduled[i] for i in at]
        return at, [
            self._leave(item.request.row, item.start + item.num_new - item.request.prompt_len, mask)
            for item, mask in zip(items, masks, strict=True)
        ]

    def _leave(self, row: int, length: int, mask: np.ndarray) -> np.ndarray:
        token, only = self._texts[row][length], self._only[row]
        if not int(mask[token // 32]) >> token % 32 & 1:
            raise SystemExit(f"the schema does not allow token {token} of text {row} at {length}")
        only[self._last[row]] = 0
        only.view(np.uint32)[token // 32] = 1 << token % 32
        self._last[row] = token // 32
        return only


@dataclass
class Rounds:
    """Rounds of one kind: ms of a step in each, and the seconds of all their steps."""

    form: StructuredOutput | None
    ms: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    parts: list[float] = field(default_factory=lambda: [0.0] * len(ALL_PARTS))
    processor: float = 0.0
    waits: list[float] = field(default_factory=list)  # ms of each step that waited for masks
    counts: dict[str, float] = field(default_factory=dict)

    def run(self, engine: InferenceEngine, args: argparse.Namespace, seed: int) -> float:
        """The time below which an eighth of the steps that only decode are, in milliseconds."""
        params = SamplingParams(
            max_tokens=args.tokens, seed=seed, structured_outputs=self.form, ignore_eos=True
        )
        prompts = [
            engine.tokenizer.encode(f"List {n + 2} things that I sell, as JSON:") for n in range(args.batch)
        ]
        core, masks = engine.core, engine.core._masks
        for prompt in prompts:
            for request in engine.processor.requests(prompt, params):
                core.add_samples([request])
        times, decoded = [], 0
        while core.has_work():
            before, counts = core.stats().step_seconds, asdict(masks.counts)
            start, processor = time.perf_counter(), time.process_time()
            outputs = core.step()
            now = time.perf_counter(), time.process_time()
            for output in outputs:
                if output.error is not None:
                    raise SystemExit(output.error)
            if len(outputs) < args.batch:
                continue
            decoded += 1
            if decoded > 2:
                times.append(now[0] - start)
                self.processor += now[1] - processor
                for part, (after, then) in enumerate(zip(core.stats().step_seconds, before, strict=True)):
                    self.parts[part] += after - then
                done = {name: value - counts[name] for name, value in asdict(masks.counts).items()}
                self.counts = {name: self.counts.get(name, 0) + value for name, value in done.items()}
                self.waits += [1e3 * done["wait_seconds"]] if done["waits"] else []
        self.times += times
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
    parser.add_argument("--text", choices=("real", "random"), default="real")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of EngineArgs, JSON"
    )
    args = parser.parse_args()
    options: dict[str, Any] = {n: json.loads(v) for n, v in (option.split("=", 1) for option in args.option)}
    options.setdefault("log_step_times", torch.cuda.is_available())
    engine = InferenceEngine(args.model, max_batch_size=args.batch, load_format=args.load_format, **options)
    form = StructuredOutput(kind="json", spec=json.dumps(SCHEMA))
    if args.text == "real":
        texts = [tokens_of(engine.tokenizer.encode, seed, args.tokens) for seed in range(args.batch)]
        Replay(engine.core._masks, texts, engine.config.spec.vocab_size)
    start = time.perf_counter()
    for warm_up in (None, form):
        Rounds(warm_up).run(engine, args, 0)
    print(f"warm-up {time.perf_counter() - start:.1f} s")
    free, schema = Rounds(None), Rounds(form)
    for round_ in range(args.rounds):
        a, b = free.run(engine, args, round_), schema.run(engine, args, round_)
        print(f"free {a:7.3f} ms   schema {b:7.3f} ms   {b / a:.3f}", flush=True)
    report(free, schema, args)


def report(free: Rounds, schema: Rounds, args: argparse.Namespace) -> None:
    kinds = free, schema
    print(f"\n{'ms a step':12}{'free':>10}{'schema':>10}{'ratio':>8}")
    rows = [
        ("fastest", [statistics.median(kind.ms) for kind in kinds]),
        ("median", [1e3 * statistics.median(kind.times) for kind in kinds]),
        ("mean", [1e3 * statistics.fmean(kind.times) for kind in kinds]),
        ("processor", [1e3 * kind.processor / len(kind.times) for kind in kinds]),
    ]
    for name, (a, b) in rows:
        print(f"{name:12}{a:10.3f}{b:10.3f}{b / a:8.3f}")
    for name, *sums in zip(ALL_PARTS, free.parts, schema.parts, strict=False):
        a, b = (1e3 * seconds / len(kind.times) for seconds, kind in zip(sums, kinds, strict=True))
        if a or b:
            print(f"  {name:10}{a:10.3f}{b:10.3f}")
    counts, steps, waits = schema.counts, len(schema.times), schema.waits or [0.0]
    jobs = max(1.0, counts["jobs"])
    print(
        f"\n{len(schema.waits)} of {steps} steps waited for masks ({len(schema.waits) / steps:.0%}): "
        f"{statistics.fmean(waits):.3f} ms each in the mean, {statistics.median(waits):.3f} in the median, "
        f"{max(waits):.3f} at most; {sum(waits) / steps:.3f} ms a step\n"
        f"masks of a step: {1e3 * counts['own_seconds'] / steps:.3f} ms in the engine's thread; in another "
        f"begun after {1e3 * counts['begin_seconds'] / jobs:.3f} ms, there "
        f"{1e3 * counts['job_seconds'] / jobs:.3f} ms later; rows computed alone: {counts['alone']:.0f}"
    )
    ratio = statistics.median(b / a for a, b in zip(free.ms, schema.ms, strict=True))
    print(
        f"\nbatch {args.batch}, {args.text} text: a step takes {statistics.median(free.ms):.3f} ms free and "
        f"{statistics.median(schema.ms):.3f} ms with a JSON schema, ratio {ratio:.3f}; of the means "
        f"{statistics.fmean(schema.times) / statistics.fmean(free.times):.3f}"
    )


if __name__ == "__main__":
    main()
