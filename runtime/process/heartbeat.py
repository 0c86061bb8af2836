"""Detects a frozen engine process, a step that hangs and, from the engine's side, a server that is gone.

The engine process beats from a thread of its own, so neither a step of a minute on a slow processor nor a
request-free hour is silence. Silence alone proves nothing on a machine with fifty other loads: the process
is frozen only if it has also had no processor time meanwhile and no thread of it is waiting for any. For the
same reason a step's time is without that for which a thread of it waited for a processor.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.process.channel import Beat, EngineEnd, Link

BEAT_S = 1.0
FROZEN_S = 6.0  # with the last beat's age, the tick and the first request of a probe below 10 s
EXIT_S = 2.0  # for the main thread to end by itself when the server is gone
# A step that takes longer than this, and than the largest one would on a very slow machine, hangs.
LONGEST_STEP_S = 60.0
SLOWEST_FLOPS = 1e10
STACKS_SIGNAL = getattr(signal, "SIGUSR1", None)


class Heartbeat:
    """The engine's side: a thread that sends a `Beat` each `BEAT_S` and ends the process with its server.

    `resting` is set by the step loop while it waits for requests. No beat is sent before `begin`.
    """

    def __init__(self, channel: EngineEnd) -> None:
        self.resting = False
        self._channel = channel
        self._beating = False
        threading.Thread(target=self._beat_until_hangup, name="heartbeat", daemon=True).start()

    def begin(self) -> None:
        """Start to beat: the model is loaded."""
        self._beating = True

    def _beat_until_hangup(self) -> None:
        beat_until_hangup(self._channel, self._beat)
        # While a model loads, or a long step runs, the main thread does not read its socket.
        time.sleep(EXIT_S)
        os._exit(0)

    def _beat(self) -> None:
        if self._beating:
            self._channel.send_event(Beat(self.resting))


def beat_until_hangup(link: Link[Any], beat: Callable[[], None]) -> None:
    """Call `beat` each `BEAT_S` until the link's other side is gone."""
    hangup = select.poll()
    hangup.register(link.fileno(), getattr(select, "POLLRDHUP", 0))
    while not hangup.poll(BEAT_S * 1000):
        with contextlib.suppress(OSError):  # the other side is gone, which the next poll reports
            beat()


def print_stacks_on_signal() -> None:
    """Print the Python stacks of all threads on stderr at `STACKS_SIGNAL`, and when the process crashes."""
    if sys.stderr is None or STACKS_SIGNAL is None:
        return
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL)


def longest_step_s(config: EngineConfig) -> float:
    """Return how many seconds a step may take: two operations per weight and token, on a slow machine."""
    return LONGEST_STEP_S + 2.0 * config.max_num_batched_tokens * config.spec.num_products / SLOWEST_FLOPS


class Watch:
    """The server's side: judges one engine process by its beats, its steps and its processor time.

    Its clock is the sum of its own ticks: time in which the server did not run either is no silence.
    """

    def __init__(self, pid: int, longest_step_s: float) -> None:
        self.problem: str | None = None  # one line, while the engine is frozen or hangs
        self.missed = False  # beats, without another sign of life at the last tick: no proof of anything yet
        self.longest_step_s = longest_step_s
        self._pid = pid
        self._silent_s = 0.0  # without a beat, a step, or processor time
        self._step_s = 0.0  # since the last step, or the last moment without work
        self._delays: dict[str, int] = {}  # each thread's at the last tick of a step that takes long
        self._resting = True
        self._used: int | None = None  # processor time, read first when the silence begins
        self._ticked = time.monotonic()

    def on_beat(self, resting: bool) -> None:
        self._resting, self._silent_s, self._used, self.missed = resting, 0.0, None, False

    def on_step(self) -> None:
        self._silent_s, self._step_s, self._used, self.missed = 0.0, 0.0, None, False

    def tick(self, busy: bool, interval_s: float, *, unbounded: bool = False) -> str | None:
        """Take note of the time that has passed -> the problem, if there is one.

        `busy`: requests are open. `unbounded`: what it does may take longer than any step. To be called about
        every `interval_s` seconds.
        """
        now = time.monotonic()
        elapsed, self._ticked = min(now - self._ticked, 2 * interval_s), now
        self._step_s = self._step_s + elapsed if (busy or not self._resting) and not unbounded else 0.0
        # Most steps are shorter than two ticks: nothing is read for them.
        before, self._delays = self._delays, delays_of(self._pid) if self._step_s > 2 * interval_s else {}
        delays = (delay - before.get(name, delay) for name, delay in self._delays.items())
        self._step_s -= min(elapsed, max(delays, default=0) / 1e9)
        self._silent_s += elapsed
        self.missed = self._silent_s > BEAT_S + interval_s and not self._shows_life()
        if self._silent_s > BEAT_S + interval_s and not self.missed:
            self._silent_s = 0.0
        if self._silent_s > FROZEN_S:
            self.problem = f"gave no sign of life and took no processor time for {self._silent_s:.0f} s"
        elif self._step_s > self.longest_step_s:
            self.problem = f"has been in one step for {self._step_s:.0f} s"
        else:
            self.problem = None
        return self.problem

    def _shows_life(self) -> bool:
        """Return whether a thread of the engine waits for a processor, or has had one since the last call."""
        states, used = threads_of(self._pid)
        if not states:  # no /proc: only the bound of the longest step is left
            return True
        before, self._used = self._used, used
        return "R" in states or (before is not None and used > before)


def delays_of(pid: int) -> dict[str, int]:
    """Return by each thread's id for how many ns it was ready and had no processor; {} if that is not known.

    The second figure of `schedstat` (Documentation/scheduler/sched-stats.rst in Linux). A thread that sleeps
    or is stopped has no such time.
    """
    delays = {}
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError, IndexError):  # it ended meanwhile, or there is no such figure
                delays[thread.name] = int((thread / "schedstat").read_text().split()[1])
    return delays


def threads_of(pid: int) -> tuple[str, int]:
    """Return the states of all threads of a process, a letter each as in proc(5), and their processor time.

    The time is in ticks of the system's clock, usually of 10 ms. ("", 0) where there is no /proc.
    """
    states, used = "", 0
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it ended meanwhile
                fields = (thread / "stat").read_text().rpartition(")")[2].split()
                states += fields[0]
                used += int(fields[11]) + int(fields[12])
    return states, used
