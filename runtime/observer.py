"""What an `EngineClient` tells about its requests, for whoever counts: metrics, logs, a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microvllm.runtime.client import TokenStream
    from microvllm.runtime.request import EngineStats


@dataclass(slots=True)
class RequestTiming:
    """When one sequence got where, in seconds of `time.monotonic()`; None is "not yet".

    `arrival` is when it was handed to the client (tokenised), `scheduled` when it first left the engine's
    queue, the others when its tokens reached this process.
    """

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True)
class SampleGroup:
    """The `n` sequences of one prompt. `longest` is the most tokens that one of the ended ones has made."""

    n: int
    unfinished: int
    longest: int = 0


class EngineObserver:
    """Told everything by the client, on its event loop; does nothing with it. Meant to be overridden.

    The calls of one step come together: `tokens` and `finished` for its requests, then `step`. No method
    may raise, and `tokens` is called for every token of every request: what it does must be cheap.
    """

    def tokens(self, stream: TokenStream, count: int, now: float) -> None:
        """`count` tokens arrived at `now`; `stream.timing.last_token` is still that of the ones before."""

    def finished(self, stream: TokenStream, reason: str) -> None:
        """A sequence has ended: "stop", "length", "repetition", "abort" or "error". Once a sequence."""

    def step(self, stats: EngineStats) -> None:
        """A step of the engine is known, and all that came of it was told."""

    def rejected(self, reason: str) -> None:
        """A request was refused; `reason` is the option whose limit it met."""

    def stopped(self) -> None:
        """The engine process has died: the next one counts from zero."""
