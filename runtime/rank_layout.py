"""Derives the layout of one rank's KV cache from the configuration."""

from __future__ import annotations

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.kv_memory import CacheLayout


def rank_layout(config: EngineConfig) -> CacheLayout:
    """Return what the size of the KV cache on one rank follows from."""
    spec = config.spec.sharded(config.tensor_parallel_size)
    # Two steps are in flight when one is scheduled while the other runs.
    step_tokens = config.max_num_batched_tokens * (1 + config.async_scheduling)
    return CacheLayout.of(spec, config.kv_dtype, config.block_size, step_tokens)
