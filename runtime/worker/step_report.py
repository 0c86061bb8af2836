"""Keeps account of where the time of the steps goes, and writes tables of it: `--log-step-times`.

A step's account is closed when its tokens are known, and holds everything since the account before it. So the
accounts add up to the time of the engine's thread; with asynchronous scheduling, where the host prepares step
k+1 while step k runs, an account has the launch of the step after. What the GPU did is of the step itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from itertools import chain
from time import perf_counter
from typing import Protocol

from microvllm.runtime.core.plan import ScheduledRequest
from microvllm.runtime.worker.step_clock import StepClock
from microvllm.runtime.worker.step_table import GPU_BUSY, GPU_IDLE, Period, Tally, render

INTERVAL_S = 10.0


class DeviceTimes(Protocol):
    """Seconds so far; see `DeviceClock`."""

    @property
    def busy_seconds(self) -> float: ...

    @property
    def idle_seconds(self) -> float: ...


class Source(Protocol):
    """What is measured: a runner. It has a `device_clock` if it measures a GPU."""

    @property
    def clock(self) -> StepClock: ...

    @property
    def device_clock(self) -> DeviceTimes | None: ...

    @property
    def graph_replays(self) -> int: ...


class StepReport:
    """The accounts of a runner's steps, as tables on stderr."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._whole = Period()  # what was told
        self._part = Period()  # since then
        self._tables = 0
        source.clock.enter("idle")  # what was before belongs to no account
        self._since = perf_counter()
        self._seconds = self._read()
        self._graph_replays = source.graph_replays

    def add(self, scheduled: Sequence[ScheduledRequest], num_tokens: int) -> None:
        """The tokens of this step are known: close its account. `num_tokens` were computed."""
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
        clock, device = self._source.clock, self._source.device_clock
        found = dict[str, float](chain(clock.seconds.items(), clock.inside.items()))
        if device is not None:
            found[GPU_BUSY], found[GPU_IDLE] = device.busy_seconds, device.idle_seconds
        return found


def _write(table: str) -> None:
    """One write, as others write to stderr as well, below whatever line somebody has begun there."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more: no reason to stop computing
        sys.stderr.write(f"\n{table}\n")
        sys.stderr.flush()
