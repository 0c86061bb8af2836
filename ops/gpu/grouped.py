"""Products of rows with a matrix of their own expert each: a tile of rows is of one expert.

`SortedChoices` lists the tiles. Their number is an upper bound that depends on the number of rows alone, and
programs of tiles without rows end at once, so that a captured step can choose any experts. With few rows an
expert the weights' bytes are what takes the time: those of each chosen expert are read once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from microvllm.ops.gpu.activation import gated_unit
from microvllm.ops.gpu.coded_expert_gemv import step_of
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.routing import SortedChoices
from microvllm.ops.scaled import ScaledTensor

# Tiles that follow each other for each block of columns: those of one expert share its weights.
TILES_TOGETHER = tl.constexpr(8)
MIN_BLOCK_K = 16  # terms of a tensor core's step
SUM_BLOCK = 1024  # elements of a row that one program adds up


@dataclass(frozen=True, slots=True)
class GroupedTiling:
    """A program takes `rows` choices of an expert by `columns` of the result, `block_k` terms at a time.

    stages: how many such tiles are in flight. swapped: the weight is the tensor core's left operand, whose
    tile has 64 rows at least, so that few choices are not padded to many. boxes: its tiles are loaded by TMA.
    """

    rows: int
    columns: int
    block_k: int
    warps: int
    stages: int
    swapped: bool = False
    boxes: bool = False

    def within(self, shared_memory: int, x_bytes: int, weight_bytes: int) -> GroupedTiling:
        """The same with as many stages, but at least two, as so many bytes hold of a gated product's tiles.

        x_bytes, weight_bytes: of one number.
        """
        step = (2 * self.columns * weight_bytes + self.rows * x_bytes) * self.block_k
        return replace(self, stages=max(2, min(self.stages, shared_memory // step)))


@triton.jit
def tile_of_program(NUM_TILES, BLOCKS_N: tl.constexpr):
    """The tile of choices and the block of columns of a program: see `TILES_TOGETHER`."""
    program = tl.program_id(0)
    group = program // (TILES_TOGETHER * BLOCKS_N)
    together = tl.minimum(TILES_TOGETHER, NUM_TILES - group * TILES_TOGETHER)
    inside_group = program - group * TILES_TOGETHER * BLOCKS_N
    return group * TILES_TOGETHER + inside_group % together, inside_group // together


@triton.jit
def finish_tile(
    y, sums, up_sums, bias, scales, place, choice, rows, matrix, n,
    N: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr
):  # fmt: skip
    """Store a tile's sums, of the choices that `rows` says; matrix: the first row of the expert's matrix."""
    if bias is not None:
        sums += tl.load(bias + matrix + n, n < N, 0.0).to(tl.float32)[None, :]
        if GATED:
            up_sums += tl.load(bias + matrix + N + n, n < N, 0.0).to(tl.float32)[None, :]
    if GATED:
        sums = gated_unit(sums, up_sums, CLAMPED)
    y_row = place
    if scales is not None:
        sums *= tl.load(scales + choice, rows, 0.0)[:, None]
        y_row = choice
    y_at = y + y_row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_at, sums, rows[:, None] & (n < N)[None, :])


@triton.jit
def _multiply(x, w, sums, SWAPPED: tl.constexpr):
    """sums + x @ w.T, or its transpose."""
    if SWAPPED:
        sums = tl.dot(w, tl.trans(x), sums, input_precision="ieee")
    else:
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    return sums


@triton.jit
def _multiply_codes(x, codes, sums, scale, SWAPPED: tl.constexpr):
    """The same of codes in e4m3; scale: of each of their rows, for these terms."""
    # By way of float32: the direct conversion to bfloat16 is an instruction of a fourth of the rate.
    w = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(x.dtype)
    # Scaled step by step, even by one scale for all: ptxas runs products one by one that go on from the sums
    # while codes are widened (C7513).
    part = _multiply(x, w, tl.zeros(sums.shape, tl.float32), SWAPPED)
    if SWAPPED:
        sums += part * scale[:, None]
    else:
        sums += part * scale[None, :]
    return sums


@triton.jit
def _grouped_kernel(
    y, x, weight, code_scales, bias, scales, order, experts, starts, stops, NUM_TILES,
    N: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, SWAPPED: tl.constexpr,
    BOXES: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, CLAMPED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program: a tile of choices by BLOCK_N columns; weight: a pointer, or the descriptor of its BOXES.

    With SCALE_N > 0 the weight is of codes in e4m3, of which SCALE_N rows and SCALE_K columns share a scale.

    Without scales, x has a row for each token, and y one for each choice in their sorted order. With scales,
    x has a row for each choice in sorted order, and y one for each choice, times its scale.
    """
    follow(PDL)
    tile, block_n = tile_of_program(NUM_TILES, (N + BLOCK_N - 1) // BLOCK_N)
    start, stop = tl.load(starts + tile), tl.load(stops + tile)
    if start < stop:
        expert = tl.load(experts + tile)
        place = start + tl.arange(0, BLOCK_M)
        rows = place < stop
        choice = tl.load(order + place, rows, 0)
        first_n = block_n * BLOCK_N
        n = first_n + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        columns = (n < N)[:, None]
        x_row = place if scales is not None else choice // CHOICES
        x_at = x + x_row.to(tl.int64)[:, None] * K + k[None, :]
        matrix = expert * (2 * N if GATED else N)  # its first row
        if not BOXES:
            weight_at = weight + matrix.to(tl.int64) * K + n[:, None] * K + k[None, :]
        if SWAPPED:
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_sums = sums
        if SCALE_N > 0:
            across: tl.constexpr = (K + SCALE_K - 1) // SCALE_K
            scale_at = code_scales + (matrix + n) // SCALE_N * across
            up_scale_at = code_scales + (matrix + N + n) // SCALE_N * across
        for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            terms = (first + k < K)[None, :]
            x_tile = tl.load(x_at + first, rows[:, None] & terms, 0.0)
            if BOXES:
                w_tile = weight.load([matrix + first_n, first])
            else:
                w_tile = tl.load(weight_at + first, columns & terms, 0)
            if SCALE_N > 0:
                scale = tl.load(scale_at + first // SCALE_K, n < N, 0.0)
                sums = _multiply_codes(x_tile, w_tile, sums, scale, SWAPPED)
            else:
                sums = _multiply(x_tile, w_tile, sums, SWAPPED)
            if GATED:
                if BOXES:
                    w_tile = weight.load([matrix + N + first_n, first])
                else:
                    w_tile = tl.load(weight_at + (N * K + first), columns & terms, 0)
                if SCALE_N > 0:
                    scale = tl.load(up_scale_at + first // SCALE_K, n < N, 0.0)
                    up_sums = _multiply_codes(x_tile, w_tile, up_sums, scale, SWAPPED)
                else:
                    up_sums = _multiply(x_tile, w_tile, up_sums, SWAPPED)
        if SWAPPED:
            sums, up_sums = tl.trans(sums), tl.trans(up_sums)
        finish_tile(y, sums, up_sums, bias, scales, place, choice, rows, matrix, n, N, GATED, CLAMPED)


class GroupedWeight:
    """The matrices of all experts, and the products of each choice's row with its expert's.

    weight: [E * columns, in], or [E * 2 * columns, in] if `gated`, gate before up, for SwiGLU or, if
    `clamped`, for `clamped_swiglu`; a plain tensor of the activations' `dtype`, or a `ScaledTensor`, which
    `matrix` is too if a tensor core's step fits its blocks. bias: of each row of the weight, or None. boxes:
    whether the device has TMA.
    """

    def __init__(
        self,
        weight: Tensor,
        columns: int,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        *,
        gated: bool = False,
        clamped: bool = False,
        boxes: bool = False,
    ) -> None:
        self._scales, self._block = None, (0, 0)
        self.max_rows = 128  # of a tiling
        self.step: int | None = None  # `block_k` of a tiling is at most that: so many terms share a scale
        if isinstance(weight, ScaledTensor) and step_of(weight) < MIN_BLOCK_K:
            weight = weight.dequantized(dtype)
        self.matrix = weight if isinstance(weight, ScaledTensor) else weight.contiguous()
        if isinstance(weight, ScaledTensor):
            self.step, self._scales, self._block = step_of(weight), weight.scales, weight.block
            weight = weight.as_subclass(Tensor).view(torch.uint8)
        self._weight = weight.contiguous()
        self._bias, self._clamped = bias, clamped
        self._columns, self._gated = columns, gated
        self._boxes = boxes and weight.shape[1] * weight.dtype.itemsize % 16 == 0
        self._descriptors: dict[tuple[int, int], TensorDescriptor] = {}

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
        """Each choice's row times its expert's matrix -> [n * k, columns], rounded once.

        x: [n, in], of each choice its token's row, and the result is in sorted order; or with `scales` [n, k]
        float32, x: [n * k, in] in sorted order, and the result is scaled and in the order of the choices.
        `choices` were sorted for `tiling.rows`.
        """
        count, k = choices.order.shape[0], x.shape[1]
        y = torch.empty(count, self._columns, dtype=x.dtype, device=x.device)
        tiles, boxes = choices.experts.shape[0], tiling.boxes and self._boxes
        _grouped_kernel[(tiles * triton.cdiv(self._columns, tiling.columns),)](
            y, x, self._descriptor(tiling.columns, tiling.block_k) if boxes else self._weight, self._scales,
            self._bias, scales, *choices, tiles, N=self._columns, K=k, CHOICES=num_chosen,
            BLOCK_M=tiling.rows, BLOCK_N=tiling.columns, BLOCK_K=tiling.block_k, STAGES=tiling.stages,
            GATED=self._gated, SWAPPED=tiling.swapped, BOXES=boxes, SCALE_N=self._block[0],
            SCALE_K=self._block[1], CLAMPED=self._clamped, num_warps=tiling.warps, **launch_options(pdl),
        )  # fmt: skip
        return y

    def _descriptor(self, rows: int, columns: int) -> TensorDescriptor:
        box = rows, columns
        if box not in self._descriptors:
            self._descriptors[box] = TensorDescriptor.from_tensor(self._weight, list(box))
        return self._descriptors[box]


@triton.jit
def _sum_kernel(
    y, parts, residual,
    D: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK elements of one token."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(CHOICES):
        total += tl.load(parts + (row * CHOICES + place) * D + d, d < D, 0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + row * D + d, d < D, 0.0).to(tl.float32)
    tl.store(y + row * D + d, total, d < D)


def sum_choices(parts: Tensor, num_chosen: int, residual: Tensor | None, *, pdl: bool = False) -> Tensor:
    """parts: [n * k, d], of each token the choices in their order -> their sum + residual, [n, d]."""
    n, d = parts.shape[0] // num_chosen, parts.shape[1]
    y = torch.empty(n, d, dtype=parts.dtype, device=parts.device) if residual is None else residual
    block = min(SUM_BLOCK, triton.next_power_of_2(d))
    _sum_kernel[(n, triton.cdiv(d, block))](
        y, parts, residual, D=d, CHOICES=num_chosen, BLOCK=block, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return y
