"""The gated activation of the feed-forward block."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU (Shazeer, 2020, arXiv:2002.05202): [n, 2i] -> [n, i], silu(first half) * second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)
