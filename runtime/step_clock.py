"""Where the engine's thread spends its time, by the parts of a step."""

from __future__ import annotations

from time import perf_counter
from typing import Literal, get_args

Part = Literal["schedule", "prepare", "forward", "sample", "wait", "commit", "messages", "idle"]
PARTS: tuple[Part, ...] = get_args(Part)


class StepClock:
    """Seconds by part. It is in one part at any moment, so together they are the time since it was made.

    The seconds are the host's. A GPU works behind it: there "forward" and "sample" are what launching the
    kernels takes (a captured graph is all "forward"), and "wait" is how much longer the device needs.
    """

    __slots__ = ("_part", "_since", "seconds")

    def __init__(self) -> None:
        self.seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._part: Part = "idle"
        self._since = perf_counter()

    def enter(self, part: Part) -> None:
        now = perf_counter()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now
