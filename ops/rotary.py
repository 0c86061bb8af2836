"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), rotate-half layout."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_scales(inv_freq: Tensor, scale: float) -> Tensor:
    """Return what cos and sin of each pair are multiplied by, [d/2]: 1 of pairs that are not rotated."""
    return torch.where(inv_freq == 0, 1.0, scale)


class RotaryTable:
    """cos and sin of every position, gathered once a step for all layers.

    inv_freq: [d/2] float32 angles a position; cos and sin are multiplied by `scale` (see `pair_scales`). The
    two halves of a head are rotated against each other: out = x * cos + roll(x, d/2) * sin, with sin negated
    in its first half.
    """

    def __init__(self, inv_freq: Tensor, max_position: int, dtype: torch.dtype, scale: float = 1.0) -> None:
        angles = torch.outer(
            torch.arange(max_position, dtype=torch.float32, device=inv_freq.device), inv_freq
        )
        scales = pair_scales(inv_freq, scale)
        cos, sin = angles.cos() * scales, angles.sin() * scales
        self.cos = torch.cat((cos, cos), -1).to(dtype)
        self.sin = torch.cat((-sin, sin), -1).to(dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [n] int64 -> cos and sin, each [n, 1, d]."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [n, heads, d]; cos, sin: [n, 1, d] from `RotaryTable.at` -> rotated x, a new tensor."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
