"""Products of up to some 64 rows with a weight: bound by the weight's bytes, which are read once.

The fewest by `gemv`; more by tensor cores, whose tile is padded to 16 rows or more. There
the sums over k may be split among programs, so that a narrow weight fills the device, too: each leaves its
part, and the one that comes last adds them up, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.activation import swiglu
from microvllm.ops.gpu.gemv import gemv
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.norm import rms_norm
from microvllm.ops.gpu.tiling import Tiling, gemv_tiling, prefers_gemv, skinny_tiling

MAX_SPLIT_TILES = 1024  # of block_n columns of a result whose sums are split


@triton.jit
def add_parts(part, stride, SPLITS: tl.constexpr):
    """part: pointers to a program's first part; the others are `stride` apart."""
    # Past the L1 cache, which other multiprocessors do not write through.
    total = tl.load(part, cache_modifier=".cg")
    for split in range(1, SPLITS):
        total += tl.load(part + split * stride, cache_modifier=".cg")
    return total


@triton.jit
def finish(
    y, sums, up_sums, m, n, bias, residual, M, N: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """y[m, n] from the complete sums."""
    if bias is not None:
        sums += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    if GATED:
        if bias is not None:
            up_sums += tl.load(bias + N + n, n < N, 0.0).to(tl.float32)[None, :]
        sums = swiglu(sums, up_sums)
    at = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if residual is not None:
        sums += tl.load(residual + at, inside, 0.0).to(tl.float32)
    tl.store(y + at, sums, inside)


@triton.jit
def finish_split(
    y, sums, up_sums, m, n, bias, residual, parts, arrivals, place, places, split, M, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """y[m, n] from the sums of one split of SPLITS: the last to arrive adds all, in the order of the splits.

    place: number of the tile of y, of `places`; parts: float32 [SPLITS, places, 1 or 2, BLOCK_M, BLOCK_N];
    arrivals: [places], zeros before and after.
    """
    if SPLITS == 1:
        finish(y, sums, up_sums, m, n, bias, residual, M, N, GATED)
    else:
        size: tl.constexpr = BLOCK_M * BLOCK_N
        halves: tl.constexpr = 2 if GATED else 1
        stride = places * size * halves
        inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        part = parts + place * size * halves + inside
        tl.store(part + split * stride, sums)
        if GATED:
            tl.store(part + split * stride + size, up_sums)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrivals + place, 1) == SPLITS - 1:
            tl.atomic_xchg(arrivals + place, 0)
            sums = add_parts(part, stride, SPLITS)
            if GATED:
                up_sums = add_parts(part + size, stride, SPLITS)
            finish(y, sums, up_sums, m, n, bias, residual, M, N, GATED)


@triton.jit(do_not_specialize=["M"])
def _skinny_kernel(
    y, x, weight, bias, residual, parts, arrivals, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N columns of y, SPLIT_K of the K terms of their sums.

    That is as many rows of the weight and, if GATED, of its second half.
    """
    tile_id, split = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    n = tile_id * BLOCK_N + tl.arange(0, BLOCK_N)
    k = split * SPLIT_K + tl.arange(0, BLOCK_K)
    here = (n < N)[None, :]
    tile_at = weight + n.to(tl.int64)[None, :] * K + k[:, None]
    x_at = x + m[:, None] * K + k[None, :]
    # The first tile of the weight is loaded before x is known.
    tile = tl.load(tile_at, here & (k < K)[:, None], 0.0)
    up_tile = tile
    if GATED:
        up_tile = tl.load(tile_at + N * K, here & (k < K)[:, None], 0.0)
    follow(PDL)
    x_tile = tl.load(x_at, (m < M)[:, None] & (k < K)[None, :], 0.0)
    sums = tl.dot(x_tile, tile, input_precision="ieee")
    up_sums = sums
    if GATED:
        up_sums = tl.dot(x_tile, up_tile, input_precision="ieee")
    for start in tl.range(BLOCK_K, SPLIT_K, BLOCK_K, num_stages=STAGES):
        inside = here & (start + k < K)[:, None]
        x_tile = tl.load(x_at + start, (m < M)[:, None] & (start + k < K)[None, :], 0.0)
        tile = tl.load(tile_at + start, inside, 0.0)
        sums = tl.dot(x_tile, tile, sums, input_precision="ieee")
        if GATED:
            up_tile = tl.load(tile_at + N * K + start, inside, 0.0)
            up_sums = tl.dot(x_tile, up_tile, up_sums, input_precision="ieee")
    finish_split(
        y, sums, up_sums, m, n, bias, residual, parts, arrivals, tile_id, tl.num_programs(0), split, M, N,
        BLOCK_M, BLOCK_N, SPLITS, GATED
    )  # fmt: skip


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    arrivals: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    tiling: Tiling | None = None,
    pdl: bool = False,
) -> Tensor:
    """act(norm(x) @ weight.T + bias) + residual, with float32 sums and one rounding at the end.

    x: [m, k], m from 1 to some 64; weight: [n, k], or [2 * n, k] (gate before up) if `gated`, which makes act
    SwiGLU; bias: one number a row of the weight; norm: [k], the weight of an RMSNorm; residual: [m, n].
    All contiguous and of one dtype. arrivals: [MAX_SPLIT_TILES] int32 zeros, and zeros again afterwards; for
    one call at a time. -> [m, n].
    """
    m, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    # Each program would normalise all rows for itself, which costs nothing with one row, but soon more than
    # a kernel of its own.
    if norm is not None and m > 1:
        x, norm = rms_norm(x, norm, eps, pdl=pdl), None
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if prefers_gemv(m, n, k, gated=gated):
        tiling = tiling or gemv_tiling(m, n, k, gated=gated, norm=norm is not None)
        gemv(y, x, weight, bias, norm, eps, residual, tiling, gated=gated, pdl=pdl)
        return y
    tiling = tiling or skinny_tiling(m, n, k, gated=gated)
    block_m = max(16, triton.next_power_of_2(m))
    split_k = triton.cdiv(triton.cdiv(k, tiling.block_k), tiling.splits) * tiling.block_k
    splits, tiles = triton.cdiv(k, split_k), triton.cdiv(n, tiling.block_n)
    parts = None
    if splits > 1:
        shape = (splits, tiles, 2 if gated else 1, block_m, tiling.block_n)
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    _skinny_kernel[(tiles, splits)](
        y, x, weight, bias, residual, parts, arrivals, m, N=n, K=k, BLOCK_M=block_m, BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k, SPLIT_K=split_k, SPLITS=splits, STAGES=tiling.stages, GATED=gated,
        num_warps=tiling.warps, **launch_options(pdl),
    )  # fmt: skip
    return y
