"""How a product of few rows is cut into programs. Chosen by `scripts/gpu/check_ops.py --tune` on an H100."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """A program takes block_n rows of the weight (of each half, if gated), block_k columns at a time."""

    block_n: int
    block_k: int
    warps: int
    stages: int = 1


def gemv_tiling(m: int, n: int, k: int, *, gated: bool) -> Tiling:
    """For m <= 4 rows of x, n columns of the result, sums over k."""
    rows = 2 if gated or m > 2 else 4
    if k <= 1024 or m > 2:
        return Tiling(rows, 1024, 4)
    return Tiling(rows, 2048, 8)


def skinny_tiling(m: int, n: int, k: int, *, gated: bool) -> Tiling:
    """For 4 < m <= 64 rows of x."""
    if n * (2 if gated else 1) < 8192:
        return Tiling(16, 256, 4, 4)
    return Tiling(16 if gated else 32, 256, 4, 4)


def max_skinny_rows(n: int, k: int) -> int:
    """Up to how many rows the own kernels are faster than cuBLAS, for a weight of [n, k]."""
    return 16
