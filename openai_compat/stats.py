"""The line of statistics that the server logs, worded as vLLM words it so that the same scripts read it."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microvllm.runtime.metrics import EngineMetrics
    from microvllm.runtime.request import EngineStats

logger = logging.getLogger("microvllm.stats")


def stats_line(before: EngineStats, now: EngineStats, seconds: float, device: str = "cuda") -> str:
    """Rates over the `seconds` between two snapshots, gauges of the later one; `device` is cuda or cpu."""
    prompt, generated, queries, hits, preemptions = (
        getattr(now, name) - getattr(before, name)
        for name in ("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions")
    )
    preempted = f"Preemptions: {preemptions} reqs, " if preemptions else ""
    return (
        f"Engine 000: Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
        f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
        f"Running: {now.num_running} reqs, Waiting: {now.num_waiting} reqs, {preempted}"
        f"{'GPU ' if device == 'cuda' else ''}KV cache usage: {now.kv_usage * 100:.1f}%, "
        f"Prefix cache hit rate: {hits / queries * 100 if queries else 0.0:.1f}%"
    )


async def log_stats(metrics: EngineMetrics, interval: float, device: str) -> None:
    """Logs a line every `interval` seconds with traffic, and one more when it has come to rest."""
    before, then, busy = metrics.totals, time.monotonic(), False
    while True:
        await asyncio.sleep(interval)
        now, moment = metrics.totals, time.monotonic()
        active = now.num_running + now.num_waiting > 0 or (
            (now.prompt_tokens, now.generation_tokens) != (before.prompt_tokens, before.generation_tokens)
        )
        if active or busy:
            logger.info(stats_line(before, now, moment - then, device))
        before, then, busy = now, moment, active
