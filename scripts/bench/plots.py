"""Draws the plots of a comparison. Imports matplotlib when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.rounds import Row
from bench.workloads import Case
from microvllm.openai_compat.bench.client import BenchError
from microvllm.openai_compat.bench.figures import percentile, samples


def draw(rows: Sequence[Row], cases: Sequence[Case], folder: Path) -> list[Path]:
    """Write the plots that the cases allow as PNG files. Raises `BenchError` without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")  # files only: no display is needed
        from matplotlib import pyplot
    except ImportError as error:
        raise BenchError(
            f"no plots: {error}; pip install matplotlib (or this project with the extra `bench`)"
        ) from error
    cases = [case for case in cases if not case.busy]
    rows = [row for row in rows if row.reports]
    pictures = {
        "throughput.png": _throughput(pyplot, rows, cases),
        "latency.png": _distributions(pyplot, rows, cases),
        "sweep.png": _sweep(pyplot, rows, cases),
    }
    written = []
    for name, figure in pictures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=150)
            pyplot.close(figure)
            written.append(folder / name)
    return written


def _throughput(pyplot: Any, rows: Sequence[Row], cases: Sequence[Case]) -> Any:
    """Output tokens a second against concurrency: the median of the rounds, least to most shaded."""
    chosen = [case for case in cases if case.workload == "streams"]
    if len(chosen) < 2:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, row in enumerate(rows):
        points = [
            (case.at_once, [report.output_throughput for report in row.reports[case]])
            for case in chosen
            if row.reports.get(case)
        ]
        streams = [count for count, _ in points]
        axes.plot(streams, [median(s) for _, s in points], "o-", color=f"C{number}", label=row.label)
        axes.fill_between(
            streams, [min(s) for _, s in points], [max(s) for _, s in points], color=f"C{number}", alpha=0.15
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([case.at_once for case in chosen], [str(case.at_once) for case in chosen])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="requests at once", ylabel="output tokens/s", title="Throughput against concurrency")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _distributions(pyplot: Any, rows: Sequence[Row], cases: Sequence[Case]) -> Any:
    """For each workload (its largest load) the share of requests at or below a time, over all rounds."""
    shown = [case for case in cases if not case.prefill_only and any(row.good(case) for row in rows)]
    last = list({case.workload: case for case in shown}.values())
    if not last:
        return None
    figure, grid = pyplot.subplots(
        len(last), 2, figsize=(10, 2.8 * len(last)), layout="constrained", squeeze=False
    )
    for case, pair in zip(last, grid, strict=True):
        for axes, (metric, name) in zip(
            pair, (("ttft", "time to first token"), ("tpot", "time per output token")), strict=True
        ):
            for number, row in enumerate(rows):
                times = samples(row.requests(case))[metric]
                values = sorted(value for value in times if value > 0)  # as the axis is logarithmic
                if values:
                    shares = [index / len(values) for index in range(len(values) + 1)]
                    axes.step(values[:1] + values, shares, where="post", color=f"C{number}", label=row.label)
            axes.set(xscale="log", ylim=(0, 1.02), title=str(case), xlabel=f"{name}, ms")
            axes.set_ylabel("share of requests")
            _plain_numbers(axes.xaxis, *axes.get_xlim())
            axes.grid(alpha=0.3, which="both")
    grid[0][0].legend(fontsize="small")
    return figure


def _sweep(pyplot: Any, rows: Sequence[Row], cases: Sequence[Case]) -> Any:
    """Time to first token against the rate at which requests come: p50, and p99 dashed."""
    chosen = [case for case in cases if case.workload == "sweep"]
    if len(chosen) < 2 or not any(row.good(case) for row in rows for case in chosen):
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, row in enumerate(rows):
        points = [
            (case.request_rate, times) for case in chosen if (times := samples(row.requests(case))["ttft"])
        ]
        rates = [rate for rate, _ in points]
        for percent, style in ((50, "o-"), (99, "o--")):
            label = row.label if percent == 50 else None
            values = [percentile(times, percent) for _, times in points]
            axes.plot(rates, values, style, color=f"C{number}", label=label)
    axes.set(xlabel="requests/s, Poisson", ylabel="time to first token, ms (dashed: p99)", yscale="log")
    axes.set_title("First token under open load")
    axes.set_xscale("log", base=2)
    axes.set_xticks([case.request_rate for case in chosen], [f"{case.request_rate:g}" for case in chosen])
    _plain_numbers(axes.yaxis, *axes.get_ylim())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def _plain_numbers(axis: Any, low: float, high: float) -> None:
    """Label a logarithmic axis that ends at `low` and `high` with plain numbers, as many as find room."""
    from matplotlib import ticker

    few = ticker.LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0))
    axis.set_major_locator(ticker.MaxNLocator(5) if high < 8 * low else few)
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
