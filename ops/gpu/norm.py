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


@triton.jit
def _norm_parts_kernel(
    x, first, second, eps,
    ROW: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one row's first D0 columns, or the D1 behind them."""
    d = tl.arange(0, BLOCK)
    is_second = tl.program_id(1) > 0
    size = tl.where(is_second, D1, D0)
    inside = d < size
    if is_second:
        w = tl.load(second + d, inside, 0.0).to(tl.float32)
    else:
        w = tl.load(first + d, inside, 0.0).to(tl.float32)
    follow(PDL)
    at = x + tl.program_id(0).to(tl.int64) * ROW + tl.program_id(1) * D0 + d
    wide = tl.load(at, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    tl.store(at, wide * scale * w, inside)


def norm_two_parts(x: Tensor, first: Tensor, second: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """`ops.norm.norm_parts` of two norms of one epsilon. x: [n, d] contiguous -> x."""
    n, row = x.shape
    d0, d1 = len(first), len(second)
    if n:
        block = triton.next_power_of_2(max(d0, d1))
        warps = min(max(block // 512, 1), 16)
        _norm_parts_kernel[(n, 2)](
            x, first, second, eps, ROW=row, D0=d0, D1=d1, BLOCK=block, num_warps=warps, **launch_options(pdl)
        )
    return x


@triton.jit
def _norm_heads_kernel(
    x, weight, eps, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Program: one head of one row."""
    d = tl.arange(0, BLOCK)
    w = tl.load(weight + tl.program_id(0) % HEADS * D + d, d < D, 0.0).to(tl.float32)
    follow(PDL)
    at = x + tl.program_id(0).to(tl.int64) * D + d
    wide = tl.load(at, d < D, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    tl.store(at, wide * scale * w, d < D)


def norm_heads(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """`ops.norm.norm_heads` in place. x: [n, heads * d] contiguous; weight: [heads, d] contiguous -> x."""
    heads, d = weight.shape
    if x.shape[0]:
        block = triton.next_power_of_2(d)
        grid, warps = (x.shape[0] * heads,), max(block // 256, 1)
        _norm_heads_kernel[grid](
            x, weight, eps, HEADS=heads, D=d, BLOCK=block, num_warps=warps, **launch_options(pdl)
        )
    return x
