"""Counts what an engine does with its requests: plain Python, cheap enough for every token.

`EngineMetrics` observes the requests, `metric_families.py` converts it into Prometheus' families. Both read
`metrics.tsv`, which lists all families. Names, labels and buckets are vLLM's, so that its Grafana dashboard
and its autoscalers work here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, zip_longest
from typing import NamedTuple

import msgspec

from microvllm.runtime.metrics.observer import EngineObserver, TrackedSequence
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.request import FinishReason
from microvllm.runtime.tables import read_table
from microvllm.runtime.worker.step_times import ALL_PARTS, FORWARD_PARTS, GPU_BUSY, GPU_IDLE, PARTS

GAUGES = frozenset(
    ("num_running", "num_waiting", "kv_blocks_used", "kv_blocks_total", "kv_tokens_total", "kv_unused_slots")
)
COUNTERS = tuple(name for name in EngineStats.__struct_fields__ if name not in GAUGES | {"step_seconds"})
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # by level
REJECTIONS = ("max_num_queued_reqs", "max_num_queued_tokens")
# Only requests that ended by themselves count towards latencies.
COMPLETE = frozenset(map(str, (FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION)))

# Upper bounds of histograms by their name in `metrics.tsv`; None: token counts up to the context.
BOUNDS: dict[str, Sequence[float] | None] = {
    "FIRST_TOKEN_SECONDS": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
        *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
    ),
    "BETWEEN_TOKENS_SECONDS": (
        *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
        *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
    ),
    "REQUEST_SECONDS": (
        *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
        *(120, 240, 480, 960, 1920, 7680),
    ),
    "STEP_TOKENS": (1, *(2**power for power in range(3, 15))),
    "SAMPLES": (1, 2, 5, 10, 20),
    "PREEMPTIONS": (1, 2, 3, 4, 5, 10, 20),
    "CONTEXT_TOKENS": None,
}


class Family(NamedTuple):
    """A row of `metrics.tsv`: `value` names an attribute of `EngineMetrics`, or the bounds of a histogram.

    With a `label` the attribute is a dict, {label value: number}.
    """

    name: str
    type: str  # gauge, counter or histogram
    label: str
    value: str
    help: str


FAMILIES = [Family(*row) for row in read_table("metrics/metrics.tsv")]
HISTOGRAMS = {
    family.name.removeprefix("vllm:"): BOUNDS[family.value]
    for family in FAMILIES
    if family.type == "histogram"
}


def one_two_five(highest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... as far as `highest`."""
    series = (factor * 10**power for power in range(len(str(highest))) for factor in (1, 2, 5))
    return [value for value in series if value <= highest]


class Histogram:
    """How many values fell at or below each of the rising `bounds`, and their sum."""

    __slots__ = ("_counts", "bounds", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)  # between a bound and the one before it; above the last

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[int]:
        """Values at or below each bound, and at the end all of them."""
        return list(accumulate(self._counts))


class EngineMetrics(EngineObserver):
    """Counts since the start, over all engine processes of a server. For one event loop, or one thread.

    `stats` are those of the engine process that runs at the start.
    """

    def __init__(self, max_model_len: int, stats: EngineStats) -> None:
        self.histograms = {
            name: Histogram(one_two_five(max_model_len) if bounds is None else bounds)
            for name, bounds in HISTOGRAMS.items()
        }
        self.prompt_tokens = 0  # of requests that got their first token, with those from the prefix cache
        self.cached_tokens = 0
        self.generation_tokens = 0
        # A time-out has its label once there was one: without those options the labels are vLLM's.
        time_outs = (FinishReason.QUEUE_TIMEOUT, FinishReason.REQUEST_TIMEOUT)
        self.finished_requests = {str(reason): 0 for reason in FinishReason if reason not in time_outs}
        self.rejections = dict.fromkeys(REJECTIONS, 0)
        self.engine_deaths = 0
        self._sleep_level = 0
        self._stats = stats  # of the engine process that runs now
        self._past = EngineStats()  # what those before it have counted
        self._gaps: dict[float, int] = {}  # seconds between tokens of this step: how many waited so long
        self._gap_seconds = self.histograms["inter_token_latency_seconds"]
        self._step_tokens = self.histograms["iteration_tokens_total"]

    @property
    def totals(self) -> EngineStats:
        """The engine's own counters, added up over engine processes, and its gauges."""
        past, now = self._past, self._stats
        sums = {name: getattr(past, name) + getattr(now, name) for name in COUNTERS}
        pairs = zip_longest(past.step_seconds, now.step_seconds, fillvalue=0.0)
        return msgspec.structs.replace(now, **sums, step_seconds=list(map(sum, pairs)))

    # ---- values by label, for /metrics ----------------------------------------------------------

    @property
    def waiting_by_reason(self) -> dict[str, int]:
        """Requests queue for rows and KV blocks only; vLLM defers some for an adapter or a grammar, too."""
        return {"capacity": self._stats.num_waiting, "deferred": 0}

    @property
    def prompt_tokens_by_source(self) -> dict[str, int]:
        computed = self.prompt_tokens - self.cached_tokens
        return {"local_compute": computed, "local_cache_hit": self.cached_tokens}

    @property
    def cached_tokens_by_source(self) -> dict[str, int]:
        return {"device": self.totals.prefix_hits}

    @property
    def sleep_states(self) -> dict[str, int]:
        """1 for what the engine is: at level 1 its weights are in the host's memory, at level 2 nowhere."""
        return {name: int(self._sleep_level == level) for level, name in enumerate(SLEEP_STATES)}

    @property
    def steps_by_kind(self) -> dict[str, int]:
        totals = self.totals
        return {"decode": totals.decode_steps, "prefill": totals.steps - totals.decode_steps}

    @property
    def _seconds(self) -> dict[str, float]:
        measured = zip_longest(ALL_PARTS, self.totals.step_seconds, fillvalue=0.0)
        return {str(part): seconds for part, seconds in measured}

    @property
    def step_seconds(self) -> dict[str, float]:
        """All parts together are the time from the start to the last step."""
        seconds = self._seconds
        return {part: seconds[part] for part in PARTS}

    @property
    def forward_seconds(self) -> dict[str, float]:
        """Empty without --log-step-times."""
        seconds = self._seconds
        inside: dict[str, float] = {part: seconds[part] for part in FORWARD_PARTS}
        layers = seconds["forward"] - sum(inside.values())
        return {**inside, "layers": layers} if any(inside.values()) else {}

    @property
    def gpu_seconds(self) -> dict[str, float]:
        """Empty without --log-step-times, and on a CPU."""
        seconds = self._seconds
        return {"busy": seconds[GPU_BUSY], "idle": seconds[GPU_IDLE]} if seconds[GPU_BUSY] else {}

    # ---- calls of the observer ------------------------------------------------------------------

    def on_tokens(self, sequence: TrackedSequence, count: int, now: float) -> None:
        self.generation_tokens += count
        last = sequence.timing.last_token
        if last is not None:
            self._gaps[now - last] = self._gaps.get(now - last, 0) + 1
            return
        self.prompt_tokens += len(sequence.prompt_token_ids)
        self.cached_tokens += sequence.num_cached_tokens
        self.histograms["time_to_first_token_seconds"].observe(now - sequence.timing.arrival)

    def on_step(self, stats: EngineStats) -> None:
        before, self._stats = self._stats, stats
        if stats.steps != before.steps:
            computed = stats.prompt_tokens - before.prompt_tokens
            self._step_tokens.observe(computed + stats.generation_tokens - before.generation_tokens)
        # The tokens of one step arrive at one time, so most of their gaps are the same number.
        for gap, times in self._gaps.items():
            self._gap_seconds.observe(gap, times)
        self._gaps.clear()

    def on_finished(self, sequence: TrackedSequence, reason: str) -> None:
        self.finished_requests[reason] = self.finished_requests.get(reason, 0) + 1
        timing, generated = sequence.timing, sequence.num_generated_tokens
        first, last, scheduled = timing.first_token, timing.last_token, timing.scheduled
        if reason not in COMPLETE or first is None or last is None or scheduled is None:
            return
        prompt = len(sequence.prompt_token_ids)
        values = {
            "request_time_per_output_token_seconds": (last - first) / max(1, generated - 1),
            "e2e_request_latency_seconds": last - timing.arrival,
            "request_queue_time_seconds": scheduled - timing.arrival,
            "request_inference_time_seconds": last - scheduled,
            "request_prefill_time_seconds": first - scheduled,
            "request_decode_time_seconds": last - first,
            "request_prompt_tokens": prompt,
            "request_generation_tokens": generated,
            "request_prefill_kv_computed_tokens": prompt - sequence.num_cached_tokens,
            "request_num_preemptions": sequence.num_preemptions,
        }
        if sequence.max_tokens is not None:
            values["request_params_max_tokens"] = sequence.max_tokens
        if sequence.group.unfinished == 0:
            values["request_params_n"] = sequence.group.n
            values["request_max_num_generation_tokens"] = sequence.group.longest
        for name, value in values.items():
            self.histograms[name].observe(value)

    def on_rejected(self, reason: str) -> None:
        self.rejections[reason] += 1

    def on_engine_death(self) -> None:
        self.engine_deaths += 1
        self._past, self._stats = self.totals, EngineStats()

    def on_sleep(self, level: int) -> None:
        if self._sleep_level != level:
            self._sleep_level = level
            self._past, self._stats = self.totals, EngineStats()
