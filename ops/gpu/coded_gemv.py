"""Products of one or two rows with codes of 4 or 8 bits (`ops.coded`), which go straight into registers.

A row of x reads 120 MB of codes and scales of a layer of Qwen2-7B, 26 us at an H200's 4.594 TB/s, in four
kernels that begin and end in a few microseconds each. So a program requests its first codes before it waits
for the kernel ahead, and has all of a sum: no part goes through memory to another program. Codes lie in the
order of the tensor core's left operand, so that a thread loads them as it multiplies them.

That operand has 16 rows at least, the right one 8 columns: those are the row of x cut into PARTS along k. A
program takes 16 rows of the weight, each part by warps of its own; of the products of all parts with all
columns it keeps those of a part with its column. Unpacked as in `ops.gpu.coded_skinny` a code of 4 bits takes
1.5 instructions, and 2.8 to 3.3 with all else (`scripts/gpu/count_instructions.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.coded import BLOCK, CodedTensor
from microvllm.ops.gpu.coded_skinny import ROW_BLOCK, multiply_codes, rows_of_groups
from microvllm.ops.gpu.gemv import finish_row
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.tiling import Tiling

MIN_COLUMNS = 8  # of the right operand's tile


@triton.jit
def _in_rows(words):
    """Words as loaded, [blocks, plane / 8, 128] -> rows: [blocks * 16, plane]; see `in_fragments`."""
    blocks: tl.constexpr = words.shape[0]
    eighths: tl.constexpr = words.shape[1]
    words = tl.permute(tl.reshape(words, [blocks, eighths, 8, 4, 2, 2]), [0, 4, 2, 1, 3, 5])
    return tl.reshape(words, [blocks * 16, eighths * 8])


@triton.jit
def _coded_gemv_kernel(
    y, x, words, scales, zeros, bias, residual,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, OFFSETS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCKS * ROW_BLOCK columns of y: as many rows of the weight and, if GATED, of its second half.

    A row's words are PARTS times STEPS runs, perhaps fewer; AHEAD of each part are loaded ahead.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PLACES: tl.constexpr = 32 // BITS
    STEP: tl.constexpr = PLACES * WIDTH
    RUNS: tl.constexpr = (K + STEP - 1) // STEP
    RUN: tl.constexpr = ROW_BLOCK * WIDTH  # words of a block's run
    EXACT: tl.constexpr = PARTS * STEPS * STEP == K
    ZEROS: tl.constexpr = zeros is not None
    WHOLE: tl.constexpr = GROUP >= K and not OFFSETS
    GROUPS: tl.constexpr = 1 if GROUP >= STEP else STEP // GROUP  # of a step
    HALVES: tl.constexpr = 2 if GATED else 1
    ROWS: tl.constexpr = HALVES * N
    OWN: tl.constexpr = BLOCKS * ROW_BLOCK
    TERMS: tl.constexpr = STEPS * STEP  # of a part
    tile = tl.program_id(0)
    # Of each part: rows of the weight, then those of its second half. Those that there are not are others.
    r = tl.arange(0, PARTS * HALVES * OWN)
    row = tl.minimum(tile * OWN + r % OWN, N - 1) + r // OWN % HALVES * N
    r_part = r // (HALVES * OWN)
    b = tl.arange(0, PARTS * HALVES * BLOCKS)
    block = tl.minimum(tile * BLOCKS + b % BLOCKS, N // ROW_BLOCK - 1) + b // BLOCKS % HALVES * (
        N // ROW_BLOCK
    )
    first_run = b // (HALVES * BLOCKS) * STEPS
    # [blocks, WIDTH / 8, 128]: a warp's threads have 16 bytes each of a block, so many times.
    at = (block.to(tl.int64) * RUNS + first_run)[:, None, None] * RUN
    at += tl.arange(0, WIDTH // 8)[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    word_at = words + at
    tiles = ()
    for place in tl.static_range(AHEAD):
        tiles += (tl.load(word_at + place * RUN, (first_run + place < RUNS)[:, None, None], 0),)
    first_term = r_part * TERMS
    scale = rows_of_groups(scales, row, first_term, ROWS, K, GROUP, GROUPS, not WHOLE)
    zero = rows_of_groups(zeros, row, first_term, ROWS, K, GROUP, GROUPS, ZEROS)
    follow(PDL)
    c = tl.arange(0, COLUMNS)
    c_part = tl.minimum(c // M, PARTS - 1)
    term = c_part[None, :] * TERMS + tl.arange(0, WIDTH)[:, None]
    x_at = x + (c % M * K)[None, :] + term
    sums = tl.zeros([PARTS * HALVES * OWN, COLUMNS], tl.float32)
    for first in tl.range(0, STEPS, AHEAD):
        fresh = ()
        for place in tl.static_range(AHEAD):
            step = first + place
            tile_words = _in_rows(tiles[place])
            inside = (step + AHEAD < STEPS) & (first_run + step + AHEAD < RUNS)
            fresh += (tl.load(word_at + (step + AHEAD) * RUN, inside[:, None, None], 0),)
            right = ()
            for i in tl.static_range(PLACES):
                k = step * STEP + i * WIDTH
                if EXACT:
                    right += (tl.load(x_at + k),)
                else:
                    right += (tl.load(x_at + k, k + term < K, 0.0),)
            k = first_term + (step + 1) * STEP
            next_scale = rows_of_groups(scales, row, k, ROWS, K, GROUP, GROUPS, not WHOLE)
            next_zero = rows_of_groups(zeros, row, k, ROWS, K, GROUP, GROUPS, ZEROS)
            sums = multiply_codes(
                sums, tile_words, right, scale, zero, BITS, GROUPS, 1, ZEROS, OFFSETS, WHOLE, DTYPE
            )
            scale = next_scale
            zero = next_zero
        tiles = fresh
    if WHOLE:
        sums *= tl.load(scales + row).to(tl.float32)[:, None]
    n = tile * OWN + tl.arange(0, OWN)
    for m in tl.static_range(M):
        own = (r_part * M + m)[:, None] == c[None, :]
        each = tl.sum(tl.where(own, sums, 0.0), 1)
        both = tl.sum(tl.reshape(each, [PARTS, HALVES, OWN]), 0)
        if GATED:
            value, up = tl.split(tl.trans(both))
        else:
            value = tl.reshape(both, [OWN])
            up = value
        finish_row(y, value, up, m, n, bias, residual, N, GATED)


def coded_gemv(
    x: Tensor,
    weight: CodedTensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tiling: Tiling,
    *,
    gated: bool,
    pdl: bool = False,
) -> Tensor:
    """act(x @ weight.T + bias) + residual: [m, n]; the arguments are `skinny.skinny_linear`'s.

    m is 1 or 2; x has the columns of the codes. Of the tiling, `splits` are the parts of a row, a power of
    two, and `stages` the runs of words of each that are loaded ahead.
    """
    (m, k), n = x.shape, weight.shape[0] // (2 if gated else 1)
    steps = triton.cdiv(triton.cdiv(k, weight.step), tiling.splits)
    ahead = min(tiling.stages, steps)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _coded_gemv_kernel[(triton.cdiv(n, tiling.block_n),)](
        y, x, weight.as_subclass(Tensor), weight.scales, weight.zeros, bias, residual, M=m, N=n, K=k,
        BITS=weight.bits, GROUP=weight.group, BLOCKS=tiling.block_n // BLOCK, PARTS=tiling.splits,
        STEPS=triton.cdiv(steps, ahead) * ahead, AHEAD=ahead, COLUMNS=max(MIN_COLUMNS, m * tiling.splits),
        WIDTH=weight.plane, OFFSETS=weight.has_offsets, GATED=gated, num_warps=tiling.warps,
        maxnreg=tiling.max_registers, **launch_options(pdl),
    )  # fmt: skip
    return y
