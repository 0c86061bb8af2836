"""Products of rows with their expert's matrix in MXFP4 (`ops.mxfp4.Mxfp4Tensor`), widened in registers.

As in `ops.gpu.grouped` a tile of rows is of one expert. The codes are the tensor core's left operand, whose
tile has 64 rows, and lie in the order of `ops.gpu.coded_skinny`. A place of the words is 32 columns, which
share a scale.

The three bits of a code's size are moved to where a bfloat16 has the end of its exponent and the beginning of
its fraction: this is the number times 2 ** -126, as both kinds of numbers have subnormal ones. The scale's
byte becomes an exponent likewise, and makes up for that: some 2 instructions for two codes, a product for
each. All of it is exact.

gpt-oss-20b has 24 layers of 32 experts, of which a token takes 4. These are 4 * 3 * 2880 * 2880 weights a
layer, of 4.25 bits: 1.27 GB. With attention's 1.27 GB and the head's 1.16 GB, both in 16 bits, a step of one
token reads 3.71 GB: 0.81 ms at the 4.594 TB/s of an H200. A row's words fill 12 runs of 256 columns, not
11.25: 0.08 GB more. Once all experts are chosen they are 10.15 GB, and a step takes 2.74 ms at least.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.coded import PLANE
from microvllm.ops.gpu.coded_skinny import INTERPRETED, OPERANDS, ROW_BLOCK, in_rows, side_by_side
from microvllm.ops.gpu.grouped import GroupedTiling, finish_tile, tile_of_program
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.routing import SortedChoices
from microvllm.ops.mxfp4 import Mxfp4Tensor


def _unpacking() -> str:
    """Two words of eight codes -> pairs of bfloat16, times 2 ** -126, in the order of their places."""
    lines = ["{ .reg .b32 low, high, size, sign;"]
    lines += ["prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;"]
    for place in range(8):
        half, at = "low" if place < 4 else "high", 4 * (place % 4)
        # Bits 0 to 2 go to 6 to 8, bit 3 goes to 15.
        for name, to, mask in (("size", 6, "0x01c001c0"), ("sign", 12, "0x80008000")):
            move = f"shl.b32 {name}, {half}, {to - at};" if to > at else f"shr.b32 {name}, {half}, {at - to};"
            lines += [move, f"and.b32 {name}, {name}, {mask};"]
        lines.append(f"or.b32 ${place}, size, sign;")
    return "\n".join([*lines, "}"])


UNPACK = tl.constexpr(_unpacking())
WIDTH = tl.constexpr(PLANE)


@triton.jit
def _place(words, place: tl.constexpr):
    """The numbers at one place of the words, times 2 ** -126, in float32."""
    code = words >> (4 * place)
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def unpacked(words, DTYPE: tl.constexpr):
    """A tile for each place of the words: in bfloat16, or else in float32."""
    if INTERPRETED or DTYPE != tl.bfloat16:  # noqa: SIM300
        tiles = (
            _place(words, 0), _place(words, 1), _place(words, 2), _place(words, 3),
            _place(words, 4), _place(words, 5), _place(words, 6), _place(words, 7),
        )  # fmt: skip
    else:
        tiles = tl.inline_asm_elementwise(
            UNPACK, OPERANDS, [words], is_pure=True, pack=2,
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                   tl.bfloat16),
        )  # fmt: skip
    return tiles


@triton.jit
def scales_in_rows(words):
    """A run's scales as loaded, [blocks, 32] int32 -> [blocks * 16] of 4 places each, twice.

    To each byte 126 is added, which makes an exponent of it: see `factor_of`.
    """
    blocks: tl.constexpr = words.shape[0]
    words = tl.permute(tl.reshape(words + 0x7E7E7E7E, [blocks, 8, 2, 2]), [0, 2, 1, 3])
    return tl.split(tl.reshape(words, [blocks * 16, 2]))


@triton.jit
def factor_of(scales, place: tl.constexpr, DTYPE: tl.constexpr):
    """Of a place: 2 ** 126 times what the scale stands for, in the type of `unpacked`."""
    exponent = scales[place // 4] >> (8 * (place % 4)) & 255
    if INTERPRETED or DTYPE != tl.bfloat16:  # noqa: SIM300
        factor = (exponent << 23).to(tl.float32, bitcast=True)
    else:
        factor = (exponent << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return factor


@triton.jit
def multiply_mxfp4(sums, codes, scales, right, SPAN: tl.constexpr, DTYPE: tl.constexpr):
    """sums + the products of a run: codes [rows, words]; right: x at each SPAN places, [SPAN * words, n]."""
    tiles, factors = unpacked(codes, DTYPE), scales_in_rows(scales)
    scaled = ()
    for i in tl.static_range(8):
        scaled += ((tiles[i] * factor_of(factors, i, DTYPE)[:, None]).to(DTYPE),)
    for i in tl.static_range(8 // SPAN):
        left = side_by_side(scaled, i * SPAN, SPAN)
        sums = tl.dot(left, right[i], sums, input_precision="ieee")
    return sums


@triton.jit
def _mxfp4_kernel(
    y, x, words, code_scales, bias, scales, order, experts, starts, stops, NUM_TILES,
    N: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a tile of choices by BLOCK_N columns, as in `ops.gpu.grouped`."""
    follow(PDL)
    DTYPE: tl.constexpr = x.dtype.element_ty
    PLACES: tl.constexpr = 8  # codes of a word
    STEP: tl.constexpr = PLACES * WIDTH
    RUNS: tl.constexpr = (K + STEP - 1) // STEP
    WORDS: tl.constexpr = RUNS * WIDTH
    tile, block_n = tile_of_program(NUM_TILES, (N + BLOCK_N - 1) // BLOCK_N)
    start, stop = tl.load(starts + tile), tl.load(stops + tile)
    if start < stop:
        expert = tl.load(experts + tile)
        place = start + tl.arange(0, BLOCK_M)
        rows = place < stop
        choice = tl.load(order + place, rows, 0)
        first_n = block_n * BLOCK_N
        n = first_n + tl.arange(0, BLOCK_N)
        matrix = expert * (2 * N if GATED else N)  # its first row
        # Rows of the result that there are not are computed from others, which takes no masks.
        block = (
            tl.minimum(first_n // ROW_BLOCK + tl.arange(0, BLOCK_N // ROW_BLOCK), N // ROW_BLOCK - 1)
            + matrix // ROW_BLOCK
        )
        # [WIDTH / 8, blocks, 128]: a warp's threads have 16 bytes each of a block, so many times.
        eighth = tl.arange(0, WIDTH // 8)[:, None, None] * 128 + tl.arange(0, 128)[None, None, :]
        word_at = words + block.to(tl.int64)[None, :, None] * (ROW_BLOCK * WORDS) + eighth
        scale_at = code_scales + block.to(tl.int64)[:, None] * (RUNS * 32) + tl.arange(0, 32)[None, :]
        column = tl.arange(0, WIDTH)
        x_row = tl.where(rows, place if scales is not None else choice // CHOICES, 0)
        x_at = x + x_row.to(tl.int64)[None, :] * K + column[:, None]
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up_sums = sums
        for k in tl.range(0, K, STEP, num_stages=STAGES):
            right = ()
            for i in tl.static_range(PLACES):
                at = k + i * WIDTH
                if K % STEP == 0:
                    right += (tl.load(x_at + at, rows[None, :], 0.0),)
                else:
                    right += (tl.load(x_at + at, (at + column < K)[:, None] & rows[None, :], 0.0),)
            step_at = word_at + k // STEP * (ROW_BLOCK * WIDTH)
            run_at = scale_at + k // STEP * 32
            sums = multiply_mxfp4(sums, in_rows(tl.load(step_at)), tl.load(run_at), right, 1, DTYPE)
            if GATED:
                codes = in_rows(tl.load(step_at + N * WORDS))
                scales_of_up = tl.load(run_at + N // ROW_BLOCK * (RUNS * 32))
                up_sums = multiply_mxfp4(up_sums, codes, scales_of_up, right, 1, DTYPE)
        sums, up_sums = tl.trans(sums), tl.trans(up_sums)
        finish_tile(y, sums, up_sums, bias, scales, place, choice, rows, matrix, n, N, GATED, CLAMPED)


class Mxfp4Weight:
    """As `grouped.GroupedWeight`, whose arguments these are, of a weight in MXFP4."""

    def __init__(
        self,
        weight: Mxfp4Tensor,
        columns: int,
        bias: Tensor | None = None,
        *,
        gated: bool = False,
        clamped: bool = False,
    ) -> None:
        self.matrix = weight
        self.step: int | None = None
        self.max_rows = 64
        self._columns, self._bias = columns, bias
        self._gated, self._clamped = gated, clamped

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
        """See `grouped.GroupedWeight`."""
        count, weight = choices.order.shape[0], self.matrix
        y = torch.empty(count, self._columns, dtype=x.dtype, device=x.device)
        tiles = choices.experts.shape[0]
        _mxfp4_kernel[(tiles * triton.cdiv(self._columns, tiling.columns),)](
            y, x, weight.as_subclass(Tensor), weight.scales.view(torch.int32), self._bias, scales, *choices,
            tiles, N=self._columns, K=weight.columns, CHOICES=num_chosen, BLOCK_M=tiling.rows,
            BLOCK_N=tiling.columns, STAGES=tiling.stages, GATED=self._gated, CLAMPED=self._clamped,
            num_warps=tiling.warps, **launch_options(pdl),
        )  # fmt: skip
        return y
