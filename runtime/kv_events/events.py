"""The events of the KV cache, as vLLM 0.33 encodes them in msgpack (its `distributed/kv_events.py`).

A batch is an array, an event in it a map with its name under `type`; fields at their default are left out.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

BlockHash: TypeAlias = "int | bytes"  # 64 bits of a block's key, or all of it
MEDIUM = "GPU"  # the first tier, whatever the device: vLLM's CPU backend reports the same


class BlockStored(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """Full blocks, in token order, that later requests may reuse from now on.

    The first follows the block `parent_block_hash`, None where the sequence begins with it. `extra_keys` has
    for each block what its hash depends on beside the tokens: a request's `cache_salt`, at its first block.
    """

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """Blocks that were evicted."""

    block_hashes: list[BlockHash]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """The cache holds nothing."""


KVEvent: TypeAlias = "BlockStored | BlockRemoved | AllBlocksCleared"


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """The events of one step. ts: seconds since 1970."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None
