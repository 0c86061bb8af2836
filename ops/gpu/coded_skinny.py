"""Products of up to some 64 rows with codes of 4 or 8 bits (`ops.coded`), and the widening of these codes.

The codes are the left operand of a tensor core, whose tile has 64 rows or more, and x the right one, so that
few rows are not padded to many. Codes less their zero points are whole numbers below 256, which x's type has
exactly: a group's products are added up before its scale is applied, in float32. Sums over k may be split
among programs, as in `ops.gpu.skinny`.

At the bandwidth of an H200 a multiprocessor has 38 codes of 4 bits to unpack in a clock. So two words are
unpacked at once: a code becomes the low bits of a number of 16 bits whose exponent makes them ones (128 +
code in bfloat16, 1024 + code in float16), and one instruction subtracts the rest from two. That is 1.5
instructions a code. Method: Kim et al., 2022, "Who Says Elephants Can't Run", arXiv:2211.10017.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.coded import BLOCK, CodedTensor
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.skinny import finish_split
from microvllm.ops.gpu.tiling import Tiling

ROW_BLOCK = tl.constexpr(BLOCK)
MIN_ROWS, MOST_ROWS = 8, 64  # of the right operand's tile
MOST_BY_SUMS = tl.constexpr(16)  # rows of which zero points are multiplied with their sums
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _unpacking(ones: str) -> str:
    """Two words of eight codes -> pairs of `ones` + code of 16 bits, in the order of their places."""
    lines = ["{ .reg .b32 low, high;", "prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;"]
    for place in range(8):
        half = "low" if place < 4 else "high"
        if place % 4:
            lines.append(f"shr.u32 {half}, {half}, 4;")
        lines.append(f"lop3.b32 ${place}, {half}, 0x000f000f, {ones}, 0xea;")  # (half & mask) | ones
    return "\n".join([*lines, "}"])


OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")
UNPACK_BF16 = tl.constexpr(_unpacking("0x43004300"))
UNPACK_F16 = tl.constexpr(_unpacking("0x64006400"))


@triton.jit
def _place(words, place: tl.constexpr, BITS: tl.constexpr):
    """2 ** 23 + the codes at one place of the words, in float32."""
    # By bits: a conversion of integers has a fourth of an addition's rate.
    bits = (words >> (BITS * place) & ((1 << BITS) - 1)) | 0x4B000000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _unpacked(words, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """A tile for each place of the words, and what its numbers are larger than its codes."""
    if BITS == 8:
        above = 8388608.0
        tiles = (_place(words, 0, 8), _place(words, 1, 8), _place(words, 2, 8), _place(words, 3, 8))
    elif INTERPRETED or DTYPE == tl.float32:  # noqa: SIM300
        above = 8388608.0
        tiles = (
            _place(words, 0, 4), _place(words, 1, 4), _place(words, 2, 4), _place(words, 3, 4),
            _place(words, 4, 4), _place(words, 5, 4), _place(words, 6, 4), _place(words, 7, 4),
        )  # fmt: skip
    elif DTYPE == tl.bfloat16:  # noqa: SIM300
        above = 128.0
        tiles = tl.inline_asm_elementwise(
            UNPACK_BF16, OPERANDS, [words], is_pure=True, pack=2,
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                   tl.bfloat16),
        )  # fmt: skip
    else:
        above = 1024.0
        tiles = tl.inline_asm_elementwise(
            UNPACK_F16, OPERANDS, [words], is_pure=True, pack=2,
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
                   tl.float16),
        )  # fmt: skip
    return tiles, above


@triton.jit
def in_rows(words):
    """Words as loaded, [plane / 8, blocks, 128] -> rows: [blocks * 16, plane]; see `in_fragments`."""
    eighths: tl.constexpr = words.shape[0]
    blocks: tl.constexpr = words.shape[1]
    words = tl.permute(tl.reshape(words, [eighths, blocks, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
    return tl.reshape(words, [blocks * 16, eighths * 8])


@triton.jit
def rows_of_groups(
    at, row, k, ROWS, K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, THERE: tl.constexpr
):
    """What each of a step's groups has for these rows, at: [groups, ROWS]; a tuple, empty if not THERE."""
    found = ()
    last: tl.constexpr = (K + GROUP - 1) // GROUP - 1
    for i in tl.static_range(GROUPS if THERE else 0):
        group = tl.minimum(k // GROUP + i, last)
        found += (tl.load(at + group * ROWS + row),)
    return found


@triton.jit
def fetch_rows_of_groups(
    at, row, k, ROWS, K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, THERE: tl.constexpr
):
    """Request what `rows_of_groups` will find from memory, into the L2 cache."""
    last: tl.constexpr = (K + GROUP - 1) // GROUP - 1
    for i in tl.static_range(0 if INTERPRETED or not THERE else GROUPS):
        group = tl.minimum(k // GROUP + i, last)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at + group * ROWS + row],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _beside(a, b):
    """[n, k] and [n, k] -> [n, 2 * k]."""
    return tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def side_by_side(tiles, first: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tiles beside each other: 1, 2, 4 or 8."""
    if COUNT == 1:
        tile = tiles[first]
    else:
        half: tl.constexpr = COUNT // 2
        tile = _beside(side_by_side(tiles, first, half), side_by_side(tiles, first + half, half))
    return tile


@triton.jit
def multiply_codes(
    sums, words, right, scale, zero, BITS: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    ZEROS: tl.constexpr, OFFSETS: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """sums + a step's products, of SPAN places at a time.

    right: x of each; scale, zero: of each group; no scale if WHOLE.
    """
    tiles, above = _unpacked(words, BITS, DTYPE)
    each: tl.constexpr = 32 // BITS // GROUPS // SPAN  # products of a group
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    # To spread a group's zero points over the codes' threads takes a barrier each. What they add is their
    # product with the sums of x, which every row of a matrix of ones gives.
    BY_SUMS: tl.constexpr = OFFSETS or (ZEROS and not WHOLE and right[0].shape[1] <= MOST_BY_SUMS)
    # All before the first product, which the zero points of the later ones are not to wait for.
    lefts = ()
    for i in tl.static_range(32 // BITS // SPAN):
        left = side_by_side(tiles, i * SPAN, SPAN)
        if OFFSETS:
            left = left - above
        elif ZEROS and not BY_SUMS:
            left = left - (zero[i // each].to(tl.float32) + above).to(left.dtype)[:, None]
        else:
            left = left - (above + MIDDLE)
        lefts += (left.to(DTYPE),)
    for i in tl.static_range(32 // BITS // SPAN):
        left = lefts[i]
        if WHOLE:
            sums = tl.dot(left, right[i], sums, input_precision="ieee")
        elif i % each == 0:
            part = tl.dot(left, right[i], input_precision="ieee")
        else:
            part = tl.dot(left, right[i], part, input_precision="ieee")
        if BY_SUMS:
            ones = tl.full(left.shape, 1.0, DTYPE)
            if i % each == 0:
                added = tl.dot(ones, right[i], input_precision="ieee")
            else:
                added = tl.dot(ones, right[i], added, input_precision="ieee")
        if BY_SUMS and i % each == each - 1:
            moved = zero[i // each].to(tl.float32)[:, None]
            if OFFSETS:
                sums += added * moved
            else:
                part -= added * (moved - MIDDLE)
        if not WHOLE and i % each == each - 1:
            sums += part * scale[i // each].to(tl.float32)[:, None]
    return sums


@triton.jit(do_not_specialize=["M"])
def _coded_skinny_kernel(
    y, x, words, scales, zeros, bias, residual, parts, arrivals, M,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    WIDTH: tl.constexpr, OFFSETS: tl.constexpr, FETCH: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_M rows and BLOCK_N columns of y, SPLIT_K of the K terms of their sums.

    That is as many rows of the weight and, if GATED, of its second half.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PLACES: tl.constexpr = 32 // BITS
    STEP: tl.constexpr = PLACES * WIDTH
    WORDS: tl.constexpr = (K + STEP - 1) // STEP * WIDTH
    ZEROS: tl.constexpr = zeros is not None
    WHOLE: tl.constexpr = GROUP >= K and not OFFSETS
    GROUPS: tl.constexpr = 1 if GROUP >= STEP else STEP // GROUP  # of a step
    ROWS: tl.constexpr = 2 * N if GATED else N
    # Programs that read the same codes follow each other.
    tile_id, split = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_id * BLOCK_N + tl.arange(0, BLOCK_N)
    # Products of few rows wait for nothing, so that the tiles of x may be small; of more they take a group.
    SPAN: tl.constexpr = 1 if BLOCK_M <= 8 else PLACES // GROUPS
    column = tl.arange(0, SPAN * WIDTH)
    # Rows of the result that there are not are computed from others, which takes no masks.
    row = tl.minimum(n, N - 1)
    block = tl.minimum(
        tile_id * (BLOCK_N // ROW_BLOCK) + tl.arange(0, BLOCK_N // ROW_BLOCK), N // ROW_BLOCK - 1
    )
    # [WIDTH / 8, blocks, 128]: a warp's threads have 16 bytes each of a block, so many times.
    eighth = tl.arange(0, WIDTH // 8)[:, None, None] * 128 + tl.arange(0, 128)[None, None, :]
    word_at = words + block.to(tl.int64)[None, :, None] * (ROW_BLOCK * WORDS) + eighth
    first = split * SPLIT_K
    # Scales are loaded a step ahead, as tiles are, and zero points that are multiplied with sums of x. Not
    # those that are subtracted from codes: what a loop hands on keeps its layout, and codes would go to that
    # by way of shared memory, 16 KB that a second program of a multiprocessor has no room for.
    AHEAD: tl.constexpr = ZEROS and (OFFSETS or BLOCK_M <= MOST_BY_SUMS)
    FETCHED: tl.constexpr = FETCH and ZEROS and not AHEAD
    fetch_rows_of_groups(zeros, row, first, ROWS, K, GROUP, 2 * GROUPS, FETCHED)
    fetch_rows_of_groups(zeros, row + N, first, ROWS, K, GROUP, 2 * GROUPS, GATED and FETCHED)
    follow(PDL)
    x_at = x + tl.minimum(m, M - 1)[None, :] * K + column[:, None]
    there = (m < M)[None, :]
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_sums = sums
    scale = rows_of_groups(scales, row, first, ROWS, K, GROUP, GROUPS, not WHOLE)
    zero = rows_of_groups(zeros, row, first, ROWS, K, GROUP, GROUPS, AHEAD)
    up_scale = rows_of_groups(scales, row + N, first, ROWS, K, GROUP, GROUPS, GATED and not WHOLE)
    up_zero = rows_of_groups(zeros, row + N, first, ROWS, K, GROUP, GROUPS, GATED and AHEAD)
    for k in tl.range(first, tl.minimum(first + SPLIT_K, K), STEP, num_stages=STAGES):
        fetch_rows_of_groups(zeros, row, k + 2 * STEP, ROWS, K, GROUP, GROUPS, FETCHED)
        fetch_rows_of_groups(zeros, row + N, k + 2 * STEP, ROWS, K, GROUP, GROUPS, GATED and FETCHED)
        tile = in_rows(tl.load(word_at + k // STEP * (ROW_BLOCK * WIDTH)))
        if GATED:
            up_tile = in_rows(tl.load(word_at + N * WORDS + k // STEP * (ROW_BLOCK * WIDTH)))
        right = ()
        for i in tl.static_range(PLACES // SPAN):
            at = k + i * (SPAN * WIDTH)
            if K % STEP != 0:
                right += (tl.load(x_at + at, (at + column < K)[:, None] & there, 0.0),)
            elif BLOCK_M > 8:
                right += (tl.load(x_at + at, there, 0.0),)
            else:
                right += (tl.load(x_at + at),)
        next_scale = rows_of_groups(scales, row, k + STEP, ROWS, K, GROUP, GROUPS, not WHOLE)
        next_zero = rows_of_groups(zeros, row, k + STEP, ROWS, K, GROUP, GROUPS, AHEAD)
        now = zero if AHEAD else rows_of_groups(zeros, row, k, ROWS, K, GROUP, GROUPS, ZEROS)
        sums = multiply_codes(sums, tile, right, scale, now, BITS, GROUPS, SPAN, ZEROS, OFFSETS, WHOLE, DTYPE)
        scale = next_scale
        zero = next_zero
        if GATED:
            next_scale = rows_of_groups(scales, row + N, k + STEP, ROWS, K, GROUP, GROUPS, not WHOLE)
            next_zero = rows_of_groups(zeros, row + N, k + STEP, ROWS, K, GROUP, GROUPS, AHEAD)
            now = up_zero if AHEAD else rows_of_groups(zeros, row + N, k, ROWS, K, GROUP, GROUPS, ZEROS)
            up_sums = multiply_codes(
                up_sums, up_tile, right, up_scale, now, BITS, GROUPS, SPAN, ZEROS, OFFSETS, WHOLE, DTYPE
            )
            up_scale = next_scale
            up_zero = next_zero
    if WHOLE:
        sums *= tl.load(scales + row).to(tl.float32)[:, None]
        if GATED:
            up_sums *= tl.load(scales + N + row).to(tl.float32)[:, None]
    sums = tl.trans(sums)
    up_sums = tl.trans(up_sums)
    place, places = tile_id * tl.num_programs(0) + tl.program_id(0), tl.num_programs(0) * tl.num_programs(1)
    finish_split(
        y, sums, up_sums, m, n, bias, residual, parts, arrivals, place, places, split, M, N,
        BLOCK_M, BLOCK_N, SPLITS, GATED
    )  # fmt: skip


def coded_skinny(
    x: Tensor,
    weight: CodedTensor,
    arrivals: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tiling: Tiling,
    *,
    gated: bool,
    pdl: bool = False,
    fetch: bool = False,
) -> Tensor:
    """act(x @ weight.T + bias) + residual: [m, n]; the arguments are `skinny.skinny_linear`'s.

    x has the columns of the codes. block_k of the tiling is not used: a step is a run of words. fetch: zero
    points that are loaded in the step that uses them are requested two steps ahead, into the L2 cache.
    """
    m, k = x.shape
    n, step = weight.shape[0] // (2 if gated else 1), weight.step
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_m = min(MOST_ROWS, max(MIN_ROWS, triton.next_power_of_2(m)))
    tiles_m, tiles = triton.cdiv(m, block_m), triton.cdiv(n, tiling.block_n)
    split_k = triton.cdiv(triton.cdiv(k, step), tiling.splits) * step
    if tiles_m * tiles > len(arrivals):
        split_k = triton.cdiv(k, step) * step
    splits = triton.cdiv(k, split_k)
    parts = None
    if splits > 1:
        shape = (splits, tiles_m * tiles, 2 if gated else 1, block_m, tiling.block_n)
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    _coded_skinny_kernel[(tiles_m, tiles, splits)](
        y, x, weight.as_subclass(Tensor), weight.scales, weight.zeros, bias, residual, parts, arrivals, m,
        N=n, K=k, BITS=weight.bits, GROUP=weight.group, BLOCK_M=block_m, BLOCK_N=tiling.block_n,
        SPLIT_K=split_k, SPLITS=splits, STAGES=tiling.stages, WIDTH=weight.plane, OFFSETS=weight.has_offsets,
        FETCH=fetch, GATED=gated, num_warps=tiling.warps, maxnreg=tiling.max_registers, **launch_options(pdl),
    )  # fmt: skip
    return y


@triton.jit
def _widen_kernel(
    out, words, scales, zeros, ROWS,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    OFFSETS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N rows of the matrix, the columns of a run of words."""
    follow(PDL)
    PLACES: tl.constexpr = 32 // BITS
    STEP: tl.constexpr = PLACES * WIDTH
    WORDS: tl.constexpr = (K + STEP - 1) // STEP * WIDTH
    LAST: tl.constexpr = (K + GROUP - 1) // GROUP - 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    here = (n < ROWS)[:, None]
    at = n.to(tl.int64)[:, None]
    # The place of row and word in the block: see `ops.coded.in_fragments`.
    of_row = n % 8 * 16 + n % ROW_BLOCK // 8 * 2
    of_word = column // 8 * 128 + column % 8 // 2 * 4 + column % 2
    block = (n // ROW_BLOCK).to(tl.int64) * (ROW_BLOCK * WORDS) + step * (ROW_BLOCK * WIDTH)
    tile = tl.load(words + (block + of_row)[:, None] + of_word[None, :], here, 0)
    for i in tl.static_range(PLACES):
        k = step * STEP + i * WIDTH
        group = tl.minimum(k // GROUP, LAST)
        values = _place(tile, i, BITS)
        if OFFSETS:
            values -= 8388608.0
        elif zeros is not None:
            zero = tl.load(zeros + group * ROWS + n, n < ROWS, 0).to(tl.float32)
            values -= (zero + 8388608.0)[:, None]
        else:
            values -= 8388608.0 + (1 << (BITS - 1))
        values *= tl.load(scales + group * ROWS + n, n < ROWS, 0.0).to(tl.float32)[:, None]
        if OFFSETS:
            values += tl.load(zeros + group * ROWS + n, n < ROWS, 0.0).to(tl.float32)[:, None]
        tl.store(out + at * K + k + column[None, :], values, here & (k + column < K)[None, :])


def widened(weight: CodedTensor, out: Tensor, *, pdl: bool = False) -> Tensor:
    """Write the values of the codes to out: [rows, columns], contiguous, each rounded once -> out."""
    rows = weight.shape[0]
    _widen_kernel[(triton.cdiv(rows, 32), triton.cdiv(weight.columns, weight.step))](
        out, weight.as_subclass(Tensor), weight.scales, weight.zeros, rows, K=weight.columns,
        BITS=weight.bits, GROUP=weight.group, BLOCK_N=32, WIDTH=weight.plane, OFFSETS=weight.has_offsets,
        num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return out
