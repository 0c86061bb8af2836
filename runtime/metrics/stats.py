"""What an engine counts, and its state, as it is sent with every step. Imports no torch."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Counters (since start) and gauges (now) of one engine, sent with every step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    kv_tokens_total: int = 0  # for which the blocks have room, in requests of full length
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_state_misses: int = 0  # tokens that were cached, but computed again for lack of a state
    preemptions: int = 0
    steps: int = 0
    decode_steps: int = 0  # of them: those that computed one token of every request in them
    requests: int = 0  # that have arrived, also those that were refused
    kv_unused_slots: int = 0  # in the used blocks: internal fragmentation
    graph_replays: int = 0  # steps that ran as a captured graph; the others ran eagerly
    padded_tokens: int = 0  # padding: a graph is larger than its step
    step_seconds: list[float] = []  # time by part of a step, in the order of `step_times.ALL_PARTS`

    @property
    def kv_usage(self) -> float:
        """The used share of the KV blocks, 0 to 1: at 1 requests are preempted."""
        return self.kv_blocks_used / self.kv_blocks_total if self.kv_blocks_total else 0.0
