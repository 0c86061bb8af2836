"""Products of one or two rows with a matrix of 8-bit codes and scales, by plain multiply and add.

As `ops.gpu.gemv`, whose weights are numbers: here each is widened in registers from its code. Neighbouring
products of a thread are added up before they join its sums, which so take a sixteenth of the registers.

The reference is `ops.scaled.ScaledTensor.dequantized` in float32 and what `ops.gpu.gemv` names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.gemv import finish_row
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.tiling import Tiling
from microvllm.ops.scaled import ScaledTensor

RUN = tl.constexpr(16)  # codes that are added up first: what a thread loads at once


@triton.jit
def _codes(codes_at, inside):
    """A tile of codes, past the L1 cache, which x stays in."""
    return tl.load(codes_at, inside, 0, cache_modifier=".cg")


@triton.jit
def _scale_of(scales, n, block, N, K: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr):
    """The scales of rows n, in the blocks of columns `block`: [len(n), len(block)]."""
    across: tl.constexpr = (K + SCALE_K - 1) // SCALE_K
    inside = (n < N)[:, None] & (block < across)[None, :]
    return tl.load(scales + (n // SCALE_N)[:, None] * across + block[None, :], inside, 0.0)


@triton.jit
def _scaled_gemv_kernel(
    y, x, codes, scales, norm, bias, residual, eps,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N columns of y: as many rows of the weight and, if GATED, of its second half."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    runs = tl.arange(0, BLOCK_K // RUN) * RUN
    rows: tl.constexpr = N * 2 if GATED else N
    in_blocks: tl.constexpr = SCALE_K < K
    here = (n < N)[:, None]
    tile_at = codes + n.to(tl.int64)[:, None] * K + k[None, :]
    # AHEAD tiles of codes are under way before they are used, the first ones even before x is known.
    tiles = ()
    up_tiles = ()
    for step in tl.static_range(AHEAD):
        inside = here & (step * BLOCK_K + k < K)[None, :]
        tiles = tiles + (_codes(tile_at + step * BLOCK_K, inside),)  # noqa: RUF005 (Triton knows no *)
        if GATED:
            up_tiles = up_tiles + (_codes(tile_at + N * K + step * BLOCK_K, inside),)  # noqa: RUF005
    follow(PDL)
    sums = (tl.zeros((BLOCK_N, BLOCK_K // RUN), tl.float32),) * M
    up_sums = sums if GATED else ()
    squares = (tl.zeros((BLOCK_K,), tl.float32),) * M if norm is not None else ()
    # Unrolled: codes that a loop carries are taken apart and put together again, byte by byte.
    for step in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        start = step * BLOCK_K
        ahead = start + AHEAD * BLOCK_K
        wide = tiles[step].to(tl.float8e4nv, bitcast=True).to(tl.float32)  # type: ignore[var-annotated]
        if GATED:
            up_wide = up_tiles[step].to(tl.float8e4nv, bitcast=True).to(tl.float32)
        if (step + AHEAD) * BLOCK_K < K:
            inside = here & (ahead + k < K)[None, :]
            tiles = tiles + (_codes(tile_at + ahead, inside),)  # noqa: RUF005 (Triton knows no *)
            if GATED:
                up_tiles = up_tiles + (_codes(tile_at + N * K + ahead, inside),)  # noqa: RUF005
        if in_blocks:
            scale = _scale_of(scales, n, (start + runs) // SCALE_K, N, K, SCALE_N, SCALE_K)
            if GATED:
                up_scale = _scale_of(scales, N + n, (start + runs) // SCALE_K, rows, K, SCALE_N, SCALE_K)
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
            part = tl.sum(tl.reshape(wide * row[None, :], (BLOCK_N, BLOCK_K // RUN, RUN)), 2)
            new_sums = new_sums + (sums[m] + (part * scale if in_blocks else part),)  # noqa: RUF005
            if GATED:
                part = tl.sum(tl.reshape(up_wide * row[None, :], (BLOCK_N, BLOCK_K // RUN, RUN)), 2)
                new_up_sums = new_up_sums + (up_sums[m] + (part * up_scale if in_blocks else part),)  # noqa: RUF005
        sums = new_sums
        up_sums = new_up_sums
        squares = new_squares
    for m in tl.static_range(M):
        # The norm's scale is the same for the whole row, so that it can wait until the product is done.
        factor = 1.0
        if norm is not None:
            factor = tl.rsqrt(tl.sum(squares[m], 0) / K + eps)
        value = tl.sum(sums[m], 1) * factor
        if not in_blocks:
            value *= tl.load(scales + n // SCALE_N, n < N, 0.0)
        up = value
        if GATED:
            up = tl.sum(up_sums[m], 1) * factor
            if not in_blocks:
                up *= tl.load(scales + (N + n) // SCALE_N, n < N, 0.0)
        finish_row(y, value, up, m, n, bias, residual, N, GATED)


def scaled_gemv(
    x: Tensor,
    weight: ScaledTensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    tiling: Tiling,
    *,
    gated: bool,
    pdl: bool = False,
) -> Tensor:
    """act(norm(x) @ weight.T + bias) + residual: [m, n]; the arguments are `skinny.skinny_linear`'s.

    Blocks of columns that share a scale are multiples of 16, or all.
    """
    (m, k), n = x.shape, weight.shape[0] // (2 if gated else 1)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _scaled_gemv_kernel[(triton.cdiv(n, tiling.block_n),)](
        y, x, weight.as_subclass(Tensor).view(torch.uint8), weight.scales, norm, bias, residual, eps, M=m,
        N=n, K=k, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k,
        AHEAD=min(tiling.stages, triton.cdiv(k, tiling.block_k)), SCALE_N=weight.block[0],
        SCALE_K=weight.block[1], GATED=gated, num_warps=tiling.warps, maxnreg=tiling.max_registers,
        **launch_options(pdl),
    )  # fmt: skip
    return y
