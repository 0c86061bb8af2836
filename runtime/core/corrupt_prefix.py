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
    for pool in kv.pools:
        for key in keys:
            block = pool.block_of.get(key)
            if block is not None:
                del pool.block_of[key]
                pool.key_of[block] = None
                if not pool.refcount[block]:
                    del pool.cached[block]
                    pool.free.append(block)
    kv.states.drop(keys)
