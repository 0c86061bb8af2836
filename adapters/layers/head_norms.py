"""Norms over each head of queries, keys and values, in front of what the attention backend does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microvllm.adapters.tensors import LayerWeights

if TYPE_CHECKING:
    from microvllm.ops.operators import Operator, Operators


def head_norms(
    product: Operator, num_heads: int, num_kv_heads: int, weights: LayerWeights, operators: Operators
) -> Operator:
    """The product with `qkv`, then the norms of its heads; those of v have no weights.

    They are taken from `weights`, so that the attention backend has none. Raises ValueError if that of q is
    missing.
    """
    import torch

    q_norm, k_norm = weights.norm("q_norm"), weights.norm("k_norm")
    if q_norm is None:
        raise ValueError("values are normalised only where queries are")
    weight, eps = q_norm
    rows = [weight.expand(num_heads, -1)]
    if k_norm is not None:
        keys = k_norm[0].expand(num_kv_heads, -1)
        rows += [keys, torch.ones_like(keys)]
    stacked = torch.cat(rows)
    return lambda x: operators.norm_heads(product(x), stacked, eps)


def whole_norms(qkv: Operator, weights: LayerWeights, operators: Operators) -> Operator:
    """The product, then norms in its output: over all heads of queries, and over all heads of keys.

    Heads may be held by several ranks.
    """
    norms = [norm for norm in (weights.norm("q_norm"), weights.norm("k_norm")) if norm is not None]
    if weights.ranks is None:
        return lambda x: operators.norm_parts(qkv(x), norms)
    from microvllm.ops.sharding import SummedNorms

    summed = SummedNorms(norms, weights.ranks)
    return lambda x: summed(qkv(x))
