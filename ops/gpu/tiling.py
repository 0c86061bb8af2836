"""How a product of few rows is cut into programs: what `scripts/gpu/check_ops.py --tune` found on an H100."""

from __future__ import annotations

from dataclasses import dataclass

PROGRAMS = 264  # two for each multiprocessor of an H100


@dataclass(frozen=True, slots=True)
class Tiling:
    """A program takes block_n rows of the weight (of each half, if gated), block_k columns at a time.

    stages: how many such tiles are in flight; splits: how many programs share the columns.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int = 1
    splits: int = 1


def gemv_tiling(m: int, n: int, k: int, *, gated: bool, norm: bool) -> Tiling:
    """For m <= 4 rows of x, n columns of the result, sums over k."""
    if m > 2:
        return Tiling(2, 512, 4) if gated else Tiling(4, 1024, 4)
    if m == 2:
        return Tiling(2, 2048, 8) if n <= 1024 < k else Tiling(2, 1024, 4)
    if gated:
        return Tiling(8, 512, 4)
    if k <= 1024:
        return Tiling(4, 1024, 4)
    if n <= 1024:
        return Tiling(1, 1024, 4)
    return Tiling(2 if norm or k > 4096 else 4, 2048, 8)


def skinny_tiling(m: int, n: int, k: int, *, gated: bool) -> Tiling:
    """For 4 < m <= 64 rows of x: enough programs to fill the device, by splitting the sums if need be."""
    block_n = 32 if gated or n < 8192 else 64
    tiles = -(-n // block_n)
    splits = max(1, min(2 * PROGRAMS // tiles, k // 512))
    return Tiling(block_n, 128, 4, 4, splits)


def max_skinny_rows(n: int, k: int) -> int:
    """Up to how many rows the own kernels are faster than cuBLAS, for a weight of [n, k]."""
    return 16
