"""As `ops.gpu.expert_gemv`, of experts in codes of e4m3, which are widened in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.experts import NO_BIASES, ExpertBiases
from microvllm.ops.gpu.activation import gated_unit
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.scaled import ScaledTensor

ROWS = tl.constexpr(8)  # of a matrix that a program multiplies
STEP = 128  # terms at a time, at most as many as share a scale


@triton.jit
def _rows_of(
    codes, scales, x, first, n, inside, K: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    STEP: tl.constexpr
):  # fmt: skip
    """x: a pointer to a row -> its products with rows n, inside a matrix that begins at row `first`."""
    k = tl.arange(0, STEP)
    across: tl.constexpr = (K + SCALE_K - 1) // SCALE_K
    at = codes + (first + n).to(tl.int64)[:, None] * K + k[None, :]
    scale_at = scales + (first + n) // SCALE_N * across
    sums = tl.zeros((ROWS, STEP), tl.float32)
    # Unrolled, so that the loads of many steps are under way together.
    for start in tl.static_range(0, K, STEP):
        terms = start + k < K
        tile = tl.load(at + start, inside[:, None] & terms[None, :], 0)
        row = tl.load(x + start + k, terms, 0.0).to(tl.float32)
        scale = tl.load(scale_at + start // SCALE_K, inside, 0.0)
        sums += tile.to(tl.float8e4nv, bitcast=True).to(tl.float32) * (scale[:, None] * row[None, :])
    return tl.sum(sums, 1)


@triton.jit
def _inner_kernel(
    y, x, codes, scales, bias, chosen,
    N: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    STEP: tl.constexpr, CLAMPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: ROWS columns of one choice: as many rows of its expert's gate and up."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    choice = tl.program_id(1)
    follow(PDL)
    first = tl.load(chosen + choice) * (2 * N)
    row = x + choice // CHOICES * K
    gate = _rows_of(codes, scales, row, first, n, n < N, K, SCALE_N, SCALE_K, STEP)
    up = _rows_of(codes, scales, row, first + N, n, n < N, K, SCALE_N, SCALE_K, STEP)
    if bias is not None:
        gate += tl.load(bias + first + n, n < N, 0.0).to(tl.float32)
        up += tl.load(bias + first + N + n, n < N, 0.0).to(tl.float32)
    tl.store(y + choice * N + n, gated_unit(gate, up, CLAMPED), n < N)


@triton.jit
def _outer_kernel(
    y, x, codes, scales, bias, weights, chosen, residual,
    N: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: ROWS columns of one token: as many rows of the matrices of all its experts."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    follow(PDL)
    total = tl.zeros((ROWS,), tl.float32)
    for place in tl.static_range(CHOICES):
        choice = token * CHOICES + place
        first = tl.load(chosen + choice) * N
        one = _rows_of(codes, scales, x + choice * K, first, n, n < N, K, SCALE_N, SCALE_K, STEP)
        if bias is not None:
            one += tl.load(bias + first + n, n < N, 0.0).to(tl.float32)
        total += one * tl.load(weights + choice)
    if residual is not None:
        total += tl.load(residual + token * N + n, n < N, 0.0).to(tl.float32)
    tl.store(y + token * N + n, total, n < N)


def coded_expert_gemv(
    x: Tensor,
    gate_up: ScaledTensor,
    down: ScaledTensor,
    weights: Tensor,
    chosen: Tensor,
    residual: Tensor | None,
    biases: ExpertBiases = NO_BIASES,
    *,
    clamped: bool = False,
    pdl: bool = False,
) -> Tensor:
    """x through its experts + residual; the arguments are `expert_gemv.expert_gemv`'s -> [n, h].

    A power of two of at least 16 has to divide the columns that share a scale.
    """
    (n, hidden), width, k = x.shape, down.shape[1], chosen.shape[1]
    between = torch.empty(n * k, width, dtype=x.dtype, device=x.device)
    _inner_kernel[(triton.cdiv(width, ROWS.value), n * k)](
        between, x, gate_up.as_subclass(Tensor).view(torch.uint8), gate_up.scales, biases.gate_up, chosen,
        N=width, K=hidden, CHOICES=k, SCALE_N=gate_up.block[0], SCALE_K=gate_up.block[1],
        STEP=step_of(gate_up), CLAMPED=clamped, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    y = torch.empty_like(x) if residual is None else residual
    _outer_kernel[(triton.cdiv(hidden, ROWS.value), n)](
        y, between, down.as_subclass(Tensor).view(torch.uint8), down.scales, biases.down, weights, chosen,
        residual, N=hidden, K=width, CHOICES=k, SCALE_N=down.block[0], SCALE_K=down.block[1],
        STEP=step_of(down), num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return y


def step_of(weight: ScaledTensor) -> int:
    """Terms that share a scale, at most `STEP`: the largest power of two of them."""
    width = weight.block[1]
    return STEP if width >= weight.shape[1] else min(width & -width, STEP)
