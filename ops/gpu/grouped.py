"""Products of rows with a matrix of their own expert each: a tile of rows is of one expert.

`SortedChoices` lists the tiles. Their number is an upper bound that depends on the number of rows alone, and
programs of tiles without rows end at once, so that a captured step can choose any experts. With few rows an
expert the weights' bytes are what takes the time: those of each chosen expert are read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.activation import swiglu
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.routing import SortedChoices

TILES_TOGETHER = 8  # that follow each other for each block of columns: those of one expert share its weights
SUM_BLOCK = 1024  # elements of a row that one program adds up


@dataclass(frozen=True, slots=True)
class GroupedTiling:
    """A program takes `rows` choices of an expert by `columns` of the result, `block_k` terms at a time.

    stages: how many such tiles are in flight.
    """

    rows: int
    columns: int
    block_k: int
    warps: int
    stages: int


@triton.jit
def _grouped_kernel(
    y,
    x,
    weight,
    scales,
    order,
    experts,
    starts,
    stops,
    NUM_TILES,
    N: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    GATED: tl.constexpr,
    LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: a tile of choices by BLOCK_N columns.

    If not LAST, x has a row for each token, and y one for each choice in their sorted order. LAST: x has a
    row for each choice in sorted order, y one for each choice, times its scale.
    """
    follow(PDL)
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    group = program // (TILES_TOGETHER * blocks_n)
    together = tl.minimum(TILES_TOGETHER, NUM_TILES - group * TILES_TOGETHER)
    inside_group = program - group * TILES_TOGETHER * blocks_n
    tile = group * TILES_TOGETHER + inside_group % together
    start, stop = tl.load(starts + tile), tl.load(stops + tile)
    if start < stop:
        expert = tl.load(experts + tile).to(tl.int64)
        place = start + tl.arange(0, BLOCK_M)
        rows = place < stop
        choice = tl.load(order + place, rows, 0)
        n = inside_group // together * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        columns = (n < N)[:, None]
        x_row = place if LAST else choice // CHOICES
        x_at = x + x_row.to(tl.int64)[:, None] * K + k[None, :]
        own = weight + expert * (2 * N * K if GATED else N * K)
        weight_at = own + n[:, None] * K + k[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_sums = sums
        for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            terms = (first + k < K)[None, :]
            x_tile = tl.load(x_at + first, rows[:, None] & terms, 0.0)
            w_tile = tl.load(weight_at + first, columns & terms, 0.0)
            sums = tl.dot(x_tile, tl.trans(w_tile), sums, input_precision="ieee")
            if GATED:
                w_tile = tl.load(weight_at + (N * K + first), columns & terms, 0.0)
                up_sums = tl.dot(x_tile, tl.trans(w_tile), up_sums, input_precision="ieee")
        if GATED:
            sums = swiglu(sums, up_sums)
        y_row = place
        if LAST:
            sums *= tl.load(scales + choice, rows, 0.0)[:, None]
            y_row = choice
        y_at = y + y_row.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(y_at, sums, rows[:, None] & (n < N)[None, :])


def grouped_product(
    x: Tensor,
    weight: Tensor,
    choices: SortedChoices,
    num_chosen: int,
    tiling: GroupedTiling,
    *,
    columns: int,
    gated: bool = False,
    scales: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Each choice's row times its expert's weight -> [n * k, columns], rounded once.

    x: [n, in], of each choice its token's row, and the result is in sorted order; or with `scales` [n, k]
    float32, x: [n * k, in] in sorted order, and the result is scaled and in the order of the choices.
    weight: [E * columns, in], or [E * 2 * columns, in] if `gated`, gate before up, for SwiGLU. `choices` were
    sorted for `tiling.rows`.
    """
    count, k = choices.order.shape[0], x.shape[1]
    y = torch.empty(count, columns, dtype=x.dtype, device=x.device)
    tiles = choices.experts.shape[0]
    _grouped_kernel[(tiles * triton.cdiv(columns, tiling.columns),)](
        y,
        x,
        weight,
        scales,
        choices.order,
        choices.experts,
        choices.starts,
        choices.stops,
        tiles,
        N=columns,
        K=k,
        CHOICES=num_chosen,
        BLOCK_M=tiling.rows,
        BLOCK_N=tiling.columns,
        BLOCK_K=tiling.block_k,
        STAGES=tiling.stages,
        TILES_TOGETHER=TILES_TOGETHER,
        GATED=gated,
        LAST=scales is not None,
        num_warps=tiling.warps,
        **launch_options(pdl),
    )
    return y


@triton.jit
def _sum_kernel(
    y,
    parts,
    residual,
    D: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: BLOCK elements of one token."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(CHOICES):
        total += tl.load(parts + (row * CHOICES + place) * D + d, d < D, 0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + row * D + d, d < D, 0.0).to(tl.float32)
    tl.store(y + row * D + d, total, d < D)


def sum_choices(parts: Tensor, num_chosen: int, residual: Tensor | None, *, pdl: bool = False) -> Tensor:
    """parts: [n * k, d], of each token the choices in their order -> their sum + residual, [n, d]."""
    n, d = parts.shape[0] // num_chosen, parts.shape[1]
    y = torch.empty(n, d, dtype=parts.dtype, device=parts.device) if residual is None else residual
    block = min(SUM_BLOCK, triton.next_power_of_2(d))
    _sum_kernel[(n, triton.cdiv(d, block))](
        y,
        parts,
        residual,
        D=d,
        CHOICES=num_chosen,
        BLOCK=block,
        RESIDUAL=residual is not None,
        num_warps=4,
        **launch_options(pdl),
    )
    return y
