"""A KV cache of e4m3, 8-bit floating-point numbers up to 448: Micikevicius et al., 2022, arXiv:2209.05433."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


class KVScales(NamedTuple):
    """What the keys and the values of a layer are divided by before they are rounded."""

    keys: float = 1.0
    values: float = 1.0


def to_e4m3(x: Tensor, scale: float) -> Tensor:
    """x / scale, rounded; the largest number stands for all beyond it, a NaN stays one."""
    return (x.float() / scale).clamp_(-LARGEST, LARGEST).to(E4M3)


def storable(x: Tensor) -> Tensor:
    """x, or its bytes if it is of e4m3, which torch cannot copy by an index."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x
