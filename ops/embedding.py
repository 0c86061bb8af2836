"""Rows of a table for token ids, scaled, and of a shard's part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from microvllm.ops.operators import Operator, Operators
from microvllm.ops.sharding import Ranks, ShardedEmbedding


def token_rows(
    operators: Operators, vocab_size: int, ranks: Ranks | None, table: Tensor, scale: float = 1.0
) -> Operator:
    """[n] int64 token ids -> their rows of a table, times `scale`: [n, d].

    table: [vocab_size, d], or with `ranks` this rank's rows of it.
    """
    if ranks is None:
        lookup = operators.embedding(table)
    else:
        lookup = ShardedEmbedding(operators, table, vocab_size, ranks)
    if scale == 1.0:
        return lookup
    # Rounded as the authors round it, if the table is not quantised.
    kind = table.dtype if table.is_floating_point() else torch.float32
    rounded = float(torch.tensor(scale, dtype=kind))
    return lambda ids: lookup(ids) * rounded
