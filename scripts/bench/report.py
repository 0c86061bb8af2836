"""Writes a comparison as one Markdown table with its conditions, and as JSON."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from bench.engines import cpu_flags
from bench.floor import Floor
from bench.rounds import Row
from bench.workloads import Case
from microvllm.openai_compat.bench.client import Measured
from microvllm.openai_compat.bench.figures import as_vllm, percentile, samples
from microvllm.openai_compat.bench.workloads import Span

SPEED_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def machine() -> dict[str, Any]:
    """The machine: processor, GPUs, system and load."""
    values: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    return {
        "cpu": "{} (family {}, model {})".format(
            *(values.get(name, "?") for name in ("model name", "cpu family", "model"))
        ),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in SPEED_FLAGS if flag in cpu_flags()],
        "gpus": _gpus(),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def _gpus() -> list[str]:
    """Name, driver, clock and temperature of each NVIDIA GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=name,driver_version,clocks.sm,temperature.gpu"
    answer = subprocess.run([program, query, "--format=csv,noheader"], capture_output=True, text=True)
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def facts(**more: Any) -> dict[str, Any]:
    """Date and machine, with whatever else belongs into the heading."""
    date = datetime.now(timezone.utc).isoformat(timespec="minutes")
    return {"date": date, "machine": machine(), **more}


def markdown(rows: Sequence[Row], cases: Sequence[Case], facts: dict[str, Any]) -> str:
    """The heading, the table of all workloads and the one of the engines.

    The first row is the engine that the others are compared with: see `_base`.
    """
    measured = [row for row in rows if row.reports]
    floor: Floor | None = facts.get("floor")
    blocks = [_heading(facts), _speeds(measured, cases, floor), _engines(measured)]
    blocks += [_sent(measured, cases), _limits(measured, floor)]
    if busy := [case for case in cases if case.busy]:
        blocks.append(_beside_a_neighbour(measured, busy))
    blocks += [_reused(measured, cases), _client(measured)]
    if facts["no_time"]:
        blocks.append([f"Not measured, as there was no time left: {'; '.join(facts['no_time'])}."])
    blocks += [[f"Left out: {name}: {reason}."] for name, reason in facts["left_out"].items()]
    blocks += [[f"{row.label}: {row.trouble}"] for row in measured if row.trouble]
    blocks += [[f"Error with {row.label}: {error}"] for row in measured for error in row.errors()]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _heading(facts: dict[str, Any]) -> list[str]:
    machine = facts["machine"]
    parts = [
        *machine["gpus"],
        f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['flags'])})",
        machine["system"],
        f"load {machine['load']:.1f} beforehand",
        facts["date"],
    ]
    sampling = f"temperature {facts['temperature']:g}" if facts.get("temperature") else "greedy"
    lines = [f"{', '.join(parts)}.", f"{facts['model']}, {sampling}; median (least to most) of "
             f"{facts['rounds']} rounds{facts['remark']}."]  # fmt: skip
    return [*lines, f"`{facts['command']}`"]


def _speeds(rows: Sequence[Row], cases: Sequence[Case], floor: Floor | None) -> list[str]:
    columns = ["workload", "engine", "tokens/s", f"{rows[0].engine.name} is" if rows else ""]
    columns += ["first token, p50 (p99)", "each further token", "whole request"]
    columns += ["share of the floor"] if floor else []
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for case in cases:
        title = str(case)
        for row in rows:
            reports = row.reports.get(case, [])
            if not reports:
                continue
            speeds = [
                report.input_throughput if case.prefill_only else report.output_throughput
                for report in reports
            ]
            unit = " in" if case.prefill_only else ""
            ratio, base = "", _base(rows, row)
            if row is not base and base.reports.get(case):
                ratio = f"{_spread(_ratios(base.reports[case], reports, case), 2)} x as fast"
                ratio += "" if base is rows[0] else f" ({base.engine.weights})"
            cells = [title, row.label, f"{_spread(speeds, 1)}{unit}", ratio]
            cells += ["", "", ""] if row.engine.offline else _times(row, case)
            cells += [_floor_share(reports, case, floor)] if floor else []
            lines.append(f"| {' | '.join(cells)} |")
            title = ""
    return lines


def _floor_share(reports: Sequence[Measured], case: Case, floor: Floor) -> str:
    """Of the time that the runs took; "" where a request failed, or the load was not a closed loop."""
    if case.concurrency is None or case.turns or any(report.errors for report in reports):
        return ""
    shares = []
    for report in reports:
        inputs = [request.prompt_tokens for request in report.requests]
        outputs = [request.completion_tokens for request in report.requests]
        shares.append(floor.seconds(inputs, outputs, case.at_once) / report.duration)
    return f"{median(shares):.0%}"


def _base(rows: Sequence[Row], row: Row) -> Row:
    """What a row is compared with: the first one's kind of engine, quantised weights with quantised ones."""
    first = rows[0].engine
    same = [
        other
        for other in rows
        if other.engine.kind == first.kind and other.engine.quantized == row.engine.quantized
    ]
    return rows[0] if first.quantized == row.engine.quantized or not same else same[0]


def _times(row: Row, case: Case) -> list[str]:
    """p50 (p99) of the first token, of each further one, of the whole, over all rounds."""
    times = samples(row.requests(case))
    cells = []
    for metric, digits in (("ttft", 0), ("tpot", 1), ("e2el", 0)):
        values = times[metric]
        if values:
            middle, high = percentile(values, 50), percentile(values, 99)
            cells.append(f"{middle:,.{digits}f} ({high:,.{digits}f}) ms")
        else:
            cells.append("")
    return cells


def _ratios(ours: Sequence[Measured], theirs: Sequence[Measured], case: Case) -> list[float]:
    """How many times as fast we are, round by round; NaN where there is nothing to divide by.

    In an open loop the throughput is what was offered, so there the time of a whole request counts.
    """

    def merit(report: Measured) -> float:
        if case.concurrency is None:
            values = samples(report.requests)["e2el"]
            return 1 / median(values) if values else 0.0
        return report.input_throughput if case.prefill_only else report.output_throughput

    return [merit(a) / merit(b) if merit(b) else float("nan") for a, b in zip(ours, theirs, strict=False)]


def _spread(values: Sequence[float], digits: int) -> str:
    """`median (least to most)`; of a single value, that alone."""
    middle = f"{median(values):,.{digits}f}"
    return f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})" if len(values) > 1 else middle


def _engines(rows: Sequence[Row]) -> list[str]:
    lines = ["| engine | weights | version | ready after | memory | CPU when idle | |", f"|{'---|' * 7}"]
    for row in rows:
        engine = row.engine
        here = [f"{_spread(row.ready_s, 1)} s", f"{row.memory / 1e9:.2f} GB", f"{100 * row.idle_cpu:.0f} %"]
        cells = [engine.name, engine.weights, engine.version, *(here if not engine.url else [""] * 3)]
        lines.append(f"| {' | '.join([*cells, engine.remark])} |")
    return lines


def _sent(rows: Sequence[Row], cases: Sequence[Case]) -> list[str]:
    """What the workloads are, with the prompt tokens as the servers counted them."""
    lines = []
    for case in cases:
        if case.busy:
            continue
        counted = sorted({request.prompt_tokens for row in rows for request in row.requests(case)} - {0}) or [
            0
        ]
        answers = Span(min(out for _, out in case.lengths), max(out for _, out in case.lengths))
        count = len(case.lengths) * max(1, case.turns)
        prompts = Span(counted[0], counted[-1])
        lines.append(f"* {case}: {count} requests a round, {prompts} tokens in, {answers} out")
    return lines


def _limits(rows: Sequence[Row], floor: Floor | None) -> list[str]:
    """What the floor is, and which engines had to preempt."""
    lines = [f"Preempted requests, warm-up included: {row.label}: {row.preemptions}." for row in rows if
             row.preemptions]  # fmt: skip
    if floor:
        lines.append("The floor is the time that reading the weights and the KV cache once a step takes at "
                     f"{floor.bytes_s / 1e12:.3g} TB/s.")  # fmt: skip
    return lines


def _beside_a_neighbour(rows: Sequence[Row], busy: Sequence[Case]) -> list[str]:
    quiet = [replace(case, busy=False) for case in busy]
    lines = [f"| throughput kept beside a busy neighbour | {' | '.join(map(str, quiet))} |"]
    lines.append(f"|{'---|' * (1 + len(quiet))}")
    for row in rows:
        cells = []
        for alone, with_neighbour in zip(quiet, busy, strict=True):
            pairs = (row.reports.get(with_neighbour, []), row.reports.get(alone, []))
            cells.append(_spread(_ratios(*pairs, alone), 2) if all(pairs) else "")
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return lines


def _reused(rows: Sequence[Row], cases: Sequence[Case]) -> list[str]:
    """How much of the chats' prompts came from a cache, of the engines that say so."""
    shares = []
    for case in (case for case in cases if case.turns and not case.busy):
        for row in rows:
            requests = [request for request in row.requests(case) if request.cached_tokens is not None]
            total = sum(request.prompt_tokens for request in requests)
            if total:
                cached = sum(request.cached_tokens or 0 for request in requests)
                shares.append(f"{row.engine.name} {100 * cached / total:.0f} %")
    return [f"Prompt tokens of the chats taken from the prefix cache: {', '.join(shares)}."] if shares else []


def _client(rows: Sequence[Row]) -> list[str]:
    reports = [report for row in rows for reports in row.reports.values() for report in reports]
    if not reports:
        return []
    share = max(report.client_cpu_s / report.duration for report in reports)
    return [f"The client took at most {100 * share:.0f} % of a core."]


def as_json(
    rows: Sequence[Row], cases: Sequence[Case], facts: dict[str, Any], *, detailed: bool
) -> dict[str, Any]:
    """`results` has every round of every engine in the form of `vllm bench serve --save-result`."""
    engines = [
        {
            "engine": row.engine.name,
            "weights": row.engine.weights,
            "version": row.engine.version,
            "remark": row.engine.remark,
            "command": shlex.join(row.engine.command),
            "environment": dict(row.engine.environment),
            "ready_s": row.ready_s,
            "memory_bytes": row.memory,
            "idle_cpu": row.idle_cpu,
            "preemptions": row.preemptions,
            "trouble": row.trouble,
        }
        for row in rows
    ]
    results = [
        as_vllm(report, case, model=facts["model"], label=row.engine.name, detailed=detailed)
        | {"weights": row.engine.weights, "busy_neighbour": case.busy, "round": number}
        for row in rows
        for case in cases
        for number, report in enumerate(row.reports.get(case, ()), 1)
    ]
    floor = facts.get("floor")
    return {**facts, "floor": floor and asdict(floor), "engines": engines, "results": results}
