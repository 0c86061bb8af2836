"""Products of up to MAX_ROWS rows with a weight: bound by the weight's bytes, which are read once.

Up to `gemv.MAX_ROWS` rows by `gemv`, above by tensor cores, whose tile is padded to 16 rows or more. The
norm needs no pass of its own: x times the norm's weight goes into the product, the sum of squares is taken
beside it, and the product's result is scaled at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.activation import swiglu
from microvllm.ops.gpu.gemv import MAX_ROWS as MAX_GEMV_ROWS
from microvllm.ops.gpu.gemv import gemv
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.tiling import Tiling, gemv_tiling, skinny_tiling

MAX_ROWS = 64  # of x


@triton.jit
def _x_tile(x, norm, m, k, squares, M, K: tl.constexpr, NORM: tl.constexpr):
    """x[m, k], times the norm's weight if NORM, in x's dtype; and `squares` with those of x[m, k] added."""
    tile = tl.load(x + m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :], 0.0)
    if NORM:
        wide = tile.to(tl.float32)
        squares += wide * wide
        tile = (wide * tl.load(norm + k, k < K, 0.0).to(tl.float32)[None, :]).to(tile.dtype)
    return tile, squares


@triton.jit(do_not_specialize=["M"])
def _skinny_kernel(
    y,
    x,
    weight,
    norm,
    bias,
    residual,
    eps,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: BLOCK_N columns of y: as many rows of the weight and, if GATED, of its second half."""
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    here = (n < N)[None, :]
    tile_at = weight + n.to(tl.int64)[None, :] * K + k[:, None]
    # The first tile of the weight is loaded before x is known.
    tile = tl.load(tile_at, here & (k < K)[:, None], 0.0)
    if GATED:
        up_tile = tl.load(tile_at + N * K, here & (k < K)[:, None], 0.0)
    follow(PDL)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    x_tile, squares = _x_tile(x, norm, m, k, squares, M, K, NORM)
    sums = tl.dot(x_tile, tile, input_precision="ieee")
    if GATED:
        up_sums = tl.dot(x_tile, up_tile, input_precision="ieee")
    for start in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        inside = here & (start + k < K)[:, None]
        x_tile, squares = _x_tile(x, norm, m, start + k, squares, M, K, NORM)
        tile = tl.load(tile_at + start, inside, 0.0)
        sums = tl.dot(x_tile, tile, sums, input_precision="ieee")
        if GATED:
            up_tile = tl.load(tile_at + N * K + start, inside, 0.0)
            up_sums = tl.dot(x_tile, up_tile, up_sums, input_precision="ieee")
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
        sums *= scale
        if GATED:
            up_sums *= scale
    if BIAS:
        sums += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
        if GATED:
            up_sums += tl.load(bias + N + n, n < N, 0.0).to(tl.float32)[None, :]
    if GATED:
        sums = swiglu(sums, up_sums)
    at = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & here
    if RESIDUAL:
        sums += tl.load(residual + at, inside, 0.0).to(tl.float32)
    tl.store(y + at, sums, inside)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
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

    x: [m, k], 1 <= m <= MAX_ROWS; weight: [n, k], or [2 * n, k] (gate before up) if `gated`, which makes act
    SwiGLU; bias: one number a row of the weight; norm: [k], the weight of an RMSNorm; residual: [m, n].
    All contiguous and of one dtype. -> [m, n].
    More than `gemv.MAX_ROWS` rows with a norm: x * norm is rounded to x's dtype before its scale is known,
    and a float16 may not hold it.
    """
    m, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m <= MAX_GEMV_ROWS:
        tiling = tiling or gemv_tiling(m, n, k, gated=gated)
        gemv(y, x, weight, bias, norm, eps, residual, tiling, gated=gated, pdl=pdl)
        return y
    tiling = tiling or skinny_tiling(m, n, k, gated=gated)
    _skinny_kernel[(triton.cdiv(n, tiling.block_n),)](
        y,
        x,
        weight,
        norm,
        bias,
        residual,
        eps,
        m,
        N=n,
        K=k,
        BLOCK_M=max(16, triton.next_power_of_2(m)),
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        STAGES=tiling.stages,
        NORM=norm is not None,
        GATED=gated,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        num_warps=tiling.warps,
        **launch_options(pdl),
    )
    return y
