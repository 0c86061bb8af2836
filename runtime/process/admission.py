"""Admits requests to the engine's queue, or refuses them with the time after which there should be room."""

from __future__ import annotations

import math

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import EngineBusyError
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.request import EngineRequest

RATE_MEMORY_S = 5.0  # how far back the measured rate looks
LONGEST_RETRY_S = 300.0
CHARS_PER_TOKEN = (
    16  # a token takes 36 bytes in either process, a character of a form or grammar two to three
)


class QueueFullError(EngineBusyError):
    """The queue has no room; `option` is the limit that was met."""

    def __init__(self, option: str, retry_after_s: float) -> None:
        super().__init__("The engine is currently busy and cannot accept new requests.", retry_after_s)
        self.option = option


def shared_tokens(request: EngineRequest) -> int:
    """Return what the sequences of a request count beside their prompts, which takes memory as tokens do.

    Without that, 16,384 requests of one token could hold a vocabulary of allowed tokens each (2 MB in either
    process).
    """
    params, form = request.params, request.params.structured_outputs
    chars = len(request.grammar) + (len(form.spec) if form is not None else 0)
    chars += sum(map(len, params.bad_words)) + sum(map(len, params.stop))
    ids = len(params.allowed_token_ids or ()) + 2 * len(params.logit_bias) + len(request.stop_token_ids)
    return ids + sum(map(len, request.bad_word_ids)) + chars // CHARS_PER_TOKEN


class QueueRate:
    """Measures how fast one engine begins requests, once there are more than it has rows for.

    The rate is an exponentially decaying mean over the time in which requests were waiting: without a queue,
    arrivals decide how many begin. `began`: requests since the last step.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was measured: another engine process runs."""
        self.began = 0
        self._requests, self._seconds = 0.0, 0.0  # both decay
        self._waiting = False
        self._last_step = 0.0

    @property
    def per_second(self) -> float | None:
        """Requests per second that leave the queue; None before there was one."""
        return self._requests / self._seconds if self._seconds else None

    def measure(self, stats: EngineStats, now: float) -> None:
        """Measure once per step; `now` is `time.monotonic()`."""
        elapsed = now - self._last_step
        if self._waiting:
            kept = math.exp(-elapsed / RATE_MEMORY_S)
            self._requests = self._requests * kept + self.began
            self._seconds = self._seconds * kept + elapsed
        self.began = 0
        self._waiting = stats.num_waiting > 0
        self._last_step = now

    def wait_for(self, requests: float) -> float:
        """Predict the seconds until so many requests have left the queue; 0 before anything is known."""
        return _wait(requests, self.per_second)


class Admission:
    """Bounds the waiting requests of a server and the tokens of their prompts, over all of its engines.

    A request that finds a free row does not wait. `rates` has what is measured of each engine.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.rates = [QueueRate() for _ in range(config.data_parallel_size)]
        self.max_wait_s = config.queue_timeout if config.admit_by_rate else math.inf
        self._max_requests = config.max_num_queued_reqs
        self._max_tokens = config.max_num_queued_tokens
        self._max_num_seqs = config.max_num_seqs
        self._num_tokens = 0  # of prompts without an output yet, and `shared_tokens`

    @property
    def rate(self) -> float | None:
        """Requests per second that leave the queues of all engines; None before there was one."""
        known = [rate.per_second for rate in self.rates if rate.per_second is not None]
        return sum(known) if known else None

    def check(self, stats: EngineStats, count: int, tokens: int, engines: int = 1) -> None:
        """Raise `QueueFullError` unless `count` sequences of `tokens` together may join the queue.

        `stats`: the sums of the `engines` that serve.
        """
        rows = self._max_num_seqs * engines
        waiting = stats.num_waiting + count - (rows - stats.num_running)
        if waiting <= 0:
            return
        if self._max_requests is not None and waiting > self._max_requests:
            raise QueueFullError("max_num_queued_reqs", self._time_for(waiting - self._max_requests))
        # One request alone may be larger than the limit.
        if self._max_tokens is not None and self._num_tokens and self._num_tokens + tokens > self._max_tokens:
            share = (self._num_tokens + tokens - self._max_tokens) / self._num_tokens
            raise QueueFullError("max_num_queued_tokens", self._time_for(share * stats.num_waiting))
        if math.isinf(self.max_wait_s):
            return
        rate = self.rate
        too_many = waiting > rows if rate is None else waiting > rate * self.max_wait_s
        if too_many:
            wait_s = self._time_for(waiting) - self.max_wait_s
            raise QueueFullError("max_num_queued_reqs", max(wait_s, 0.0))

    def enter(self, tokens: int) -> None:
        """Count a sequence that takes so many tokens."""
        self._num_tokens += tokens

    def leave(self, tokens: int) -> None:
        """Count its first output, or its end without one."""
        self._num_tokens -= tokens

    def _time_for(self, requests: float) -> float:
        return _wait(requests, self.rate)


def _wait(requests: float, rate: float | None) -> float:
    if rate is None:
        return 0.0
    return min(requests / rate, LONGEST_RETRY_S) if rate else LONGEST_RETRY_S
