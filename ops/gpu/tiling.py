"""How a product of few rows is cut into programs: what `scripts/gpu/check_ops.py --tune` found on an H100."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """A program takes block_n rows of the weight (of each half, if gated), block_k columns at a time.

    stages: how many such tiles are in flight; splits: how many programs share the columns; max_registers: of
    a thread, in kernels of codes, None for as many as the compiler takes.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int = 1
    splits: int = 1
    max_registers: int | None = None


def prefers_gemv(m: int, n: int, k: int, *, gated: bool) -> bool:
    """Whether m rows of x are too few for tensor cores to pay."""
    return m <= 2 or (m <= 4 and not gated and n * k <= 1 << 22)


def gemv_tiling(m: int, n: int, k: int, *, gated: bool, norm: bool) -> Tiling:
    """For at most 4 rows of x, n columns of the result, sums over k."""
    if m > 2:
        return Tiling(4, 1024, 4)
    if m == 2:
        if gated:
            return Tiling(4, 512, 4) if k <= 1024 else Tiling(1, 2048, 8)
        if k <= 1024:
            return Tiling(4, 1024, 4)
        return Tiling(2, 2048, 8) if n <= 4096 and k <= 4096 else Tiling(2, 1024, 4)
    if gated:
        return Tiling(8, 512, 4)
    if k <= 1024:
        return Tiling(4, 1024, 4)
    if n <= 1024:
        return Tiling(1, 1024, 4)
    return Tiling(2 if norm or k > 4096 else 4, 2048, 8)


def skinny_tiling(m: int, n: int, k: int, *, gated: bool) -> Tiling:
    """For 2 < m <= 64 rows of x: enough programs to fill the device, by splitting the sums if need be."""
    block_n, block_k, stages = (32, 128, 4) if gated else (32, 256, 3) if k <= 4096 else (64, 128, 3)
    tiles = -(-n // block_n)
    return Tiling(block_n, block_k, 4, stages, 256 // tiles if tiles <= 64 else 1)


# Beyond, cuBLAS with a kernel before and after it is as fast or faster, for every weight that was measured.
MAX_SKINNY_ROWS = 16


# ---- matrices of 8-bit codes (`ops.gpu.scaled`) -----------------------------------------------------------

MAX_GEMV_ROWS = 2
MAX_EXACT_ROWS = 8  # of more, activations are rounded to codes where the checkpoint wants that
MAX_STREAMED_ROWS = 128


def scaled_gemv_tiling(m: int, n: int, k: int, *, gated: bool) -> Tiling:
    """For one or two rows of x; `stages`: tiles that are loaded ahead."""
    if gated and 2048 < k <= 4096:
        return Tiling(4, 4096, 8)
    return Tiling(4 if n > 1024 else 2, 2048 if k > 1024 else 1024, 4)


def scaled_skinny_tiling(m: int, n: int, step: int, itemsize: int, *, gated: bool) -> Tiling:
    """For more rows, where there is no `ops.gpu.stream`. step: columns of which all scales are one.

    itemsize: bytes of a number of x; three stages fit 99 KB of shared memory.
    """
    tiles = -(-n // 64)
    block_k = min(step, 32 if itemsize == 4 else 128 if m <= 32 else 64)
    return Tiling(64, block_k, 4, 3, 1 if gated or tiles > 128 else 256 // tiles)


def scaled_stream_tiling(m: int, n: int, k: int, step: int, *, gated: bool) -> Tiling:
    """For `ops.gpu.stream` with 16-bit x. step: columns of which all scales are one, 64 or more."""
    if gated:
        return Tiling(64, step, 4, 3)
    splits = max(1, min(-(-288 // -(-n // 64)), k // 512))
    return Tiling(64, step, 4, 6 if m <= 32 else 4, splits)


def rounded_stream_tiling(
    m: int, n: int, k: int, *, gated: bool, whole_rows: bool, ahead: bool = False
) -> Tiling:
    """For `ops.gpu.stream` with codes on both sides.

    whole_rows: a row of codes has one scale; ahead: those of blocks are loaded a step ahead.
    """
    tiles = -(-n // 64)
    if gated and ahead:  # three programs on a multiprocessor
        return Tiling(64, 128, 4, 3, 1, 168)
    if not gated and k >= 8192:
        return Tiling(64, 128, 4, 6, max(1, min(224 // tiles, k // 1024)))
    if whole_rows and m <= 64:
        return Tiling(64, 256, 4, 4 if m > 32 or not gated else 3)
    return Tiling(64, 128, 4, 4)


# ---- matrices of codes of 4 or 8 bits (`ops.gpu.coded`) -------------------------------------------------

MAX_CODED_ROWS = 256
MAX_WIDE_CODED_ROWS = 8  # in float32
# Of more, SwiGLU is a kernel of its own: both halves' sums of 64 rows take all registers of 4 warps.
MAX_GATED_CODED_ROWS = 32


def coded_tiling(m: int, n: int, k: int, step: int, shared_memory: int, *, gated: bool) -> Tiling:
    """For at most MAX_CODED_ROWS rows of x. step: columns of a run of words; shared_memory: in bytes."""
    tiles = -(-n // 64) * -(-m // 64)
    if m > MAX_WIDE_CODED_ROWS:
        # A stage of 64 rows of x and of the weight takes 40 KB.
        programs, stages = (168, 3) if shared_memory >= 125 << 10 else (264, 2)
    else:
        programs, stages = (400, 3) if gated else (500, 5)
    return Tiling(64, step, 4, stages, max(1, min(-(-programs // tiles), k // (2 * step))))


# `ops.gpu.coded_gemv` was timed with codes of 4 bits without zero points in groups of 128: it is in use for
# those, and for longer groups. With 8 bits it executes as much as `ops.gpu.coded_skinny` does, and spills.
MAX_EARLY_CODED_ROWS = 2
EARLY_CODED_GROUP = 128


def coded_gemv_tiling(m: int, runs: int, *, gated: bool) -> Tiling:
    """For one or two rows of x and so many runs of words in a row of codes; splits: parts of that row."""
    parts = min(8 // m, 1 << (runs.bit_length() - 1))
    if gated:
        return Tiling(16, 0, min(4, 2 * parts), 2, parts)
    return Tiling(16, 0, parts, 4 if m > 1 else 2 if runs <= 2 * parts else 1, parts)


# ---- experts in MXFP4 -----------------------------------------------------------------------------------

MAX_MXFP4_TOKENS = 2  # whose experts are multiplied without sorting: by `ops.gpu.mxfp4_experts`
MAX_MXFP4_CHOICES = 8  # of a token
MXFP4_ROWS = 128  # of several matrices and parts of their columns, 16 of each, that a program multiplies


def mxfp4_expert_tiling(steps: int, matrices: int) -> Tiling:
    """For 16 rows of so many matrices, whose columns fill `steps` runs of words; splits: parts of them."""
    parts = max(1, min(MXFP4_ROWS // (16 * matrices), steps & -steps))
    rows = 16 * matrices * parts
    return Tiling(rows, 256, 4 if rows <= 64 else 8, 4, parts)
