"""RMSNorm of many rows; the reference is `ops.norm.rms_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.launch import follow, launch_options


@triton.jit
def _rms_norm_kernel(y, x, weight, eps, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program: one row."""
    d = tl.arange(0, BLOCK)
    w = tl.load(weight + d, d < D, 0.0).to(tl.float32)
    follow(PDL)
    row = tl.program_id(0).to(tl.int64) * D
    wide = tl.load(x + row + d, d < D, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    tl.store(y + row + d, wide * scale * w, d < D)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """x: [n, d] contiguous, weight: [d] -> x / sqrt(mean(x²) + eps) * weight, rounded once, at the end."""
    n, d = x.shape
    y = torch.empty_like(x)
    if n:
        block = triton.next_power_of_2(d)
        warps = min(max(block // 512, 1), 16)
        _rms_norm_kernel[(n,)](y, x, weight, eps, D=d, BLOCK=block, num_warps=warps, **launch_options(pdl))
    return y
