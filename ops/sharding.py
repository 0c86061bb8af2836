"""What the shards of a model exchange, and the operators that do: each shard holds some rows or columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators


class Ranks(Protocol):
    """Connects one shard of a model, `rank` of `size`, with the others.

    All ranks make the same calls in the same order, with tensors of the same shapes; what a call returns is
    the same to the last bit on all of them. On a GPU a call launches on the current stream, and can be
    captured in a CUDA graph.
    """

    rank: int
    size: int

    def sum(self, part: Tensor, residual: Tensor | None = None) -> Tensor:
        """part: [n, d], which may be overwritten -> residual + the parts of all ranks: [n, d].

        residual: [n, d], the same on all ranks; the result may be where it was.
        """
        ...

    def join(self, part: Tensor) -> Tensor:
        """part: [m, w] -> the parts of all ranks beside each other, [m, size * w], contiguous."""
        ...

    def agree(self, tokens: Tensor) -> None:
        """Overwrite tokens: [m] int64 with those of rank 0."""
        ...

    def smallest(self, number: int) -> int:
        """The smallest of the ranks' numbers; waits for them."""
        ...


class SummedLinear:
    """A product of which each rank holds some columns of the weight: the sum of all ranks' products."""

    def __init__(self, product: LinearOperator, ranks: Ranks) -> None:
        self._product, self._ranks = product, ranks

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._ranks.sum(self._product(x), residual)


class SummedNorms:
    """`ops.norm.norm_parts` where each rank holds a part of what every norm is over, all of the same size.

    What several ranks hold counts as often on all of them, and so changes no mean.
    """

    def __init__(self, norms: Sequence[Norm], ranks: Ranks) -> None:
        self._norms, self._ranks = norms, ranks

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, d], whose first columns are normalised in place -> x."""
        ends = list(accumulate(len(weight) for weight, _ in self._norms))
        parts = [x[:, start:end] for start, end in pairwise([0, *ends])]
        squares = torch.stack([part.float().square().mean(-1) for part in parts], 1)
        means = self._ranks.sum(squares) / self._ranks.size
        for part, mean, (weight, eps) in zip(parts, means.unbind(1), self._norms, strict=True):
            scale = torch.rsqrt(mean + eps).unsqueeze(1)
            part.copy_((part.float() * scale).to(x.dtype) * weight)
        return x


class ShardedEmbedding:
    """[n] token ids -> their rows, [n, d], of a table of `vocab_size` rows, of which each rank holds some.

    `weight` has this rank's. The row of a token is zero on all ranks but one.
    """

    def __init__(self, operators: Operators, weight: Tensor, vocab_size: int, ranks: Ranks) -> None:
        each = -(-vocab_size // ranks.size)
        first, stop = ranks.rank * each, min((ranks.rank + 1) * each, vocab_size)
        self._lookup, self._ranks = operators.embedding_part(weight, first, stop), ranks

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self._ranks.sum(self._lookup(token_ids))


class ShardedHead:
    """[m, hidden] -> [m, vocab_size] of a product of which each rank computes some columns.

    The last rank may have fewer of them than the others.
    """

    def __init__(self, product: Operator, vocab_size: int, ranks: Ranks) -> None:
        self._product, self._vocab_size, self._ranks = product, vocab_size, ranks
        self._width = -(-vocab_size // ranks.size)

    def __call__(self, hidden: Tensor) -> Tensor:
        part = self._product(hidden)
        missing = self._width - part.shape[1]
        whole = self._ranks.join(pad(part, (0, missing)) if missing else part)
        return whole[:, : self._vocab_size].contiguous()
