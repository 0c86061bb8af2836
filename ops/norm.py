"""Root-mean-square layer normalisation (Zhang & Sennrich, 2019, arXiv:1910.07467)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension.

    x: [..., d]; weight: [d], same dtype. The mean is taken in float32 and the result rounded to x's
    dtype before it meets the weight, as the reference models do.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(x.dtype).mul_(weight)


def norm_parts(
    x: Tensor, norms: Sequence[tuple[Tensor, float]], norm: Callable[[Tensor, Tensor, float], Tensor]
) -> Tensor:
    """Normalise the first columns of x in place, each norm as many as its weight has, one beside another.

    x: [n, d] -> x; norm: `rms_norm`. OLMo 2 (arXiv:2501.00656) normalises q and k so, each over all heads.
    """
    start = 0
    for weight, eps in norms:
        part = x[:, start : (start := start + len(weight))]
        part.copy_(norm(part.contiguous(), weight, eps))
    return x


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of each head with weights of its own, rounded once, at the end; perhaps in place.

    x: [n, heads * d]; weight: [heads, d] -> [n, heads * d].
    """
    wide = x.float().view(-1, *weight.shape)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale * weight).to(x.dtype).view_as(x)
