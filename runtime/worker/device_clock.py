"""How long a GPU works on each step, and how long it waits between two: measured on the GPU, by events."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from microvllm.runtime.worker.step_clock import StepClock


@dataclass(slots=True)
class _Span:
    """One step on the device. `rested`: there was nothing to do before it."""

    begin: torch.cuda.Event
    rested: bool
    end: torch.cuda.Event | None = None


class DeviceClock:
    """Seconds that the GPU was busy with steps, and idle between them although there was work.

    A step is busy from its first kernel to its tokens' way to the host, gaps between its kernels included.
    The idle time before it runs from the end of the step before: what the GPU waited for the host. Time in
    which the engine had no requests is neither. Steps are told in the order in which they were launched.
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

    def collect(self) -> None:
        """Count the oldest step; waits until the GPU has finished it."""
        span = self._spans.popleft()
        if span.end is None:
            raise RuntimeError("a step is collected whose end was not launched")
        span.end.synchronize()
        self.busy_seconds += span.begin.elapsed_time(span.end) / 1e3
        if self._last_end is not None and not span.rested:
            self.idle_seconds += self._last_end.elapsed_time(span.begin) / 1e3
        self._last_end = span.end


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
