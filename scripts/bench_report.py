"""What bench_cpu.py has measured, as Markdown tables and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench_engines import Engine
from bench_serve import Report, RequestResult, percentile


@dataclass(frozen=True, slots=True)
class Shape:
    """One measurement of a round."""

    streams: int
    busy: bool
    """With one competing process that never rests."""

    def __str__(self) -> str:
        streams = f"{self.streams} stream{'s' if self.streams > 1 else ''}"
        return f"{streams}, busy neighbour" if self.busy else streams


@dataclass(slots=True)
class Row:
    """What was measured of one engine; `reports` has one report a round."""

    engine: Engine
    ready_s: float = 0.0
    idle_cpu: float = 0.0
    """Share of a core that the server took while it had nothing to do and was not halted."""
    memory: int = 0
    reports: dict[Shape, list[Report]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.engine.name}, {self.engine.weights}"

    def throughputs(self, shape: Shape) -> list[float]:
        """Output tokens a second, by round."""
        return [report.output_throughput for report in self.reports[shape]]

    def median_ms(self, shape: Shape, metric: str) -> float:
        """Median over all requests of all rounds of `ttft` or `tpot`, in ms; NaN if there is none."""
        samples = [value for report in self.reports[shape] for value in report.samples()[metric]]
        return percentile(samples, 50) if samples else float("nan")

    def requests(self) -> Iterator[RequestResult]:
        """All requests of all rounds."""
        for reports in self.reports.values():
            for report in reports:
                yield from report.requests

    def errors(self) -> list[str]:
        """What went wrong in any request, once each."""
        return sorted({request.error for request in self.requests() if request.error})


def markdown(rows: Sequence[Row], shapes: Sequence[Shape], facts: dict[str, Any]) -> str:
    """All tables; the first row is the engine that the others are compared with."""
    blocks = [_heading(rows, facts), _engine_table(rows)]
    blocks += [_speed_table(rows, shape) for shape in shapes]
    if busy := [shape for shape in shapes if shape.busy]:
        blocks.append(_busy_table(rows, busy))
    if facts["left_out"]:
        blocks.append([f"Left out: {'; '.join(facts['left_out'])}."])
    blocks += [[f"Error with {row.label}: {error}"] for row in rows for error in row.errors()]
    return "\n\n".join("\n".join(block) for block in blocks)


def _heading(rows: Sequence[Row], facts: dict[str, Any]) -> list[str]:
    machine = facts["machine"]
    lengths = sorted({request.prompt_tokens for row in rows for request in row.requests()} - {0})
    return [
        f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['flags'])}), {machine['system']}, "
        f"load {machine['load']:.1f} beforehand, {facts['date']}.",
        f"{facts['model']}, {' or '.join(map(str, lengths)) or '?'} tokens in, "
        f"{facts['output_len']} out, greedy; "
        f"median (least to most) of {facts['rounds']} rounds.",
    ]


def _engine_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| engine | weights | version | ready after | memory | CPU when idle | |", f"|{'---|' * 7}"]
    for row in rows:
        engine = row.engine
        lines.append(
            f"| {engine.name} | {engine.weights} | {engine.version} | {row.ready_s:.1f} s "
            f"| {row.memory / 1e9:.2f} GB | {100 * row.idle_cpu:.0f} % | {engine.remark} |"
        )
    return lines


def _speed_table(rows: Sequence[Row], shape: Shape) -> list[str]:
    ours = rows[0]
    columns = ["output tokens/s", f"{ours.engine.name} is", "first token", "each further token"]
    lines = [f"| {shape} | {' | '.join(columns)} |", f"|{'---|' * 5}"]
    for row in rows:
        speeds = row.throughputs(shape)
        ratio = "" if row is ours else f"{_spread(_quotients(ours.throughputs(shape), speeds), 2)} x as fast"
        ttft, tpot = row.median_ms(shape, "ttft"), row.median_ms(shape, "tpot")
        lines.append(f"| {row.label} | {_spread(speeds, 1)} | {ratio} | {ttft:.0f} ms | {tpot:.1f} ms |")
    return lines


def _busy_table(rows: Sequence[Row], shapes: Sequence[Shape]) -> list[str]:
    quiet = [Shape(shape.streams, busy=False) for shape in shapes]
    lines = [f"| throughput kept beside a busy neighbour | {' | '.join(map(str, quiet))} |"]
    lines.append(f"|{'---|' * (1 + len(quiet))}")
    for row in rows:
        kept = [
            _quotients(row.throughputs(with_neighbour), row.throughputs(alone))
            for with_neighbour, alone in zip(shapes, quiet, strict=True)
        ]
        lines.append(f"| {row.label} | {' | '.join(_spread(shares, 2) for shares in kept)} |")
    return lines


def _quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round; NaN where there is nothing to divide by."""
    return [a / b if b else float("nan") for a, b in zip(above, below, strict=True)]


def _spread(values: Sequence[float], digits: int) -> str:
    """`median (least to most)`."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def as_json(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """The result with every round of every engine."""
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
            "rounds": {
                str(shape): [report.as_dict() for report in reports] for shape, reports in row.reports.items()
            },
        }
        for row in rows
    ]
    return {**facts, "engines": engines}
