"""Where the engine's thread spends its time, by the parts of a step."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Literal, ParamSpec, TypeVar, get_args

Part = Literal["schedule", "prepare", "forward", "sample", "wait", "commit", "messages", "idle"]
PARTS: tuple[Part, ...] = get_args(Part)
ForwardPart = Literal["embedding", "attention", "head"]
FORWARD_PARTS: tuple[ForwardPart, ...] = get_args(ForwardPart)

P = ParamSpec("P")
T = TypeVar("T")


class StepClock:
    """Seconds by part. It is in one part at any moment, so together they are the time since it was made.

    The seconds are the host's. A GPU works behind it: there "forward" and "sample" are what launching the
    kernels takes (a captured graph is all "forward"), and "wait" is how much longer the device needs.
    `inside` has how much of "forward" functions took that were made by `timed`: none unless asked for.
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

    def timed(self, part: ForwardPart, function: Callable[P, T]) -> Callable[P, T]:
        """The function, its time added to `inside`; for what has done its work when it returns."""

        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            start = perf_counter()
            result = function(*args, **kwargs)
            self.inside[part] += perf_counter() - start
            return result

        return run
