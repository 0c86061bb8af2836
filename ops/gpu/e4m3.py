"""Rounds rows of activations to codes in e4m3, and widens matrices of such codes.

The references are `ops.norm.rms_norm` and torch's own conversion, and `ops.scaled.ScaledTensor.dequantized`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.scaled import E4M3, ScaledTensor


@triton.jit(do_not_specialize=["M"])
def _round_rows_kernel(
    codes, scales, x, norm, eps, fixed, M,
    D: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, FIXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK columns of a row; rows behind the last are copies of that."""
    follow(PDL)
    first = tl.program_id(1) * BLOCK
    d = first + tl.arange(0, BLOCK)
    index = tl.program_id(0)
    row = index.to(tl.int64) * D
    wide = tl.load(x + tl.minimum(index, M - 1).to(tl.int64) * D + d, d < D, 0.0).to(tl.float32)
    if norm is not None:
        wide *= tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
        wide *= tl.load(norm + d, d < D, 0.0).to(tl.float32)
    if GROUP:
        groups = tl.reshape(wide, (BLOCK // GROUP, GROUP))
        scale = tl.maximum(tl.max(tl.abs(groups), 1), 1e-12) / 448.0
        rounded = tl.reshape(groups / scale[:, None], (BLOCK,))
        group = first // GROUP + tl.arange(0, BLOCK // GROUP)
        tl.store(scales + group * tl.num_programs(0) + index, scale, group * GROUP < D)
    else:
        scale = fixed
        if not FIXED:
            scale = tl.maximum(tl.max(tl.abs(wide), 0), 1e-12) / 448.0
        rounded = wide / scale
        tl.store(scales + index, scale)
    rounded = tl.minimum(tl.maximum(rounded, -448.0), 448.0)
    tl.store(codes + row + d, rounded.to(tl.float8e4nv), d < D)


def round_rows(
    x: Tensor,
    scale: float | None = None,
    *,
    group: int = 0,
    multiple: int = 1,
    norm: Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """x: [m, d] contiguous -> codes [m, d] e4m3 of norm(x), and the scale of each row, [m, 1] float32.

    scale: one for all rows, beyond whose range values become the largest code; else each row's largest value
    becomes that. group: a power of two, of columns that have a scale each: [m, groups], those of a group next
    to each other in memory. multiple: copies of the last row fill up to such a number of rows. norm: [d], the
    weight of an RMSNorm.
    """
    m, d = x.shape
    rows = triton.cdiv(m, multiple) * multiple
    codes = torch.empty(rows, d, dtype=E4M3, device=x.device)
    scales = torch.empty(triton.cdiv(d, group or d), rows, dtype=torch.float32, device=x.device).t()
    if m:
        block = max(triton.next_power_of_2(d), group)
        if group and norm is None:  # nothing is of the whole row
            block = max(min(block, 2048), group)
        _round_rows_kernel[(rows, triton.cdiv(d, block))](
            codes, scales, x, norm, eps, scale or 1.0, m, D=d, BLOCK=block, GROUP=group,
            FIXED=scale is not None, num_warps=min(max(block // 1024, 1), 16), **launch_options(pdl),
        )  # fmt: skip
    return codes, scales


@triton.jit
def _widen_kernel(
    y, codes, scales, N,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a tile of the matrix."""
    follow(PDL)
    across: tl.constexpr = (K + SCALE_K - 1) // SCALE_K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    wide = tl.load(codes + at, inside, 0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    scale = tl.load(scales + (n // SCALE_N * across)[:, None] + (k // SCALE_K)[None, :], inside, 0.0)
    tl.store(y + at, wide * scale, inside)


def widen(weight: ScaledTensor, dtype: torch.dtype, *, pdl: bool = False) -> Tensor:
    """The matrix that codes and scales stand for, [rows, columns], each value rounded to `dtype`."""
    n, k = weight.shape
    y = torch.empty(n, k, dtype=dtype, device=weight.device)
    block_n, block_k = 8, 512
    _widen_kernel[(triton.cdiv(n, block_n), triton.cdiv(k, block_k))](
        y, weight.as_subclass(Tensor).view(torch.uint8), weight.scales, n, K=k, BLOCK_N=block_n,
        BLOCK_K=block_k, SCALE_N=weight.block[0], SCALE_K=weight.block[1], num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return y
