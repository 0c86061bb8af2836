"""Products whose every row has the same bits, whatever number of rows it is computed with.

A sum of K terms is cut into SPLITS runs by the weight's shape alone; a run is added up BLOCK_K terms after
another, and the runs in their order. With few rows each run is a program's, so that a narrow weight fills the
device, and the program that comes last adds the parts up; with many rows one program computes all runs of its
tile. Both round alike: tile sizes decide which program adds, never in which order. The method is that of
batch-invariant inference (He et al., 2025, "Defeating Nondeterminism in LLM Inference"), with the splits of
`ops.gpu.skinny`.

A weight of [n, k] and m rows take n * k * 2 bytes from memory, 2 * m * n * k operations; x is padded to 64
rows, the tensor core's tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.product import Product
from microvllm.ops.gpu.skinny import MAX_SPLIT_TILES, add_parts, finish


@dataclass(frozen=True, slots=True)
class _Tile:
    rows: int
    columns: int
    warps: int
    stages: int


BLOCK_K = tl.constexpr(64)
FEW = _Tile(64, 64, 4, 6)
MANY = _Tile(128, 128, 8, 3)
PROGRAMS = 256  # enough to fill a device
LONGEST_SPLIT = 8  # steps of BLOCK_K: no run is shorter
# Tiles of rows that follow each other, for the L2 cache to keep a part of the weight.
ROWS_TOGETHER = tl.constexpr(8)


@triton.jit
def _run(
    x_at, weight_at, x_rows, weight_rows, first, K: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """The sums over terms [first, first + RUN), one step after another."""
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, RUN, BLOCK_K, num_stages=STAGES):
        inside = (first + start + k < K)[None, :]
        x = tl.load(x_at + (first + start), x_rows & inside, 0.0)
        w = tl.load(weight_at + (first + start), weight_rows & inside, 0.0)
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["M"])
def _fixed_order_kernel(
    y, x, weight, bias, residual, parts, arrivals, M,
    N: tl.constexpr, K: tl.constexpr, RUN: tl.constexpr, SPLITS: tl.constexpr, SPREAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a tile of y; of its SPLITS runs one if SPREAD, which is for one tile of rows, else all."""
    follow(PDL)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    group = tile // (ROWS_TOGETHER * tiles_n)
    first_m = group * ROWS_TOGETHER
    together = tl.minimum(ROWS_TOGETHER, tiles_m - first_m)
    place = tile - group * ROWS_TOGETHER * tiles_n
    m = (first_m + place % together) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_n = place // together
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x + m.to(tl.int64)[:, None] * K + k[None, :]
    weight_at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    x_rows, weight_rows = (m < M)[:, None], (n < N)[:, None]
    if SPREAD:
        sums = _run(x_at, weight_at, x_rows, weight_rows, split * RUN, K, RUN, BLOCK_M, BLOCK_N, STAGES)
        complete = SPLITS == 1
        if SPLITS > 1:
            size: tl.constexpr = BLOCK_M * BLOCK_N
            stride: tl.constexpr = tiles_n * size
            here = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            part = parts + tile_n * size + here
            tl.store(part + split * stride, sums)
            tl.debug_barrier()  # all threads have stored before one of them says so
            complete = tl.atomic_add(arrivals + tile_n, 1) == SPLITS - 1
            if complete:
                tl.atomic_xchg(arrivals + tile_n, 0)
                sums = add_parts(part, stride, SPLITS)
        if complete:
            finish(y, sums, sums, m, n, bias, residual, M, N, False)
    else:
        sums = _run(x_at, weight_at, x_rows, weight_rows, 0, K, RUN, BLOCK_M, BLOCK_N, STAGES)
        for further in range(1, SPLITS):
            sums += _run(
                x_at, weight_at, x_rows, weight_rows, further * RUN, K, RUN, BLOCK_M, BLOCK_N, STAGES
            )
        finish(y, sums, sums, m, n, bias, residual, M, N, False)


def fixed_order_linear(
    x: Tensor,
    weight: Tensor,
    arrivals: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    pdl: bool = False,
) -> Tensor:
    """x @ weight.T + bias + residual with float32 sums and one rounding; a row's bits depend on no other row.

    x: [m, k]; weight: [n, k]; bias: [n]; residual: [m, n]; all contiguous and of one dtype. arrivals:
    [MAX_SPLIT_TILES] int32 zeros, and zeros again afterwards; for one call at a time. -> [m, n].
    """
    m, k = x.shape
    n = weight.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    steps, tiles = triton.cdiv(k, BLOCK_K.value), triton.cdiv(n, FEW.columns)
    wanted = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(steps, LONGEST_SPLIT))
    run = triton.cdiv(steps, wanted if tiles <= MAX_SPLIT_TILES else 1)
    splits = triton.cdiv(steps, run)
    spread = m <= FEW.rows
    tile = FEW if spread else MANY
    tiles = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
    parts = None
    if spread and splits > 1:
        parts = torch.empty(splits, tiles, tile.rows, tile.columns, dtype=torch.float32, device=x.device)
    stages = tile.stages if x.dtype.itemsize == 2 else 2
    _fixed_order_kernel[(tiles, splits if spread else 1)](
        y, x, weight, bias, residual, parts, arrivals, m, N=n, K=k, RUN=run * BLOCK_K.value, SPLITS=splits,
        SPREAD=spread, BLOCK_M=tile.rows, BLOCK_N=tile.columns, STAGES=stages, num_warps=tile.warps,
        **launch_options(pdl),
    )  # fmt: skip
    return y


class FixedOrderProduct(Product):
    """A `Product` by one kernel, where `GpuProduct` has one for each number of rows."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [m, in] -> [m, out]."""
        x = self._normed(x)
        y = fixed_order_linear(x, self._weight, self._arrivals, self._bias, residual, pdl=self._pdl)
        return self._activated(y)
