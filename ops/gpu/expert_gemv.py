"""Products of a few tokens with the matrices of their experts, by plain multiply and add.

Each choice's weights are streamed for itself, without sorting: few choices are of an expert in common. Two
kernels compute a mixture of SwiGLUs: up to the activation, and from there to the sum over a token's experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.experts import NO_BIASES, ExpertBiases
from microvllm.ops.gpu.activation import gated_unit
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.tiling import Tiling

INNER = Tiling(4, 512, 4)
OUTER = Tiling(4, 1024, 4)


@triton.jit
def _inner_kernel(
    y, x, weight, bias, norm, chosen, eps,
    N: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CLAMPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N columns of one choice: as many rows of its expert's gate and up."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    choice = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    here = (n < N)[:, None]
    follow(PDL)
    expert = tl.load(chosen + choice).to(tl.int64)
    gate_at = weight + expert * (2 * N * K) + n[:, None] * K + k[None, :]
    row_at = x + choice // CHOICES * K + k
    gate = tl.load(gate_at, here & (k < K)[None, :], 0.0)
    up = tl.load(gate_at + N * K, here & (k < K)[None, :], 0.0)
    gate_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_sums = gate_sums
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        wide, up_wide = gate.to(tl.float32), up.to(tl.float32)
        ahead = start + BLOCK_K
        gate = tl.load(gate_at + ahead, here & (ahead + k < K)[None, :], 0.0)
        up = tl.load(gate_at + N * K + ahead, here & (ahead + k < K)[None, :], 0.0)
        row = tl.load(row_at + start, start + k < K, 0.0).to(tl.float32)
        if norm is not None:
            squares += row * row
            row *= tl.load(norm + start + k, start + k < K, 0.0).to(tl.float32)
        gate_sums += wide * row[None, :]
        up_sums += up_wide * row[None, :]
    # The norm's scale is the same for the whole row, so that it can wait until the product is done.
    scale = 1.0
    if norm is not None:
        scale = tl.rsqrt(tl.sum(squares) / K + eps)
    gates, ups = tl.sum(gate_sums, 1) * scale, tl.sum(up_sums, 1) * scale
    if bias is not None:
        gates += tl.load(bias + expert * (2 * N) + n, n < N, 0.0).to(tl.float32)
        ups += tl.load(bias + expert * (2 * N) + N + n, n < N, 0.0).to(tl.float32)
    tl.store(y + choice * N + n, gated_unit(gates, ups, CLAMPED), n < N)


@triton.jit
def _outer_kernel(
    y, x, weight, bias, scales, chosen, residual,
    N: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N columns of one token: as many rows of the matrices of all its experts."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    here = (n < N)[:, None]
    follow(PDL)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for place in tl.static_range(CHOICES):
        choice = token * CHOICES + place
        expert = tl.load(chosen + choice).to(tl.int64)
        tile_at = weight + expert * (N * K) + n[:, None] * K + k[None, :]
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.static_range(0, K, BLOCK_K):
            tile = tl.load(tile_at + start, here & (start + k < K)[None, :], 0.0).to(tl.float32)
            row = tl.load(x + choice * K + start + k, start + k < K, 0.0).to(tl.float32)
            sums += tile * row[None, :]
        one = tl.sum(sums, 1)
        if bias is not None:
            one += tl.load(bias + expert * N + n, n < N, 0.0).to(tl.float32)
        total += one * tl.load(scales + choice)
    if residual is not None:
        total += tl.load(residual + token * N + n, n < N, 0.0).to(tl.float32)
    tl.store(y + token * N + n, total, n < N)


def expert_gemv(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    chosen: Tensor,
    residual: Tensor | None,
    norm: Tensor | None,
    eps: float,
    biases: ExpertBiases = NO_BIASES,
    *,
    clamped: bool = False,
    inner: Tiling = INNER,
    outer: Tiling = OUTER,
    pdl: bool = False,
) -> Tensor:
    """norm(x) through its experts + residual, in float32, rounded behind the activation and at the end.

    x: [n, h]; gate_up: [E * 2 * i, h]; down: [E * h, i]; weights, chosen: [n, k] float32 and int32;
    residual: [n, h], or None; norm: [h], the weight of an RMSNorm, or None. All contiguous -> [n, h].
    clamped: `clamped_swiglu` takes SwiGLU's place.
    """
    (n, hidden), width, k = x.shape, down.shape[1], chosen.shape[1]
    between = torch.empty(n * k, width, dtype=x.dtype, device=x.device)
    _inner_kernel[(triton.cdiv(width, inner.block_n), n * k)](
        between, x, gate_up, biases.gate_up, norm, chosen, eps, N=width, K=hidden, CHOICES=k,
        BLOCK_N=inner.block_n, BLOCK_K=inner.block_k, CLAMPED=clamped, num_warps=inner.warps,
        **launch_options(pdl),
    )  # fmt: skip
    y = torch.empty_like(x) if residual is None else residual
    _outer_kernel[(triton.cdiv(hidden, outer.block_n), n)](
        y, between, down, biases.down, weights, chosen, residual, N=hidden, K=width, CHOICES=k,
        BLOCK_N=outer.block_n, BLOCK_K=outer.block_k, num_warps=outer.warps, **launch_options(pdl),
    )  # fmt: skip
    return y
