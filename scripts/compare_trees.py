#!/usr/bin/env python3
"""Compare the CPU speed of two checkouts of this repository, and of llama.cpp, in turns on this machine.

    git worktree add ../old COMMIT
    python scripts/compare_trees.py ../old . [--model smollm2-135m-instruct] [--minutes 5]
    taskset -c 0,1 python scripts/compare_trees.py ../old . --llama-bench LLAMA/llama-batched-bench

Prints one Markdown table: decode attention alone and the matrix products of SmolLM2-135M, by number of tokens
and of rows, a decode step by number of requests, a prompt up to its first token, and what a decode step takes
for each token of context; bfloat16 and as the file has it. Every checkout has a process of its own, which
waits while another is measured; each round measures everything once, A B A B. Milliseconds are the least of
all rounds, ratios medians over rounds.
llama.cpp runs `llama-batched-bench` in the first round, on the same file and on a copy in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

ROWS = (1, 2, 8, 16, 32, 64, 1024)
STREAMS = (1, 8, 35)
PROMPTS = (1000, 2000, 4000, 7900)
FORMATS = {"bf16": {"dtype": "bfloat16", "gguf_weights": "dequantized"}, "file": {}}
HIDDEN, INNER, QKV, LAYERS = 576, 1536, 960, 30
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
Q4_1 = 3  # ggml's number of the format
STEPS, STEPS_BEHIND_PROMPT, SHORT = 40, 12, 64
LONGEST = 4000  # prompt of llama.cpp
MIN_S = 0.08  # that the products of some rows, or attention, are repeated for
BLOCK = 16

Case = tuple[str, str, int]  # what, weights, number


# ---- one checkout, in a process of its own --------------------------------------------------------------


class Tree:
    """Measures the checkout that is imported as `microvllm`; uses only what every commit has."""

    def __init__(self, model: str, threads: int, clock: Callable[[], float]) -> None:
        self.model, self.threads, self.clock = model, threads, clock
        self.engines: dict[str, Any] = {}
        self.products: dict[str, Callable[[int], float]] = {}

    def run(self, case: Case) -> dict[str, float]:
        """Milliseconds by name of the row."""
        what, weights, number = case
        if what == "products":
            if weights not in self.products:
                self.products[weights] = self._products(weights)
            return {f"products, {number} rows": self.products[weights](number)}
        if what == "attention":
            name = f"decode attention, {number} tokens"
            return {
                name: self._attention(number),
                f"{name}, shuffled": self._attention(number, shuffled=True),
            }
        if what == "decode":
            steps = self._generate(weights, number, SHORT, STEPS)[1]
            return {f"decode step, {number} streams": steps}
        first, step = self._generate(weights, 1, number, STEPS_BEHIND_PROMPT)
        return {f"prompt of {number}": first, f"decode step behind {number}": step}

    def _operators(self) -> Any:
        import torch

        from microvllm.ops.cpu.build import load_kernels
        from microvllm.ops.cpu.operators import CpuOperators

        library = load_kernels()
        options = {}
        try:
            from microvllm.ops.cpu.calibration import calibrated

            options["tuning"] = calibrated(library).tuning
        except ImportError:  # commits before it
            pass
        torch.set_num_threads(self.threads)
        return CpuOperators(library, self.threads, **options)

    def _least(self, action: Callable[[], object]) -> float:
        """Milliseconds of the fastest of several turns, the first of which does not count."""
        times, end = [], self.clock() + MIN_S
        while len(times) < 3 or self.clock() < end:
            begin = self.clock()
            action()
            times.append(self.clock() - begin)
        return 1e3 * min(times[1:])

    def _attention(self, tokens: int, shuffled: bool = False) -> float:
        """Of one query in all layers, to a bfloat16 cache whose blocks lie in a row, or anywhere."""
        import torch

        from microvllm.ops.attention import AttentionBatch, AttentionShape
        from microvllm.ops.cpu.operators import CpuAttention

        blocks = -(-tokens // BLOCK)
        shape = AttentionShape(LAYERS, HEADS, KV_HEADS, HEAD_DIM)
        sizes = blocks, BLOCK, torch.zeros(HEAD_DIM // 2), tokens, torch.bfloat16
        count, table = torch.tensor([tokens]), torch.arange(blocks)
        if shuffled:
            table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
        slot = table[-1:] * BLOCK + (count - 1) % BLOCK
        last = count - 1, slot, 1, table[None], count
        try:
            from microvllm.ops.attention import AttentionConfig
        except ImportError:  # commits before it
            attention, batch = (
                CpuAttention(self._operators().kernels, shape, *sizes, None),
                AttentionBatch(*last, ()),
            )
        else:
            attention = CpuAttention(self._operators(), AttentionConfig(shape, *sizes))
            batch = AttentionBatch(*last)
        attention.cache.copy_(torch.randn(attention.cache.shape[1:]))
        step, qkv = attention.begin_step(batch), torch.randn(1, QKV)
        return self._least(lambda: [step(layer, qkv) for layer in range(LAYERS)])

    def _products(self, weights: str) -> Callable[[int], float]:
        import torch

        from microvllm.ops.quantized import QuantizedRows, QuantizedTensor

        operators = self._operators()

        def weight(rows: int, columns: int, parts: int = 1) -> torch.Tensor:
            if weights == "bf16":
                return torch.randn(rows, columns).mul_(0.02).bfloat16()
            blocks = torch.randint(0, 256, (rows * columns // 32, 20), dtype=torch.uint8)
            blocks[:, :4] = torch.tensor([0.01, -0.08]).half().view(torch.uint8)
            part = QuantizedRows(Q4_1, rows // parts, columns // 32 * 20)
            return QuantizedTensor.of(blocks.flatten(), columns, (part,) * parts)

        norm, layers = torch.ones(HIDDEN), []
        for _ in range(LAYERS):
            layers += [
                (operators.norm_linear(norm, 1e-5, weight(QKV, HIDDEN)), HIDDEN),
                (operators.linear(weight(HIDDEN, HIDDEN)), HIDDEN),
                (operators.norm_gate_up(norm, 1e-5, weight(2 * INNER, HIDDEN, parts=2)), HIDDEN),
                (operators.linear(weight(HIDDEN, INNER)), INNER),
            ]

        def milliseconds(rows: int) -> float:
            x = {columns: torch.randn(rows, columns) for columns in (HIDDEN, INNER)}
            return self._least(lambda: [product(x[columns]) for product, columns in layers])

        return milliseconds

    def _generate(self, weights: str, requests: int, prompt: int, steps: int) -> tuple[float, float]:
        """Until every request has its first token, and the median step after it."""
        if weights not in self.engines:
            from microvllm.runtime.engine import InferenceEngine

            longest = max(PROMPTS) + 2 * STEPS
            tokens = max(longest, max(STREAMS) * (SHORT + STEPS + 2 * BLOCK))
            self.engines[weights] = InferenceEngine(
                self.model,
                max(STREAMS),
                device="cpu",
                cpu_threads=self.threads,
                max_model_len=longest,
                num_gpu_blocks_override=tokens // BLOCK + 2,
                enable_prefix_caching=False,
                **FORMATS[weights],
            )
            self._generate(weights, max(STREAMS), SHORT, 4)  # warm-up
        engine = self.engines[weights]
        draw = random.Random(0)
        params = engine.sampling_params(max_tokens=steps + 1, temperature=0.0, ignore_eos=True)
        begin = self.clock()
        for _ in range(requests):
            ids = [draw.randrange(1000, 40000) for _ in range(prompt)]
            engine.core.add(engine.processor.requests(ids, params)[0])
        waiting, first, times = requests, 0.0, []
        seen: set[int] = set()
        while engine.core.has_work():
            before = self.clock()
            outputs = engine.core.step()
            now = self.clock()
            if not waiting:
                times.append(now - before)
                continue
            seen |= {output.request_id for output in outputs if output.token_ids}
            waiting = requests - len(seen)
            first = now - begin
        return 1e3 * first, 1e3 * median(times[:-1])


def work(model: str, threads: int, clock: Callable[[], float]) -> None:
    """Measure each case of standard input, and answer it in one line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    tree = Tree(model, threads, clock)
    for line in sys.stdin:
        print(json.dumps(tree.run(tuple(json.loads(line)))), file=answers, flush=True)


class Worker:
    """A process that measures one checkout."""

    def __init__(self, name: str, tree: Path, folder: Path, arguments: list[str]) -> None:
        self.name = name
        site = folder / name
        site.mkdir()
        (site / "microvllm").symlink_to(tree.resolve())
        path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, __file__, "--worker", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=site,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the parent, which ends them
        )

    def run(self, case: Case) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(case), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# ---- llama.cpp ------------------------------------------------------------------------------------------


class Llama:
    """Measures llama.cpp by its `llama-batched-bench`."""

    name = "llama.cpp"

    def __init__(self, program: Path, models: dict[str, Path], threads: int, arguments: list[str]) -> None:
        self.command = [str(program), "-t", str(threads), "-tb", str(threads), *arguments]
        self.models = models

    def run(self, case: Case) -> dict[str, float]:
        """Nothing for what it does not do, or where it fails."""
        what, weights, number = case
        if (
            what in ("products", "attention")
            or weights not in self.models
            or (what == "prompt" and number > LONGEST)
        ):
            return {}
        prompt, requests, steps = (
            (SHORT, number, STEPS) if what == "decode" else (number, 1, STEPS_BEHIND_PROMPT)
        )
        sizes = {"-npp": prompt, "-ntg": steps, "-npl": requests, "-c": requests * (prompt + steps + 1)}
        command = [*self.command, "-m", str(self.models[weights]), "--output-format", "jsonl"]
        command += [str(part) for pair in sizes.items() for part in pair]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
        if not found:
            tail = "\n".join((ended.stderr or ended.stdout).strip().splitlines()[-5:])
            print(f"llama.cpp, {case}: status {ended.returncode}: {tail}", file=sys.stderr)
            self.models = {name: file for name, file in self.models.items() if name != weights}
            return {}
        step = 1e3 * found[0]["t_tg"] / steps
        if what == "decode":
            return {f"decode step, {number} streams": step}
        return {f"prompt of {number}": 1e3 * found[0]["t_pp"], f"decode step behind {number}": step}

    def close(self) -> None:
        pass


# ---- all of them ----------------------------------------------------------------------------------------


def cases() -> Iterable[Case]:
    yield from (("attention", "bf16", number) for number in PROMPTS)
    for what, numbers in (("products", ROWS), ("decode", STREAMS), ("prompt", PROMPTS)):
        yield from ((what, weights, number) for number in numbers for weights in FORMATS)


Times = dict[tuple[str, str], dict[str, list[float]]]  # by weights and row: by name: one of each round


def add_context_costs(times: Times) -> None:
    """Microseconds of a step for each token of context, from its growth between two lengths."""
    short, long = min(PROMPTS), max(PROMPTS)
    for weights in FORMATS:
        ends = [times.get((weights, f"decode step behind {length}"), {}) for length in (short, long)]
        times[weights, "us a token of context"] = {
            name: [
                1e3 * (b - a) / (long - short)
                for a, b in zip(ends[0].get(name, []), ends[1][name], strict=False)
            ]
            for name, found in ends[1].items()
        }


def table(times: Times, names: list[str]) -> str:
    """Milliseconds, and how many times as fast the last checkout is."""
    old, new, *others = names
    lines = ["| weights | | " + " | ".join(names) + f" | {old} / {new} | "]
    lines[0] += " | ".join(f"{other} / {new}" for other in others) + (" |" if others else "")
    lines.append("|---" * (2 * len(names) + 1) + "|")
    for (weights, row), by_name in times.items():
        cells = [f"{min(by_name[name]):.2f}" if by_name.get(name) else "" for name in names]
        for other in (old, *others):
            pairs = list(zip(by_name.get(other, []), by_name.get(new, []), strict=False))
            ratios = [a / b for a, b in pairs if b > 0]
            text = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
            cells.append(text)
        lines.append(f"| {weights} | {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def checkout(text: str) -> Path:
    """An argparse type: the root of a checkout."""
    if not (Path(text) / "ops" / "cpu").is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no checkout of this repository")
    return Path(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=checkout, nargs="?")
    parser.add_argument("new", type=checkout, nargs="?")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a .gguf file or the demo model")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--processor-time", action="store_true", help="not the clock's: for a busy machine, with --threads 1"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="after which no measurement begins")
    parser.add_argument("--only", default="", help="of the cases, those that contain this text")
    parser.add_argument("--llama-bench", type=Path, metavar="FILE", help="llama-batched-bench")
    parser.add_argument("--llama-bf16", type=Path, metavar="GGUF", help="the model in bfloat16 for it")
    parser.add_argument("--llama-arguments", default="", help="more arguments for it, such as --no-repack")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.model, args.threads, time.process_time if args.processor_time else time.perf_counter)
        return
    if args.new is None:
        parser.error("two checkouts are needed")
    from microvllm.ops.cpu.calibration import processor_name
    from microvllm.runtime.options.find_model import find_model

    model = find_model(args.model)
    chosen = [case for case in cases() if args.only in " ".join(map(str, case))]
    arguments = ["--model", str(model), "--threads", str(args.threads)]
    arguments += ["--processor-time"] * args.processor_time
    times: Times = {}
    with tempfile.TemporaryDirectory() as folder:
        members: list[Worker | Llama] = [
            Worker(name, tree, Path(folder), arguments)
            for name, tree in (("old", args.old), ("new", args.new))
        ]
        if args.llama_bench is not None:
            models = {"file": model} | ({"bf16": args.llama_bf16} if args.llama_bf16 else {})
            members.append(Llama(args.llama_bench, models, args.threads, args.llama_arguments.split()))
        end = time.perf_counter() + 60 * args.minutes
        rounds = 0
        with suppress(KeyboardInterrupt):  # what was measured is shown
            while time.perf_counter() < end:
                for case in chosen:
                    if time.perf_counter() > end:
                        break
                    for member in members:
                        if rounds and isinstance(member, Llama):
                            continue  # slow: its time is better spent on the checkouts
                        for row, milliseconds in member.run(case).items():
                            by_name = times.setdefault((case[1], row), {})
                            by_name.setdefault(member.name, []).append(milliseconds)
                else:
                    rounds += 1
        for member in members:
            member.close()
    add_context_costs(times)
    clock = ", processor time" if args.processor_time else ""
    print(f"\n{processor_name()}, {args.threads} threads{clock}, {rounds} whole rounds\n")
    print(table({row: found for row, found in times.items() if found}, [member.name for member in members]))


if __name__ == "__main__":
    main()
