#!/usr/bin/env python3
"""Compare inference engines on this machine: same model, same client, same requests, turn by turn.

    python scripts/compare.py
    python scripts/compare.py --vllm-python ~/vllm/bin/python --llama-server ~/llama.cpp/llama-server
    python scripts/compare.py --model ~/models/Qwen3-0.6B --workload single,concurrent35,nano256
    python scripts/compare.py --engine microvllm --engine "name=mine url=http://127.0.0.1:9000"
    python scripts/compare.py --engine url=http://127.0.0.1:8000 --workload streams --streams 1,8,64

Starts every engine that is installed (microvllm, vLLM, Hugging Face `generate`, `transformers serve`,
llama.cpp's `llama-server`), waits until it answers, and drives all with one OpenAI client. On a CPU all
servers stay up, and those whose turn it is not are halted; on a GPU each turn has a fresh server. The
engines take turns, A B C A B C, each after a short warm-up; ratios are taken within a round. Every prompt is
new. Engines on quantised weights are compared with each other, and so are the others.

Without a GPU the workloads are in their small form and the whole takes less than 10 minutes: what finds no
time, and an engine that takes too long to start, is left out and named. `--full` runs them as they were
described, however long that takes. Writes report.md (one table), result.json (each measurement as `vllm
bench serve --save-result` writes it), plots, and the servers' logs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from bench.engines import KINDS, MOST_SLOTS, Engine, Setup, Spec, build, default_specs, named
from bench.floor import READ_BYTES_S, Floor
from bench.options import add_sizes, list_of, positive_float, positive_int, sizes_of, workload
from bench.plots import draw
from bench.report import as_json, facts, markdown
from bench.rounds import TURNS, Comparison, Plan
from bench.weights import Weights
from bench.workloads import FULL_WORKLOADS, QUICK_WORKLOADS, WORKLOADS, Case, cases_of
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from microvllm.openai_compat.bench.client import BenchError
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options.find_model import find_model

QUICK_MINUTES = 9.0
START_SHARE = 0.65
CPU_WARMUP_LEN, CPU_WARMUP_USERS = 16, MOST_SLOTS
QUICK_WARMUP_LEN, QUICK_WARMUP_USERS = 2, 4
CONTEXT_STEP = 256
GPU_CONTEXT = 4096  # at least: there it is not the memory that it is on a CPU


class Display:
    """Lines of progress on stderr, and on a terminal a bar below them."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=None)

    @contextmanager
    def shown(self, steps: int) -> Iterator[None]:
        """A bar of so many steps for the block."""
        self._progress.update(self._bar, total=steps)
        with self._progress:
            yield

    def say(self, message: str) -> None:
        """A line above the bar."""
        self._progress.console.print(f"{time.strftime('%H:%M:%S')} {message}", markup=False, soft_wrap=True)

    def advance(self, what: str) -> None:
        """One step further; `what` begins now."""
        self._progress.update(self._bar, advance=1, description=what)


def context_of(cases: Sequence[Case], prompts: str) -> int:
    """Tokens that every server is started for; where words are counted here, a tenth above the longest."""
    longest = max(case.longest for case in cases)
    if prompts == "text" or any(case.turns for case in cases):
        longest += longest // 10
    return -(-longest // CONTEXT_STEP) * CONTEXT_STEP


def build_engines(specs: Sequence[Spec], setup: Setup, prompts: str) -> tuple[list[Engine], dict[str, str]]:
    """The engines, and why others are missing."""
    engines, missing = [], {}
    for spec in named(specs):
        try:
            engine = build(spec, setup)
            if prompts == "ids" and engine.text_only:
                raise BenchError("takes no token ids (--prompts ids)")
            engines.append(engine)
        except BenchError as error:
            missing[spec.name] = str(error)
    return engines, missing


def spec(text: str) -> Spec:
    """An argparse type: an engine."""
    try:
        return Spec.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        help="a Hugging Face folder or .gguf file; a folder without weights gets random ones",
    )
    parser.add_argument(
        "--gguf", type=Path, help="for llama.cpp, where --model is a folder: the same as GGUF"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if nvidia-smi is there"
    )
    parser.add_argument(
        "--engine",
        type=spec,
        action="append",
        metavar="SPEC",
        help="only these engines; the first is the one that the others are compared with. One of "
        f"{', '.join(KINDS)}, or words: name=ours-q4 kind=microvllm dtype=auto args='--flag value' env='A=1' "
        "program=FILE workloads=LIST. llama.cpp's dtype: file, bf16, f16 or f32. Any other server: "
        "url=URL or command='... {port}', with model=NAME",
    )
    parser.add_argument(
        "--kv-cache-memory-bytes",
        type=positive_int,
        metavar="N",
        help="KV cache of microvllm and vLLM on a GPU, so that all servers find room at once (--turns halt)",
    )
    parser.add_argument(
        "--read-rate",
        type=positive_float,
        metavar="TB/S",
        help="what the GPU reads, for the share of the floor (if not given: as measured on "
        f"{', '.join(READ_BYTES_S)}, and no such column on others)",
    )
    parser.add_argument("--vllm-python", help="interpreter that has vLLM")
    parser.add_argument("--hf-python", help="interpreter that has transformers[serving]")
    parser.add_argument("--llama-server", help="the llama-server program of llama.cpp")
    parser.add_argument(
        "--workload",
        type=list_of(workload),
        metavar="LIST",
        help=f"some of {', '.join(WORKLOADS)} (if not given: {', '.join(QUICK_WORKLOADS)}; "
        f"with --full {', '.join(FULL_WORKLOADS)})",
    )
    parser.add_argument("--quick", action="store_true", help="small workloads, as without a GPU")
    parser.add_argument("--full", action="store_true", help="workloads as described, as on a GPU")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument(
        "--warmup-len",
        type=positive_int,
        help="longest answer of the turn that only warms up (if not given: "
        f"{CPU_WARMUP_LEN} on a CPU, small workloads {QUICK_WARMUP_LEN}, on a GPU the workloads' own)",
    )
    parser.add_argument(
        "--turns", choices=TURNS, help="halt: servers stay up; restart: one fresh server a turn; sequence: "
        "one engine after the other (if not given: halt on a CPU, restart on a GPU)"
    )  # fmt: skip
    parser.add_argument(
        "--minutes",
        type=positive_float,
        help=f"begin nothing that would end later, and give a server {100 * START_SHARE:.0f} percent of the "
        f"time that is left to start (quick: {QUICK_MINUTES:g})",
    )
    parser.add_argument("--busy-neighbour", action="store_true", help="measure with a competing process, too")
    parser.add_argument("--prompts", choices=("text", "ids"), default="text", help="send words or token ids")
    parser.add_argument("--temperature", type=positive_float, default=0.0, help="of all requests")
    parser.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: microvllm and vLLM make up random weights, each its own, so that nothing is written or "
        "read; texts differ, and so may the experts that they choose",
    )
    add_sizes(parser)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    parser.add_argument(
        "--start-timeout", type=positive_float, default=600.0, help="seconds a server may take to start"
    )
    parser.add_argument("--timeout", type=positive_float, default=600.0, help="seconds a request may take")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder for what is written")
    parser.add_argument("--keep", type=Path, help="folder for converted weights, used again next time")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing")
    parser.add_argument("--save-detailed", action="store_true", help="every request in result.json")
    args = parser.parse_args()
    if args.quick and args.full:
        parser.error("--quick and --full exclude each other")
    return args


def main() -> int:
    began = time.monotonic()
    args = parse_args()
    display = Display()
    device = args.device
    if device == "auto":
        device = "cuda" if shutil.which("nvidia-smi") else "cpu"
    quick = args.quick or (device == "cpu" and not args.full)
    names = args.workload or (QUICK_WORKLOADS if quick else FULL_WORKLOADS)
    cases = cases_of(names, sizes_of(args, quick=quick), busy=args.busy_neighbour)
    minutes = args.minutes or (QUICK_MINUTES if quick else float("inf"))
    try:
        ours = [each for each in args.engine or () if each.kind in ("url", "command")]
        model = Path(args.model) if ours and ours == args.engine else find_model(args.model)
    except ConfigError as error:
        raise BenchError(str(error)) from error
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-")))
        folder.mkdir(parents=True, exist_ok=True)
        weights = Weights(model, args.gguf or (model if model.is_file() else None), folder, display.say)
        setup = Setup(
            weights if args.load_format == "dummy" else weights.with_weights(),
            device,
            max(GPU_CONTEXT if device == "cuda" else 0, context_of(cases, args.prompts)),
            max(case.at_once if case.concurrency else min(case.at_once, MOST_SLOTS) for case in cases),
            {"vllm": args.vllm_python, "hf": args.hf_python, "llama.cpp": args.llama_server},
            args.kv_cache_memory_bytes if device == "cuda" else None,
            args.load_format == "dummy",
            args.temperature,
        )
        if quick:
            display.say(f"small workloads for {minutes:g} minutes (--minutes); --full runs them as described")
        engines, missing = build_engines(args.engine or default_specs(setup), setup, args.prompts)
        for name, reason in missing.items():
            display.say(f"{name} is left out: {reason}")
        if not engines:
            raise BenchError("no engine is left")
        # Short answers warm up a CPU; a GPU has graphs and kernels for every batch size on the way.
        warmup_len, warmup_users = max(out for case in cases for _, out in case.lengths), None
        if device == "cpu":
            warmup_len = QUICK_WARMUP_LEN if quick else CPU_WARMUP_LEN
            warmup_users = QUICK_WARMUP_USERS if quick else CPU_WARMUP_USERS
        plan = Plan(
            cases,
            args.rounds,
            args.turns or ("halt" if device == "cpu" else "restart"),
            args.prompts,
            args.seed,
            warmup_len=args.warmup_len or warmup_len,
            warmup_users=warmup_users,
            start_timeout_s=args.start_timeout,
            start_share=START_SHARE,
            timeout_s=args.timeout,
            ends=began + 60 * minutes,
        )
        comparison = Comparison(plan, args.out / "logs", display.say, display.advance)
        heading = facts(
            model=args.model,
            command=shlex.join(["python", *sys.argv]),
            left_out=missing,
            remark="",
            turns=plan.turns,
            temperature=args.temperature,
        )
        if device == "cuda":
            rate = args.read_rate and 1e12 * args.read_rate
            heading["floor"] = Floor.of(setup.weights.model, heading["machine"]["gpus"], rate)
        interrupted = False
        try:
            with display.shown(comparison.steps(len(engines))):
                comparison.run(engines)
        except KeyboardInterrupt:
            display.say("interrupted; the servers have been ended")
            interrupted = True
    rows = comparison.rows
    missing |= {row.engine.name: row.trouble for row in rows if row.trouble and not row.reports}
    heading["rounds"] = comparison.rounds_done
    heading["no_time"] = [str(case) for case in comparison.skipped]
    heading["remark"] = ", small workloads" if quick else ""
    if not any(row.reports for row in rows):
        if interrupted:
            return 130
        raise BenchError("nothing was measured")
    cases = [case for case in cases if any(row.reports.get(case) for row in rows)]
    text = markdown(rows, cases, heading)
    print(text)
    (args.out / "report.md").write_text(text + "\n")
    result = as_json(rows, cases, heading, detailed=args.save_detailed)
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    plots = []
    try:
        plots = [] if args.no_plots else draw(rows, cases, args.out)
    except BenchError as error:
        display.say(str(error))
    display.say(f"written: {', '.join(map(str, [args.out / 'report.md', args.out / 'result.json', *plots]))}")
    if interrupted:
        return 130
    return 1 if any(row.errors() or row.trouble for row in rows) else 0


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    # Ended from outside, it must not leave servers behind, least of all halted ones. A shell lets what it
    # starts in the background ignore interrupts; whoever sends one means it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"compare: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)
