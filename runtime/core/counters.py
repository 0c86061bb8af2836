"""Counts what an engine does, for its metrics. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.plan import StepPlan
from microvllm.runtime.core.scheduler import Scheduler
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.rank_layout import rank_layout
from microvllm.runtime.request import StepOutput
from microvllm.runtime.worker.step_times import Measured


class EngineCounters:
    """Counts requests as they arrive, and all else from the plans of steps and their outputs."""

    def __init__(self, config: EngineConfig) -> None:
        self.requests = 0
        self._caches = config.enable_prefix_caching
        self._kv_tokens = rank_layout(config).tokens(config.num_blocks, config.max_model_len)
        self._steps = self._decode_steps = 0
        self._prompt_tokens = self._generation_tokens = 0
        self._prefix_queries = self._prefix_hits = 0

    def count(self, plan: StepPlan, outputs: Sequence[StepOutput]) -> None:
        """Count a step that was just committed."""
        self._steps += 1
        computed = sum(item.num_new - item.num_draft_tokens for item in plan.scheduled)
        self._decode_steps += computed == len(plan.scheduled)
        self._prompt_tokens += sum(
            min(item.num_new, item.request.prompt_len - item.start)
            for item in plan.scheduled
            if item.start < item.request.prompt_len
        )
        self._generation_tokens += sum(len(output.token_ids) for output in outputs)
        for request in plan.admitted:
            # A preempted request hits its own blocks, and log probabilities forbid hits.
            if self._caches and not request.num_preemptions and request.params.prompt_logprobs is None:
                self._prefix_queries += request.prompt_len
                self._prefix_hits += request.num_cached or 0

    def stats(self, scheduler: Scheduler, runner: Measured) -> EngineStats:
        """The counters, and the state of an engine now."""
        kv = scheduler.kv
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_blocks_used=kv.num_used,
            kv_blocks_total=kv.pool.num_blocks,
            kv_tokens_total=self._kv_tokens,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            prefix_state_misses=kv.states.missed_tokens,
            preemptions=scheduler.num_preemptions,
            steps=self._steps,
            decode_steps=self._decode_steps,
            requests=self.requests,
            kv_unused_slots=kv.num_unused_slots,
            graph_replays=runner.graph_replays,
            padded_tokens=runner.padded_tokens,
            step_seconds=runner.clock.read(runner.device_clock),
        )
