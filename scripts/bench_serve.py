#!/usr/bin/env python3
"""Measure an OpenAI-compatible server: closed or open loop, fixed lengths, exact token counts.

    python scripts/bench_serve.py http://127.0.0.1:8000 --streams 1,8,35 --input-len 128 --output-len 128
    python scripts/bench_serve.py http://127.0.0.1:8000 --request-rate 1,2,4 --requests 100
    python scripts/bench_serve.py http://127.0.0.1:8000 --workload chat --save-result chat.json

Needs the server's URL and the packages httptools, orjson and rich; no tokenizer, as the server counts. With a
list of streams or of rates it climbs from step to step. OPENAI_API_KEY is sent if it is set.

Prints a table a step, and last one line of JSON a step with the names of `vllm bench serve --save-result`.
Exit status: 0 every request gave exactly the tokens it was asked for, 1 some did not, 2 an option is wrong or
nothing answers.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
from bench.options import (
    add_sizes,
    http_url,
    json_object,
    list_of,
    positive_float,
    positive_int,
    sizes_of,
    workload,
)
from bench.workloads import Sizes, cases_of
from rich.console import Console
from rich.table import Table

from microvllm.openai_compat.bench.client import BenchError, Measured, Target, first_model, measure
from microvllm.openai_compat.bench.figures import METRICS, PERCENTILES, as_vllm
from microvllm.openai_compat.bench.workloads import Case, Span


def steps(args: argparse.Namespace, sizes: Sizes) -> list[Case]:
    """What to measure, one after the other."""
    if args.workload:
        return cases_of(args.workload, sizes)
    prompt, output = sizes.input_len or Span(128, 128), sizes.output_len or Span(128, 128)
    if args.request_rate:
        lengths = replace(sizes, input_len=prompt, output_len=output).lengths(100, prompt, output)
        limit = max(args.streams) if args.streams else None
        return [
            Case(
                "open loop",
                f"{rate:g} requests/s",
                lengths,
                concurrency=limit,
                request_rate=rate,
                burstiness=args.burstiness,
            )
            for rate in args.request_rate
        ]
    return [
        Case("closed loop", f"{count} streams", sizes.lengths(count, prompt, output), concurrency=count)
        for count in args.streams or [1]
    ]


def print_report(measured: Measured, result: dict[str, Any], console: Console) -> None:
    """The report as a table."""
    table = Table(title=f"{result['workload']}, {result['load']}, {result['num_prompts']} requests")
    table.add_column("ms")
    columns = ("mean", *(f"p{percent}" for percent in PERCENTILES))
    for column in columns:
        table.add_column(column, justify="right")
    for name, label in METRICS.items():
        table.add_row(label, *(f"{result[f'{column}_{name}_ms']:.1f}" for column in columns))
    console.print(table)
    console.print(
        f"{result['output_throughput']:.1f} output tokens/s, {result['request_throughput']:.2f} requests/s; "
        f"{result['total_input_tokens']} tokens in, {result['total_output_tokens']} out "
        f"(counted by {', '.join(result['tokens_counted_by']) or 'nothing'}) in {result['duration']:.2f} s; "
        f"the client took {100 * result['client_cpu_s'] / result['duration']:.1f} % of a core",
        highlight=False,
    )
    for error in measured.errors:
        console.print(f"error: {error}", style="red", markup=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", type=http_url, help="such as http://127.0.0.1:8000")
    parser.add_argument("--model", help="name in the requests; the first that the server lists if not given")
    parser.add_argument(
        "--workload", type=list_of(workload), metavar="LIST", help="workloads by name, as in compare.py"
    )
    parser.add_argument("--quick", action="store_true", help="the small form of the workloads")
    add_sizes(parser)
    parser.add_argument(
        "--warmup", type=positive_int, help="requests before the measured ones (default: as many again)"
    )
    parser.add_argument("--prompts", choices=("ids", "text"), default="ids", help="send token ids or words")
    parser.add_argument("--no-ignore-eos", action="store_true", help="do not send ignore_eos")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--extra-body", type=json_object, default={}, help="JSON object of further fields")
    parser.add_argument("--seed", type=int, help="of prompts and arrivals (default: another one each time)")
    parser.add_argument(
        "--timeout", type=positive_float, default=600.0, help="seconds a request may take (default 600)"
    )
    parser.add_argument(
        "--save-result", type=Path, metavar="FILE", help="write the JSON: of one step an object, else a list"
    )
    parser.add_argument("--save-detailed", action="store_true", help="in it every request and its text")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    seed = int.from_bytes(os.urandom(4), "big") if args.seed is None else args.seed
    target = Target(
        args.url,
        args.model,
        os.environ.get("OPENAI_API_KEY"),
        not args.no_ignore_eos,
        args.temperature,
        args.extra_body,
    )
    try:
        if args.model is None:
            target = replace(target, model=first_model(target))
    except BenchError as error:
        print(f"bench_serve: {error}", file=sys.stderr)
        return 2
    console = Console()
    results, failed = [], False
    for number, case in enumerate(steps(args, sizes_of(args, quick=args.quick))):
        warmup = replace(
            case, lengths=(case.lengths * (args.warmup or 1))[: args.warmup or len(case.lengths)]
        )
        begin = seed + 2 * number
        for each, its_seed, arrivals in ((warmup, begin, []), (case, begin + 1, case.arrivals(begin))):
            measured = measure(
                target,
                each.users(args.prompts, its_seed),
                concurrency=case.concurrency,
                arrivals=arrivals,
                timeout_s=args.timeout,
            )
        result = as_vllm(measured, case, model=target.model, detailed=args.save_detailed)
        results.append(result | {"url": args.url, "prompts": args.prompts, "seed": seed})
        failed = failed or bool(measured.errors)
        print_report(measured, result, console)
    for result in results:
        short = {
            name: value for name, value in result.items() if not isinstance(value, list) or len(value) < 9
        }
        print(orjson.dumps(short).decode())
    if args.save_result:
        args.save_result.write_bytes(orjson.dumps(results[0] if len(results) == 1 else results) + b"\n")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
