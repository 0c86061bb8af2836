"""As `ops.gpu.grouped`, of experts in codes of 4 or 8 bits, unpacked as in `ops.gpu.coded_skinny`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.coded import CodedTensor
from microvllm.ops.gpu.coded_skinny import ROW_BLOCK, in_rows, multiply_codes, rows_of_groups
from microvllm.ops.gpu.grouped import GroupedTiling, finish_tile, tile_of_program
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.routing import SortedChoices

COLUMNS, WARPS = 64, 8  # with 4 warps sums of gated products would not fit their registers
STAGES = {
    16: 3,
    32: 3,
    64: 2,
}  # by the rows of a tile; more do not fit the 99 KB of compute capability 8.6
WIDE_STAGES = 2  # of float32


@triton.jit
def _coded_grouped_kernel(
    y, x, words, code_scales, zeros, bias, scales, order, experts, starts, stops, NUM_TILES,
    ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    WIDTH: tl.constexpr, OFFSETS: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a tile of choices by BLOCK_N columns, as `ops.gpu.grouped` has them.

    ROWS: of the matrices of all experts, which lie below each other.
    """
    follow(PDL)
    DTYPE: tl.constexpr = x.dtype.element_ty
    PLACES: tl.constexpr = 32 // BITS
    STEP: tl.constexpr = PLACES * WIDTH
    WORDS: tl.constexpr = (K + STEP - 1) // STEP * WIDTH
    ZEROS: tl.constexpr = zeros is not None
    WHOLE: tl.constexpr = GROUP >= K and not OFFSETS
    GROUPS: tl.constexpr = 1 if GROUP >= STEP else STEP // GROUP  # of a step
    SPAN: tl.constexpr = PLACES // GROUPS
    tile, block_n = tile_of_program(NUM_TILES, (N + BLOCK_N - 1) // BLOCK_N)
    start, stop = tl.load(starts + tile), tl.load(stops + tile)
    if start < stop:
        expert = tl.load(experts + tile)
        place = start + tl.arange(0, BLOCK_M)
        here = place < stop
        # Columns of the result that there are not are computed from others, which takes no masks.
        inside = tl.minimum(place, stop - 1)
        choice = tl.load(order + inside)
        first_n = block_n * BLOCK_N
        n = first_n + tl.arange(0, BLOCK_N)
        matrix = expert * (2 * N if GATED else N)  # its first row
        row = matrix + tl.minimum(n, N - 1)
        block = first_n // ROW_BLOCK + tl.arange(0, BLOCK_N // ROW_BLOCK)
        block = matrix // ROW_BLOCK + tl.minimum(block, N // ROW_BLOCK - 1)
        eighth = tl.arange(0, WIDTH // 8)[:, None, None] * 128 + tl.arange(0, 128)[None, None, :]
        word_at = words + block.to(tl.int64)[None, :, None] * (ROW_BLOCK * WORDS) + eighth
        column = tl.arange(0, SPAN * WIDTH)
        x_row = inside if scales is not None else choice // CHOICES
        x_at = x + x_row.to(tl.int64)[None, :] * K + column[:, None]
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        up_sums = sums
        for k in tl.range(0, K, STEP, num_stages=STAGES):
            tile_words = in_rows(tl.load(word_at + k // STEP * (ROW_BLOCK * WIDTH)))
            right = ()
            for i in tl.static_range(PLACES // SPAN):
                at = k + i * (SPAN * WIDTH)
                if K % STEP == 0:
                    right += (tl.load(x_at + at, here[None, :], 0.0),)
                else:
                    right += (tl.load(x_at + at, (at + column < K)[:, None] & here[None, :], 0.0),)
            scale = rows_of_groups(code_scales, row, k, ROWS, K, GROUP, GROUPS, not WHOLE)
            zero = rows_of_groups(zeros, row, k, ROWS, K, GROUP, GROUPS, ZEROS)
            sums = multiply_codes(
                sums, tile_words, right, scale, zero, BITS, GROUPS, SPAN, ZEROS, OFFSETS, WHOLE, DTYPE
            )
            if GATED:
                tile_words = in_rows(tl.load(word_at + N * WORDS + k // STEP * (ROW_BLOCK * WIDTH)))
                scale = rows_of_groups(code_scales, row + N, k, ROWS, K, GROUP, GROUPS, not WHOLE)
                zero = rows_of_groups(zeros, row + N, k, ROWS, K, GROUP, GROUPS, ZEROS)
                up_sums = multiply_codes(
                    up_sums, tile_words, right, scale, zero, BITS, GROUPS, SPAN, ZEROS, OFFSETS, WHOLE, DTYPE
                )
        if WHOLE:
            sums *= tl.load(code_scales + row).to(tl.float32)[:, None]
            if GATED:
                up_sums *= tl.load(code_scales + N + row).to(tl.float32)[:, None]
        sums, up_sums = tl.trans(sums), tl.trans(up_sums)
        finish_tile(y, sums, up_sums, bias, scales, place, choice, here, matrix, n, N, GATED, CLAMPED)


class CodedGroupedWeight:
    """As `grouped.GroupedWeight`; of a tiling only the number of rows is used."""

    step: int | None = None

    def __init__(
        self,
        weight: CodedTensor,
        columns: int,
        bias: Tensor | None = None,
        *,
        gated: bool = False,
        clamped: bool = False,
    ) -> None:
        self.matrix, self._bias = weight, bias
        # The offsets of 4 bits' groups would not fit the registers beside more sums.
        self.max_rows = 32 if gated and weight.has_offsets and weight.bits == 4 else 64
        self._columns, self._gated, self._clamped = columns, gated, clamped

    def __call__(
        self,
        x: Tensor,
        choices: SortedChoices,
        num_chosen: int,
        tiling: GroupedTiling,
        *,
        scales: Tensor | None = None,
        pdl: bool = False,
    ) -> Tensor:
        """Each choice's row times its expert's matrix; the arguments are `GroupedWeight`'s."""
        weight, count = self.matrix, choices.order.shape[0]
        y = torch.empty(count, self._columns, dtype=x.dtype, device=x.device)
        tiles = choices.experts.shape[0]
        _coded_grouped_kernel[(tiles * triton.cdiv(self._columns, COLUMNS),)](
            y, x, weight.as_subclass(Tensor), weight.scales, weight.zeros, self._bias, scales, *choices,
            tiles, ROWS=weight.shape[0], N=self._columns, K=weight.columns, CHOICES=num_chosen,
            BITS=weight.bits, GROUP=weight.group, BLOCK_M=tiling.rows, BLOCK_N=COLUMNS,
            STAGES=WIDE_STAGES if x.dtype.itemsize == 4 else STAGES[tiling.rows], WIDTH=weight.plane,
            OFFSETS=weight.has_offsets, GATED=self._gated, CLAMPED=self._clamped, num_warps=WARPS,
            **launch_options(pdl),
        )  # fmt: skip
        return y
