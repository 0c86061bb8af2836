"""Products of one to four rows with a weight, by plain multiply and add: the weight is streamed once.

Each row costs a register for every weight element that is in flight.

The reference is `ops.norm.rms_norm`, `torch.nn.functional.linear` and `ops.activation.silu_and_mul` in
float32, with one rounding at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.activation import swiglu
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.tiling import Tiling


@triton.jit
def finish_row(
    y, value, up, m, n, bias, residual, N: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """Write columns n of row m of y: act(value + bias) + residual; up: the second half's, if GATED."""
    if bias is not None:
        value += tl.load(bias + n, n < N, 0.0).to(tl.float32)
    if GATED:
        if bias is not None:
            up += tl.load(bias + N + n, n < N, 0.0).to(tl.float32)
        value = swiglu(value, up)
    if residual is not None:
        value += tl.load(residual + m * N + n, n < N, 0.0).to(tl.float32)
    tl.store(y + m * N + n, value, n < N)


@triton.jit
def _gemv_kernel(
    y, x, weight, norm, bias, residual, eps,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N columns of y: as many rows of the weight and, if GATED, of its second half."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    here = (n < N)[:, None]
    tile_at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    # The weight's tiles are loaded one ahead of their use, the first one even before x is known.
    tile = tl.load(tile_at, here & (k < K)[None, :], 0.0)
    if GATED:
        up_tile = tl.load(tile_at + N * K, here & (k < K)[None, :], 0.0)
    follow(PDL)
    sums = (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),) * M
    up_sums = sums if GATED else ()
    squares = (tl.zeros((BLOCK_K,), tl.float32),) * M if norm is not None else ()
    for start in range(0, K, BLOCK_K):
        wide = tile.to(tl.float32)
        ahead = start + BLOCK_K
        tile = tl.load(tile_at + ahead, here & (ahead + k < K)[None, :], 0.0)
        if GATED:
            up_wide = up_tile.to(tl.float32)
            up_tile = tl.load(tile_at + N * K + ahead, here & (ahead + k < K)[None, :], 0.0)
        if norm is not None:
            norm_part = tl.load(norm + start + k, start + k < K, 0.0).to(tl.float32)
        new_sums = ()
        new_up_sums = ()
        new_squares = ()
        for m in tl.static_range(M):
            row = tl.load(x + m * K + start + k, start + k < K, 0.0).to(tl.float32)
            if norm is not None:
                new_squares = new_squares + (squares[m] + row * row,)  # noqa: RUF005 (Triton knows no *)
                row = row * norm_part
            new_sums = new_sums + (sums[m] + wide * row[None, :],)  # noqa: RUF005 (Triton knows no *)
            if GATED:
                new_up_sums = new_up_sums + (up_sums[m] + up_wide * row[None, :],)  # noqa: RUF005 (Triton knows no *)
        sums = new_sums
        up_sums = new_up_sums
        squares = new_squares
    for m in tl.static_range(M):
        # The norm's scale is the same for the whole row, so that it can wait until the product is done.
        scale = 1.0
        if norm is not None:
            scale = tl.rsqrt(tl.sum(squares[m], 0) / K + eps)
        value = tl.sum(sums[m], 1) * scale
        up = tl.sum(up_sums[m], 1) * scale if GATED else value
        finish_row(y, value, up, m, n, bias, residual, N, GATED)


def gemv(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    tiling: Tiling,
    *,
    gated: bool,
    pdl: bool = False,
) -> None:
    """y = act(norm(x) @ weight.T + bias) + residual; the arguments are `skinny.skinny_linear`'s."""
    (m, k), n = x.shape, y.shape[1]
    _gemv_kernel[(triton.cdiv(n, tiling.block_n),)](
        y, x, weight, norm, bias, residual, eps, M=m, N=n, K=k, BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k, GATED=gated, num_warps=tiling.warps, **launch_options(pdl),
    )  # fmt: skip
