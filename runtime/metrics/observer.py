"""Defines what is reported of requests to metrics and logs."""

from __future__ import annotations

from dataclasses import dataclass

from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.request import EngineRequest, StepOutput


@dataclass(slots=True)
class RequestTiming:
    """The times of one sequence in seconds of `time.monotonic()`; None is "not yet".

    `arrival` is when it was handed to the client (tokenised), `scheduled` when it first left the engine's
    queue, the others when its tokens reached this process.
    """

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True)
class SampleGroup:
    """The `n` sequences of one prompt; `longest` is the largest number of tokens of an ended one."""

    n: int
    unfinished: int
    longest: int = 0


class TrackedSequence:
    """The counts and times of one sequence, from its arrival (`time.monotonic()`) to its end."""

    def __init__(self, request: EngineRequest, group: SampleGroup, arrival: float) -> None:
        self.prompt_token_ids = request.prompt_token_ids
        self.max_tokens = request.params.max_tokens
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        self.num_preemptions = 0
        self.pooled: bytes | None = None  # the vector of `StepOutput`
        self.end_reason: str | None = None  # as `EngineObserver.on_finished` has it
        self.timing = RequestTiming(arrival)
        self.group = group
        self.name = ""  # of the caller's request, for the log

    def record_output(
        self, output: StepOutput, num_tokens: int, now: float, observer: EngineObserver
    ) -> None:
        """Record the output of one step, of which `num_tokens` belong to the answer."""
        timing = self.timing
        if timing.first_token is None:
            self.num_cached_tokens = output.num_cached_tokens
            timing.scheduled = output.scheduled_at
        self.num_preemptions = output.num_preemptions
        if output.pooled is not None:
            self.pooled = output.pooled
        if num_tokens or self.pooled is not None:
            observer.on_tokens(self, num_tokens, now)
            self.num_generated_tokens += num_tokens
            timing.last_token = now
            if timing.first_token is None:
                timing.first_token = now

    def record_end(self, reason: str, observer: EngineObserver) -> None:
        self.end_reason = reason
        self.group.unfinished -= 1
        self.group.longest = max(self.group.longest, self.num_generated_tokens)
        observer.on_finished(self, reason)


class EngineObserver:
    """Base class of what counts requests; its methods do nothing.

    They are called in the client's event loop, or the offline engine's thread. The calls of one step come
    together: `on_tokens` and `on_finished` for its requests, then `on_step`. No method may raise, and
    `on_tokens` must be cheap, since it is called for every token of every request.
    """

    def on_tokens(self, sequence: TrackedSequence, count: int, now: float) -> None:
        """`count` tokens arrived at `now`; `sequence.timing.last_token` is still that of the ones before."""

    def on_finished(self, sequence: TrackedSequence, reason: str) -> None:
        """A sequence has ended; called once per sequence.

        reason: "stop", "length", "repetition", "abort", "error", "queue_timeout" or "request_timeout".
        """

    def on_step(self, stats: EngineStats) -> None:
        """A step of the engine has arrived, and all calls for its requests are done."""

    def on_rejected(self, reason: str) -> None:
        """A request was refused; `reason` is the option whose limit it met."""

    def on_engine_death(self) -> None:
        """The engine process has died: the next one counts from zero."""

    def on_sleep(self, level: int) -> None:
        """The engine is asleep at a level, or (0) awake again, and counts from zero."""
