"""Measures where the time of steps goes, by their parts: for `/metrics` and for `--log-step-times`.

`StepClock` is the host's, `DeviceClock` a GPU's; `StepReport` sums their times up by kind of step and writes
tables. A step's times are recorded when its tokens arrive and include everything since the previous record,
so records sum to the time of the engine's thread. With asynchronous scheduling, where the host prepares step
k+1 while step k runs, a record includes the launch of the next step. What the GPU did is of the step itself.

Imports no torch before a GPU is measured: the API process reads the names of the parts.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Literal, ParamSpec, Protocol, TypeVar, get_args

from microvllm.runtime.core.plan import ScheduledRequest

if TYPE_CHECKING:
    import torch

    from microvllm.adapters.decoder import DecoderModel
    from microvllm.ops.attention import AttentionBackend, AttentionBatch, StepAttention

Part = Literal["schedule", "prepare", "forward", "sample", "wait", "commit", "messages", "idle"]
PARTS: tuple[Part, ...] = get_args(Part)
STEP_PARTS = tuple(part for part in PARTS if part != "idle")
ForwardPart = Literal["embedding", "attention", "head"]
FORWARD_PARTS: tuple[ForwardPart, ...] = get_args(ForwardPart)
GPU_BUSY, GPU_IDLE = "GPU busy", "GPU idle"
ALL_PARTS = (*PARTS, *FORWARD_PARTS, GPU_BUSY, GPU_IDLE)  # the order of `EngineStats.step_seconds`

Kind = Literal["decode", "prefill"]  # every request computes one token; some request computes more
KINDS: tuple[Kind, ...] = get_args(Kind)
HEADINGS: dict[Kind, str] = {"decode": "decode", "prefill": "with prefill"}

INTERVAL_S = 10.0
MAX_TOTALS = 100_000  # the newest steps, whose quantiles are reported
LABEL_WIDTH, MS_WIDTH, SHARE_WIDTH = 14, 14, 8

P = ParamSpec("P")
T = TypeVar("T")


# ---- the host's clock ------------------------------------------------------------------------------


class StepClock:
    """Seconds by part. It is in one part at any moment, so together they are the time since it was made.

    The seconds are the host's. A GPU works behind it: there "forward" and "sample" are what launching the
    kernels takes (a captured graph is all "forward"), and "wait" is how much longer the device needs.
    `inside` has how much of "forward" functions took that were made by `timed`: zero unless measured.
    """

    __slots__ = ("_part", "_since", "inside", "seconds")

    def __init__(self) -> None:
        self.seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self.inside: dict[ForwardPart, float] = dict.fromkeys(FORWARD_PARTS, 0.0)
        self._part: Part = "idle"
        self._since = perf_counter()

    def enter(self, part: Part) -> None:
        now = perf_counter()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def read(self, device: DeviceClock | None) -> list[float]:
        """The seconds in the order of `ALL_PARTS`, without a GPU's if none is measured."""
        found = [*self.seconds.values(), *self.inside.values()]
        return found if device is None else [*found, device.busy_seconds, device.idle_seconds]

    def timed(self, part: ForwardPart, function: Callable[P, T]) -> Callable[P, T]:
        """The function, its time added to `inside`; for what has done its work when it returns."""

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            start = perf_counter()
            result = function(*args, **kwargs)
            self.inside[part] += perf_counter() - start
            return result

        return run


class TimedAttention:
    """An attention backend whose time the clock takes: q/k norms, rotation, KV write and attention."""

    def __init__(self, backend: AttentionBackend, clock: StepClock) -> None:
        self._backend = backend
        self._clock = clock

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        return self._clock.timed("attention", self._backend.begin_step(batch))


def time_forward(model: DecoderModel, attention: AttentionBackend, clock: StepClock) -> AttentionBackend:
    """Let the clock time the model's embedding and head (the last norm and the logits) -> timed attention."""
    # A model that has slept may have those of the clock before.
    model.embed = clock.timed("embedding", inspect.unwrap(model.embed))
    model.head = clock.timed("head", inspect.unwrap(model.head))
    return TimedAttention(attention, clock)


# ---- a GPU's clock ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Span:
    """One step on the device. `rested`: there was nothing to do before it.

    `pause`: the events around the time in which the rest of its work was not launched yet.
    """

    begin: torch.cuda.Event
    rested: bool
    end: torch.cuda.Event | None = None
    pause: tuple[torch.cuda.Event, torch.cuda.Event] | None = None


class DeviceClock:
    """Seconds that the GPU was busy with steps, and idle between them although there was work.

    A step is busy from its first kernel to its tokens' way to the host, gaps between its kernels included.
    The idle time before it runs from the end of the step before: what the GPU waited for the host. So is the
    time in which its sampling waited for masks. Time in which the engine had no requests is neither. Steps
    must be reported in the order of their launch.
    """

    def __init__(self, clock: StepClock) -> None:
        self.busy_seconds = 0.0
        self.idle_seconds = 0.0
        self._clock = clock
        self._host_idle = -1.0  # seconds that the host had nothing to do, up to the last step
        self._spans: deque[_Span] = deque()  # launched and not collected
        self._last_end: torch.cuda.Event | None = None

    def begin(self) -> None:
        """The step's first kernel is launched next."""
        if self._spans and self._spans[-1].end is None:
            self._spans.pop()  # its launch failed
        idle = self._clock.seconds["idle"]
        span = _Span(_event(), rested=idle != self._host_idle)
        self._host_idle = idle
        span.begin.record()
        self._spans.append(span)

    def end(self) -> None:
        """All of the step was launched."""
        self._spans[-1].end = end = _event()
        end.record()

    def resume(self) -> None:
        """The rest of the newest step is launched next."""
        span = self._spans[-1]
        if span.end is not None:
            resumed = _event()
            resumed.record()
            span.pause, span.end = (span.end, resumed), None

    def collect(self) -> None:
        """Count the oldest step; waits until the GPU has finished it."""
        span = self._spans.popleft()
        if span.end is None:
            raise RuntimeError("a step is collected whose end was not launched")
        span.end.synchronize()
        paused = span.pause[0].elapsed_time(span.pause[1]) / 1e3 if span.pause is not None else 0.0
        self.busy_seconds += span.begin.elapsed_time(span.end) / 1e3 - paused
        self.idle_seconds += paused
        if self._last_end is not None and not span.rested:
            self.idle_seconds += self._last_end.elapsed_time(span.begin) / 1e3
        self._last_end = span.end


def _event() -> torch.cuda.Event:
    import torch

    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


# ---- sums over steps, and their table --------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """Steps of one kind: sums over them, seconds by part, and the seconds of each step as a whole.

    `seconds` has the parts of a step, the measured parts of "forward", and on a GPU its busy and idle time.
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


# ---- the report ------------------------------------------------------------------------------------


class Measured(Protocol):
    """A runner whose steps are measured."""

    @property
    def clock(self) -> StepClock:
        """Measures the parts of a step; launching it enters them."""
        ...

    @property
    def device_clock(self) -> DeviceClock | None:
        """Set if the times of steps are logged and a GPU computes them."""
        ...

    @property
    def graph_replays(self) -> int:
        """Steps that ran as a captured graph."""
        ...

    @property
    def padded_tokens(self) -> int:
        """What those computed beside their tokens."""
        ...


class StepReport:
    """The accounts of a runner's steps, as tables on stderr."""

    def __init__(self, source: Measured) -> None:
        self._source = source
        self._whole = Period()  # what was reported
        self._part = Period()  # since then
        self._tables = 0
        source.clock.enter("idle")  # what was before belongs to no account
        self._since = perf_counter()
        self._seconds = self._read()
        self._graph_replays = source.graph_replays

    def add(self, scheduled: Sequence[ScheduledRequest]) -> None:
        """The tokens of this step are known: close its account."""
        num_tokens = sum(item.num_new - item.num_draft_tokens for item in scheduled)
        before, self._seconds = self._seconds, self._read()
        spent = {part: seconds - before[part] for part, seconds in self._seconds.items()}
        self._part.idle += spent.pop("idle")
        step = Tally(1, len(scheduled), num_tokens, spent)
        step.totals.append(step.total)
        self._part.kinds["decode" if num_tokens == len(scheduled) else "prefill"].add(step)

    def write_if_due(self, resting: bool) -> None:
        """A table after `INTERVAL_S` of steps, and of fewer when the engine comes to rest.

        Never two tables within that time.
        """
        passed = perf_counter() - self._since
        if passed >= INTERVAL_S and (resting or passed - self._part.idle >= INTERVAL_S):
            self.write()

    def write(self) -> None:
        """A table of the time since the last one, if steps ran."""
        if self._part.steps:
            part = self._end_part()
            self._tables += 1
            _write(render(part, f"Step times of the last {part.seconds:.1f} s"))

    def write_last(self) -> None:
        """The table of all that was measured."""
        if self._tables == 0 or (self._tables == 1 and not self._part.steps):
            self.write()
        else:
            self._end_part()
            _write(render(self._whole, f"Step times of all {self._whole.seconds:.1f} s"))

    def _end_part(self) -> Period:
        part, self._part = self._part, Period()
        before, self._since = self._since, perf_counter()
        part.seconds = self._since - before
        replays, self._graph_replays = self._graph_replays, self._source.graph_replays
        part.graph_replays = self._graph_replays - replays
        self._whole.add(part)
        return part

    def _read(self) -> dict[str, float]:
        seconds = self._source.clock.read(self._source.device_clock)
        return dict(zip(ALL_PARTS, seconds, strict=False))


def _write(table: str) -> None:
    """Write once and below a line that was begun, since other threads write to stderr as well."""
    with contextlib.suppress(OSError, ValueError):  # stderr was closed: no reason to stop computing
        sys.stderr.write(f"\n{table}\n")
        sys.stderr.flush()
