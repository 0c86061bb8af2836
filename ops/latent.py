"""The products around latent attention, in plain torch: see `adapters.layers.latent`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Norms(Protocol):
    """What `ops.operators.Operators` has for a norm."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class ResidualProduct(Protocol):
    """See `ops.operators.LinearOperator`."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


def plain(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a matrix of any kind; kinds that are kept packed say what they stand for."""
    dequantized = getattr(weight, "dequantized", None)
    return weight.to(dtype) if dequantized is None else dequantized(dtype)


class LatentInput:
    """Hidden states -> the queries of all heads over the latents, and the latent key.

    first: [n, h] -> [n, first_size + R + r], what the queries are made of, then the latent and the key to be
    rotated; q_b: [n, first_size] -> the queries [n, H (d + r)], or None if these are the first already; keys:
    [H, d, R], which the part of the queries that is not rotated is multiplied by; norm: of the latent.
    """

    def __init__(
        self,
        first: Callable[[Tensor], Tensor],
        q_b: Callable[[Tensor], Tensor] | None,
        keys: Tensor,
        norm: tuple[Tensor, float],
        norms: Norms,
        rope_dim: int,
        first_size: int,
    ) -> None:
        self._first, self._q_b, self._keys = first, q_b, keys
        self._norm, self._norms = norm, norms
        self._rope_dim, self._first_size = rope_dim, first_size

    def __call__(self, x: Tensor) -> Tensor:
        """-> [n, (H + 1) (R + r)]: each head's query, then the key; none is rotated yet."""
        made = self._first(x)
        q, latent = made[:, : self._first_size], made[:, self._first_size :]
        if self._q_b is not None:
            q = self._q_b(q.contiguous())
        heads, nope, rank = self._keys.shape
        q = q.reshape(len(q), heads, nope + self._rope_dim)
        out = torch.empty(len(q), heads + 1, rank + self._rope_dim, dtype=q.dtype, device=q.device)
        # Head by head, each product where it belongs.
        torch.bmm(q[..., :nope].transpose(0, 1), self._keys, out=out[:, :heads, :rank].transpose(0, 1))
        out[:, :heads, rank:] = q[..., nope:]
        out[:, heads, :rank] = self._norms.rms_norm(latent[:, :rank].contiguous(), *self._norm)
        out[:, heads, rank:] = latent[:, rank:]
        return out.flatten(1)


class LatentOutput:
    """What each head attended to, a latent, -> its values, and their product.

    values: [H, v, R]; product: [n, H v] -> [n, h].
    """

    def __init__(self, values: Tensor, product: ResidualProduct) -> None:
        self._values, self._product = values.transpose(1, 2), product

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [n, H R]."""
        heads, rank, _ = self._values.shape
        out = torch.empty(len(x), heads, self._values.shape[2], dtype=x.dtype, device=x.device)
        torch.bmm(x.view(len(x), heads, rank).transpose(0, 1), self._values, out=out.transpose(0, 1))
        return self._product(out.flatten(1), residual)
