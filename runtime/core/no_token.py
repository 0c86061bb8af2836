"""Says why a request has no token to choose from, and keeps what may be corrupt out of the prefix cache.

Imports no torch.
"""

from __future__ import annotations

from microvllm.runtime.core.kv_cache import KVCacheManager
from microvllm.runtime.core.plan import Request
from microvllm.runtime.grammar.masks import GrammarMasks


def why_no_token(request: Request, masks: GrammarMasks) -> tuple[str, str | None]:
    """A message, and the request's field at fault; None if it is the model, which gave no finite logits."""
    params = request.params
    if request.source.grammar:
        return masks.problem(request)
    if params.allowed_token_ids is not None or params.bad_words:
        param = "bad_words" if params.allowed_token_ids is None else "allowed_token_ids"
        return "allowed_token_ids, bad_words and min_tokens leave no token to choose from", param
    return "the model gave no finite logits for this request", None


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
