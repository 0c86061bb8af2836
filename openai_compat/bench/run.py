"""Runs `microvllm bench serve`: measures a server and reports as `vllm bench serve` does."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from microvllm.openai_compat.bench.client import (
    BenchError,
    Completion,
    Conversation,
    RequestResult,
    Target,
    User,
    first_model,
    measure,
)
from microvllm.openai_compat.bench.figures import as_vllm
from microvllm.openai_compat.bench.options import BenchArgs
from microvllm.openai_compat.bench.workloads import Case, Span, random_ids, random_texts
from microvllm.runtime.errors import ConfigError, MicroVLLMError

NO_SERVER_REMEDY = "start a server with `microvllm serve`, or name another with --base-url"
KEY_REMEDY = "give the server's key in the variable OPENAI_API_KEY"
ANSWER_REMEDY = "the server's answer says what to change; `microvllm bench serve --help` lists the flags"
TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
WIDTH = 50


class MeasurementError(MicroVLLMError):
    """The server is not there, or no request was answered as it was asked for."""


def run(args: BenchArgs) -> int:
    """Measure, print the report, write the result file; the exit status is 1 if a request failed.

    A request fails that does not give exactly the tokens it was asked for. Raises `MeasurementError` and
    `ConfigError` naming the file.
    """
    target = Target(args.url, args.model_name, os.environ.get("OPENAI_API_KEY"), extra_body=args.fields)
    target = replace(target, model=_wait_for_model(target, args))
    case = _case(args, args.num_prompts)
    if args.num_warmups:
        warmup = _case(args, args.num_warmups)
        measure(target, _users(args, warmup, args.seed - 1), concurrency=args.max_concurrency)
    measured = measure(
        target,
        _users(args, case, args.seed),
        concurrency=args.max_concurrency,
        arrivals=case.arrivals(args.seed),
    )
    if not measured.good:
        problem = f"{args.url}: {'; '.join(measured.errors)}"
        raise MeasurementError(problem, remedy=_remedy(problem))
    result = as_vllm(
        measured,
        case,
        model=target.model,
        label=args.label,
        detailed=args.detailed,
        percentiles=args.percentiles,
    )
    result |= {"backend": args.backend, "endpoint_type": args.backend, **args.metadata}
    if args.goodput:
        kept = [request for request in measured.good if _keeps(request, args.goodput)]
        result["request_goodput"] = len(kept) / measured.duration
    if args.result_file is not None:
        _save(result, Path(args.result_file))  # first: stdout may be closed
    print(report(result, args))
    for error in measured.errors:
        print(f"Failed: {error}")
    return 1 if measured.errors else 0


def _keeps(request: RequestResult, limits: Mapping[str, float]) -> bool:
    times = {"ttft": request.ttft, "tpot": request.tpot or 0.0, "e2el": request.latency}
    return all(1e3 * times[name] <= limit for name, limit in limits.items())


def report(result: dict[str, Any], args: BenchArgs) -> str:
    """Return the result in the words of `vllm bench serve`, which scripts look for."""
    rows: list[tuple[str, Any]] = [
        ("Successful requests:", result["completed"]),
        ("Failed requests:", result["failed"]),
    ]
    if args.max_concurrency is not None:
        rows.append(("Maximum request concurrency:", args.max_concurrency))
    if not math.isinf(args.request_rate):
        rows.append(("Request rate configured (RPS):", args.request_rate))
    rows += [
        ("Benchmark duration (s):", result["duration"]),
        ("Total input tokens:", result["total_input_tokens"]),
        ("Total generated tokens:", result["total_output_tokens"]),
        ("Request throughput (req/s):", result["request_throughput"]),
    ]
    if args.goodput:
        rows.append(("Request goodput (req/s):", result["request_goodput"]))
    rows += [
        ("Output token throughput (tok/s):", result["output_throughput"]),
        ("Peak output token throughput (tok/s):", float(result["max_output_tokens_per_s"])),
        ("Peak concurrent requests:", float(result["max_concurrent_requests"])),
        ("Total token throughput (tok/s):", result["total_token_throughput"]),
    ]
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}", *(_row(*row) for row in rows)]
    for name in args.metrics:
        lines.append(f"{TITLES[name]:-^{WIDTH}}")
        label = name.upper()
        lines.append(_row(f"Mean {label} (ms):", result[f"mean_{name}_ms"]))
        lines.append(_row(f"Median {label} (ms):", result[f"median_{name}_ms"]))
        for percent in args.percentiles:
            key = f"p{percent:g}_{name}_ms"
            lines.append(_row(f"P{percent:g} {label} (ms):", result[key]))
    return "\n".join([*lines, "=" * WIDTH])


def _row(label: str, value: Any) -> str:
    return f"{label:<40} {f'{value:.2f}' if isinstance(value, float) else value:<10}"


def _wait_for_model(target: Target, args: BenchArgs) -> str:
    deadline = time.monotonic() + args.ready_timeout
    while True:
        try:
            listed = first_model(target)
        except BenchError as error:
            if time.monotonic() >= deadline:
                raise MeasurementError(str(error), remedy=_remedy(str(error))) from None
            time.sleep(1)
        else:
            return args.model_name or listed


def _remedy(problem: str) -> str:
    """Return what to do about a server that refuses, or is not there."""
    if "HTTP status 401" in problem:
        return KEY_REMEDY
    return ANSWER_REMEDY if "HTTP status" in problem else NO_SERVER_REMEDY


def _case(args: BenchArgs, count: int) -> Case:
    source = random.Random(args.seed)
    spans = [
        Span(max(1, math.floor(length * (1 - args.range_ratio))), math.ceil(length * (1 + args.range_ratio)))
        for length in (args.input_len, args.output_len)
    ]
    lengths = tuple((args.prefix_len + spans[0].draw(source), spans[1].draw(source)) for _ in range(count))
    rate = "all at once" if math.isinf(args.request_rate) else f"{args.request_rate:g} requests/s"
    return Case(
        "random",
        rate,
        lengths,
        concurrency=args.max_concurrency,
        request_rate=args.request_rate,
        burstiness=args.burstiness,
    )


def _users(args: BenchArgs, case: Case, seed: int) -> list[User]:
    """Return a completion each, or for chats a conversation of one message; all share the prefix."""
    tails = [length - args.prefix_len for length, _ in case.lengths]
    outputs = [output for _, output in case.lengths]
    if args.backend == "openai-chat":
        (shared,) = random_texts([args.prefix_len], args.seed)
        return [
            Conversation("", (f"{shared}{text}".strip(),), output)
            for text, output in zip(random_texts(tails, seed), outputs, strict=True)
        ]
    (prefix,) = random_ids([args.prefix_len], args.seed)
    prompts = random_ids(tails, seed)
    return [Completion([*prefix, *ids], output) for ids, output in zip(prompts, outputs, strict=True)]


def _save(result: dict[str, Any], file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(orjson.dumps(result) + b"\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--result-dir, --result-filename {file}: {error}") from error
