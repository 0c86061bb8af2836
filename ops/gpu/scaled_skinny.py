"""Products of up to some 64 rows with a matrix of 8-bit codes and scales, by tensor cores.

The codes are the left operand, whose tile has 64 rows or more, and are widened in registers to the type of x,
which loses nothing; x is the right one, so that few rows are not padded to many. Sums over k may be split
among programs, as in `ops.gpu.skinny`. Scales of whole rows are applied once, those of blocks of columns
to the sums of each block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.skinny import finish_split
from microvllm.ops.gpu.tiling import Tiling
from microvllm.ops.scaled import ScaledTensor

MIN_ROWS = 16  # of the right operand's tile


@triton.jit
def _widened(codes_at, inside, DTYPE: tl.constexpr):
    """A tile of codes as numbers of another type."""
    codes = tl.load(codes_at, inside, 0).to(tl.float8e4nv, bitcast=True)
    # By way of float32: the direct conversion to bfloat16 takes an instruction of a sixteenth of the rate.
    return codes.to(tl.float32).to(DTYPE)


@triton.jit(do_not_specialize=["M"])
def _scaled_skinny_kernel(
    y, x, codes, scales, bias, residual, parts, arrivals, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N columns of y, SPLIT_K of the K terms of their sums.

    That is as many rows of the weight and, if GATED, of its second half.
    """
    follow(PDL)
    in_blocks: tl.constexpr = SCALE_K < K
    across: tl.constexpr = (K + SCALE_K - 1) // SCALE_K
    tile_id, split = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    n = tile_id * BLOCK_N + tl.arange(0, BLOCK_N)
    k = split * SPLIT_K + tl.arange(0, BLOCK_K)
    here = (n < N)[:, None]
    tile_at = codes + n.to(tl.int64)[:, None] * K + k[None, :]
    x_at = x + m[None, :] * K + k[:, None]
    scale_at = scales + n // SCALE_N * across
    up_scale_at = scales + (N + n) // SCALE_N * across
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_sums = sums
    for start in tl.range(0, SPLIT_K, BLOCK_K, num_stages=STAGES):
        inside = here & (start + k < K)[None, :]
        right = tl.load(x_at + start, (m < M)[None, :] & (start + k < K)[:, None], 0.0)
        left = _widened(tile_at + start, inside, x.dtype.element_ty)
        if in_blocks:
            block = tl.minimum((split * SPLIT_K + start) // SCALE_K, across - 1)
            part = tl.dot(left, right, input_precision="ieee")
            sums += part * tl.load(scale_at + block, n < N, 0.0)[:, None]
        else:
            sums = tl.dot(left, right, sums, input_precision="ieee")
        if GATED:
            left = _widened(tile_at + N * K + start, inside, x.dtype.element_ty)
            if in_blocks:
                part = tl.dot(left, right, input_precision="ieee")
                up_sums += part * tl.load(up_scale_at + block, n < N, 0.0)[:, None]
            else:
                up_sums = tl.dot(left, right, up_sums, input_precision="ieee")
    if not in_blocks:
        sums *= tl.load(scale_at, n < N, 0.0)[:, None]
        if GATED:
            up_sums *= tl.load(up_scale_at, n < N, 0.0)[:, None]
    sums = tl.trans(sums)
    up_sums = tl.trans(up_sums)
    finish_split(
        y, sums, up_sums, m, n, bias, residual, parts, arrivals, tile_id, tl.num_programs(0), split, M, N,
        BLOCK_M, BLOCK_N, SPLITS, GATED
    )  # fmt: skip


def scaled_skinny(
    x: Tensor,
    weight: ScaledTensor,
    arrivals: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tiling: Tiling,
    *,
    gated: bool,
    pdl: bool = False,
) -> Tensor:
    """act(x @ weight.T + bias) + residual: [m, n]; the arguments are `skinny.skinny_linear`'s.

    Blocks of columns that share a scale are multiples of `tiling.block_k`, or all.
    """
    m, k = x.shape
    n = weight.shape[0] // (2 if gated else 1)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_m = max(MIN_ROWS, triton.next_power_of_2(m))
    split_k = triton.cdiv(triton.cdiv(k, tiling.block_k), tiling.splits) * tiling.block_k
    splits, tiles = triton.cdiv(k, split_k), triton.cdiv(n, tiling.block_n)
    parts = None
    if splits > 1:
        shape = (splits, tiles, 2 if gated else 1, block_m, tiling.block_n)
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    _scaled_skinny_kernel[(tiles, splits)](
        y, x, weight.as_subclass(Tensor).view(torch.uint8), weight.scales, bias, residual, parts, arrivals, m,
        N=n, K=k, BLOCK_M=block_m, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, SPLIT_K=split_k,
        SPLITS=splits, STAGES=tiling.stages, SCALE_N=weight.block[0], SCALE_K=weight.block[1], GATED=gated,
        num_warps=tiling.warps, **launch_options(pdl),
    )  # fmt: skip
    return y
