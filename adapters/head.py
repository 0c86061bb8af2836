"""Builds what a model does behind its last layer: its norm, and its logits where it has a head."""

from __future__ import annotations

from torch import Tensor

from microvllm.adapters.spec import ModelSpec
from microvllm.ops.activation import tanh
from microvllm.ops.operators import Norm, Operator, Operators
from microvllm.ops.sharding import Ranks, ShardedHead


def make_head(
    spec: ModelSpec, weight: Tensor, norm: Norm | None, operators: Operators, ranks: Ranks | None
) -> Operator:
    """[m, hidden] -> [m, vocab] in the activations' dtype, or, with `spec.pooling`, [m, hidden]."""
    if spec.pooling is not None and norm is not None:
        return operators.norm(norm)
    head, cap = operators.product(weight, norm=norm), spec.logits_softcap
    if ranks is not None:
        head = ShardedHead(head, spec.vocab_size, ranks)
    if cap is not None:
        return lambda hidden: tanh(head(hidden) * (spec.logits_scale / cap)) * cap
    return head if spec.logits_scale == 1.0 else lambda hidden: head(hidden) * spec.logits_scale
