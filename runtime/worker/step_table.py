"""What a number of steps took by their parts, and that as a table for people."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from microvllm.runtime.worker.step_clock import PARTS

MAX_TOTALS = 100_000  # the newest steps, whose quantiles are told
LABEL_WIDTH, MS_WIDTH, SHARE_WIDTH = 14, 14, 8

Kind = Literal["decode", "prefill"]  # every request computes one token; some request computes more
KINDS: tuple[Kind, ...] = get_args(Kind)
HEADINGS: dict[Kind, str] = {"decode": "decode", "prefill": "with prefill"}
STEP_PARTS = tuple(part for part in PARTS if part != "idle")
GPU_BUSY, GPU_IDLE = "GPU busy", "GPU idle"


@dataclass(slots=True)
class Tally:
    """Steps of one kind: sums over them, seconds by part, and the seconds of each step as a whole.

    `seconds` has the parts of a step, what of "forward" was told apart, and on a GPU its busy and idle time.
    """

    steps: int = 0
    sequences: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    totals: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_TOTALS))

    @property
    def total(self) -> float:
        return sum(self.seconds[part] for part in STEP_PARTS)

    def add(self, other: Tally) -> None:
        self.steps += other.steps
        self.sequences += other.sequences
        self.tokens += other.tokens
        for part, seconds in other.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        self.totals += other.totals


@dataclass(slots=True)
class Period:
    """What one table tells. `seconds`, and of them `idle`, without requests, are of the engine's thread."""

    kinds: dict[Kind, Tally] = field(default_factory=lambda: {kind: Tally() for kind in KINDS})
    seconds: float = 0.0
    idle: float = 0.0
    graph_replays: int = 0

    @property
    def steps(self) -> int:
        return sum(tally.steps for tally in self.kinds.values())

    def add(self, other: Period) -> None:
        for kind, tally in other.kinds.items():
            self.kinds[kind].add(tally)
        self.seconds += other.seconds
        self.idle += other.idle
        self.graph_replays += other.graph_replays


def render(period: Period, title: str) -> str:
    """The table, at most 58 columns wide but for the title and the notes, without a newline at its end."""
    kinds = [kind for kind in KINDS if period.kinds[kind].steps]
    tallies = [period.kinds[kind] for kind in kinds]
    rested = f", {period.idle:.1f} s of it without requests" if period.idle >= 0.05 else ""
    lines = [f"{title}{rested}:"]

    def line(label: str, values: Iterable[str], shares: Iterable[str] | None = None) -> None:
        cells = [value.rjust(MS_WIDTH) for value in values]
        beside = [""] * len(cells) if shares is None else shares
        columns = (cell + share.rjust(SHARE_WIDTH) for cell, share in zip(cells, beside, strict=True))
        lines.append((label.ljust(LABEL_WIDTH) + "".join(columns)).rstrip())

    def part(label: str, seconds: Callable[[Tally], float]) -> None:
        line(
            label,
            (f"{1e3 * seconds(tally) / tally.steps:.3f}" for tally in tallies),
            (f"{seconds(tally) / tally.total:.1%}" if tally.total else "" for tally in tallies),
        )

    line("", (HEADINGS[kind] for kind in kinds))
    line("steps", (f"{tally.steps:,}" for tally in tallies))
    line("sequences", (f"{tally.sequences / tally.steps:,.1f}" for tally in tallies))
    line("tokens", (f"{tally.tokens / tally.steps:,.1f}" for tally in tallies))
    line("", ("ms" for _ in tallies), ("share" for _ in tallies))
    for name in STEP_PARTS:
        part(name, lambda tally, name=name: tally.seconds[name])  # type: ignore[misc]
        if name == "forward" and any(tally.seconds["embedding"] for tally in tallies):
            part("  embedding", lambda tally: tally.seconds["embedding"])
            part("  cache, attn.", lambda tally: tally.seconds["attention"])
            part("  layers", _layers)
            part("  norm, head", lambda tally: tally.seconds["head"])
    part("step", lambda tally: tally.total)
    for label, share in (("  p50", 0.5), ("  p99", 0.99)):
        line(label, (f"{1e3 * quantile(tally.totals, share):.3f}" for tally in tallies))
    if any(GPU_BUSY in tally.seconds for tally in tallies):
        part(GPU_BUSY, lambda tally: tally.seconds[GPU_BUSY])
        part(GPU_IDLE, lambda tally: tally.seconds[GPU_IDLE])
        lines.append(
            "forward and sample are the host's launches, wait is for the GPU; GPU idle: between steps"
        )
    if period.graph_replays:
        lines.append(f"{period.graph_replays:,} steps ran as a CUDA graph, whose parts cannot be told apart")
    return "\n".join(lines)


def _layers(tally: Tally) -> float:
    """What is left of "forward": the layers' norms and products, and little else."""
    inside = tally.seconds["embedding"] + tally.seconds["attention"] + tally.seconds["head"]
    return tally.seconds["forward"] - inside


def quantile(values: Iterable[float], share: float) -> float:
    """The least of the values that `share` of them do not exceed (nearest rank)."""
    ranked: Sequence[float] = sorted(values)
    return ranked[max(0, -int(-share * len(ranked) // 1) - 1)]
