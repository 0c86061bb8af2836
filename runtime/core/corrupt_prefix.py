"""Takes a prefix out of the cache whose tensors may not be finite. Imports no torch."""

from __future__ import annotations

from microvllm.runtime.core.kv_cache import KVCacheManager
from microvllm.runtime.core.plan import Request


def withdraw_prefix(kv: KVCacheManager, request: Request) -> None:
    """Let no later sequence find the blocks and states of a request that had no finite logits.

    Only logits are checked, at the end of a prompt: a NaN in an earlier chunk is in the cache by then, and
    would fail every request that goes on from there. O(blocks of the request).
    """
    if not kv.enable_prefix_caching:
        return
    keys = request.keys.upto(len(request.token_ids) // kv.block_size)
    for group in kv.groups:
        for key in keys:
            block = group.block_of.get(key)
            if block is not None:
                del group.block_of[key]
                del kv.pool.entry_of[block]
                if not kv.pool.refcount[block]:
                    del kv.pool.cached[block]
                    kv.pool.free.append(block)
    kv.states.drop(keys)
