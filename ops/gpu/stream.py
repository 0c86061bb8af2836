"""Products of few rows with a weight that is streamed once through shared memory, on compute capability 9.0.

A weight of [n, k] and m rows of x take n * k * 2 bytes from memory and 2 * m * n * k operations; besides,
x is read from the L2 cache for each BLOCK_N columns of the result, m * k * 2 bytes. Up to some 64 rows the
bytes of the weight are what takes time. Share of the bandwidth of an H200 (4.59 TB/s) that was measured:
gate_up of Qwen2-7B, 272 MB, 88 % with 8 rows and 79 % with 64; its head, 96 and 89 %; o, 26 MB, 63 and 49 %.

The weight is the tensor core's left operand, whose tile has 64 rows at least, and x the right one, whose tile
has as few as 8, so that few rows are not padded to many. TMA keeps a ring of STAGES steps
(BLOCK_K columns of a tile) in flight. A program fills its ring with weights before it waits for the kernel
ahead: a weight that fits the rings of all multiprocessors is on the chip when x is known. Sums over k may be
split among programs; the one that comes last adds the parts up, always in the same order.

Written in Gluon (`triton.experimental`), which may change with every version of Triton: `ops.gpu.levers` says
with which it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from operator import itemgetter

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from microvllm.ops.gpu.launch import launch_options
from microvllm.ops.gpu.tiling import Tiling
from microvllm.ops.scaled import ScaledTensor

MIN_ROWS = 8  # of the right operand's tile


@gluon.jit
def _load_weight(weight, tiles, arrived, slot, n, k, inside, N, GATED: gl.constexpr, BYTES: gl.constexpr):
    """Request a step's tile of the weight, and announce the BYTES of the whole step."""
    mbarrier.expect(arrived.index(slot), BYTES, inside)
    if GATED:
        tma.async_copy_global_to_shared(weight, [n, k], arrived.index(slot), tiles.index(2 * slot), inside)
        tma.async_copy_global_to_shared(
            weight, [N + n, k], arrived.index(slot), tiles.index(2 * slot + 1), inside
        )
    else:
        tma.async_copy_global_to_shared(weight, [n, k], arrived.index(slot), tiles.index(slot), inside)


@gluon.jit
def _left(tile, LAYOUT: gl.constexpr, DTYPE: gl.constexpr, WIDENS: gl.constexpr):
    """A tile in shared memory as the left operand of a product, or its codes widened in registers."""
    if WIDENS:
        # By way of float32: the direct conversion to bfloat16 is an instruction of a fourth of the rate.
        return tile.load(LAYOUT).to(gl.float32).to(DTYPE)
    else:  # Triton compiles what follows a return, too
        return tile


@gluon.jit
def _add_parts(part, stride, splits):
    """part: pointers to the first split's part; the others are `stride` apart."""
    # Past the L1 cache, which other multiprocessors do not write through.
    total = gl.load(part, cache_modifier=".cg")
    for split in range(1, splits):
        total += gl.load(part + split * stride, cache_modifier=".cg")
    return total


@gluon.jit(do_not_specialize=["M", "K", "chunk"])
def _stream_kernel(
    y, x, x_scales, weight, scales, bias, residual, parts, arrivals, M, N, K, chunk,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    SCALE_N: gl.constexpr, SCALE_K: gl.constexpr, EVEN: gl.constexpr, GATED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N columns of y, and `chunk` of the steps over k that their sums take.

    x, weight: descriptors of boxes [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]; what lies outside is zero.
    Codes have scales, and are widened if x has none. EVEN: a step of a tile has one scale.
    """
    DTYPE: gl.constexpr = x.dtype
    CODES: gl.constexpr = SCALE_N > 0
    WIDENS: gl.constexpr = CODES and x.dtype != weight.dtype
    X_BYTES: gl.constexpr = 2 if WIDENS or not CODES else 1
    IN_BLOCKS: gl.constexpr = SCALE_K > 0
    HALVES: gl.constexpr = 2 if GATED else 1
    SIZE: gl.constexpr = BLOCK_N * BLOCK_M
    BYTES: gl.constexpr = (HALVES * BLOCK_N * (1 if CODES else 2) + BLOCK_M * X_BYTES) * BLOCK_K
    WARPS: gl.constexpr = gl.num_warps()
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 32 // X_BYTES])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)  # codes are widened in registers
    # As they are stored: a thread has neighbouring columns of y.
    WIDE: gl.constexpr = 8 if SIZE >= 256 * WARPS else 4
    LANES: gl.constexpr = BLOCK_N // WIDE if BLOCK_N // WIDE < 32 else 32
    STORED: gl.constexpr = gl.BlockedLayout([WIDE, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    tile, split, splits = gl.program_id(0), gl.program_id(1), gl.num_programs(1)
    begin = split * chunk
    steps = gl.minimum(chunk, (K + BLOCK_K - 1) // BLOCK_K - begin)
    n, first_k = tile * BLOCK_N, begin * BLOCK_K

    tiles = gl.allocate_shared_memory(weight.dtype, [STAGES * HALVES, BLOCK_N, BLOCK_K], weight.layout)
    x_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(arrived.index(slot), count=1)
    for slot in gl.static_range(STAGES):
        _load_weight(weight, tiles, arrived, slot, n, first_k + slot * BLOCK_K, slot < steps, N, GATED, BYTES)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for slot in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(
            x, [0, first_k + slot * BLOCK_K], arrived.index(slot), x_tiles.index(slot), slot < steps
        )

    sums = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
    up_sums = sums
    slot, phase = 0, 0
    scale_at = scales
    across = 1
    if IN_BLOCKS:
        across = (K + SCALE_K - 1) // SCALE_K
    if CODES:
        own = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SUMS))
        own_row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SUMS))
        scale_at = scales + gl.minimum(own, N - 1) // SCALE_N * across
        up_scale_at = scales + gl.minimum(N + own, 2 * N - 1) // SCALE_N * across
    if EVEN:  # loaded a step ahead, as the L2 cache takes about as long as a step
        scale_at = scales + n // SCALE_N * across
        up_scale_at = scales + gl.minimum(N + n, 2 * N - 1) // SCALE_N * across
        of_rows = gl.load(x_scales + begin * BLOCK_K // SCALE_K * M + own_row, own_row < M, 0.0)
        of_tile = gl.load(scale_at + begin * BLOCK_K // SCALE_K)
        up_of_tile = of_tile
        if GATED:
            up_of_tile = gl.load(up_scale_at + begin * BLOCK_K // SCALE_K)
    for step in range(steps):
        if EVEN:
            scale = of_rows * of_tile
            up_scale = of_rows * up_of_tile
        elif IN_BLOCKS:
            block = (begin + step) * BLOCK_K // SCALE_K
            scale = gl.load(scale_at + block)[:, None]
            if GATED:
                up_scale = gl.load(up_scale_at + block)[:, None]
            if not WIDENS:
                of_group = gl.load(x_scales + block * M + own_row, own_row < M, 0.0)[None, :]
                scale = scale * of_group
                if GATED:
                    up_scale = up_scale * of_group
        mbarrier.wait(arrived.index(slot), phase)
        right = x_tiles.index(slot).permute((1, 0))
        # Sums of one block of columns are scaled before they join the others.
        left = _left(tiles.index(HALVES * slot), LEFT, DTYPE, WIDENS)
        started = warpgroup_mma(left, right, sums, use_acc=not IN_BLOCKS, is_async=True)
        if EVEN:
            # One half after the other: both halves' parts would take the registers of a third program.
            part = warpgroup_mma_wait(0, [started])
            sums = sums + part * scale[None, :]
            block = gl.minimum((begin + step + 1) * BLOCK_K // SCALE_K, across - 1)
            of_rows = gl.load(x_scales + block * M + own_row, own_row < M, 0.0)
            of_tile = gl.load(scale_at + block)
            if GATED:
                up_of_tile = gl.load(up_scale_at + block)
                up_left = tiles.index(2 * slot + 1)
                part = warpgroup_mma_wait(
                    0, [warpgroup_mma(up_left, right, up_sums, use_acc=False, is_async=True)]
                )
                up_sums = up_sums + part * up_scale[None, :]
        elif GATED:
            up_left = _left(tiles.index(2 * slot + 1), LEFT, DTYPE, WIDENS)
            up_started = warpgroup_mma(up_left, right, up_sums, use_acc=not IN_BLOCKS, is_async=True)
            if WIDENS:  # their registers are in use until the wait
                part, up_part, left, up_left = warpgroup_mma_wait(0, [started, up_started, left, up_left])
            else:
                part, up_part = warpgroup_mma_wait(0, [started, up_started])
            up_sums = up_sums + up_part * up_scale if IN_BLOCKS else up_part
        elif WIDENS:
            part, left = warpgroup_mma_wait(0, [started, left])
        else:
            part = warpgroup_mma_wait(0, [started])
        if not EVEN:
            sums = sums + part * scale if IN_BLOCKS else part
        gl.thread_barrier()  # all warps have read the slot
        inside = step + STAGES < steps
        k = first_k + (step + STAGES) * BLOCK_K
        _load_weight(weight, tiles, arrived, slot, n, k, inside, N, GATED, BYTES)
        tma.async_copy_global_to_shared(x, [0, k], arrived.index(slot), x_tiles.index(slot), inside)
        slot += 1
        wraps = slot == STAGES
        slot = gl.where(wraps, 0, slot)
        phase = gl.where(wraps, 1 - phase, phase)

    if CODES and not IN_BLOCKS:
        sums *= gl.load(scale_at)[:, None]
        if GATED:
            up_sums *= gl.load(up_scale_at)[:, None]
    columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, STORED))
    rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, STORED))
    total = gl.convert_layout(sums, STORED)
    up_total = gl.convert_layout(up_sums, STORED) if GATED else total
    complete = splits == 1
    if splits > 1:
        part = parts + tile * (HALVES * SIZE) + rows[None, :] * BLOCK_N + columns[:, None]
        stride = gl.num_programs(0) * (HALVES * SIZE)
        gl.store(part + split * stride, total)
        if GATED:
            gl.store(part + split * stride + SIZE, up_total)
        gl.thread_barrier()  # all threads have stored before one of them says so
        complete = gl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
        if complete:
            gl.atomic_xchg(arrivals + tile, 0)
            total = _add_parts(part, stride, splits)
            if GATED:
                up_total = _add_parts(part + SIZE, stride, splits)
    if complete:
        columns += n
        known = columns < N
        if CODES and not WIDENS and not IN_BLOCKS:
            of_rows = gl.load(x_scales + rows, rows < M, 0.0)[None, :]
            total *= of_rows
            if GATED:
                up_total *= of_rows
        if bias is not None:
            total += gl.load(bias + columns, known, 0.0).to(gl.float32)[:, None]
        if GATED:
            if bias is not None:
                up_total += gl.load(bias + N + columns, known, 0.0).to(gl.float32)[:, None]
            total = total / (1.0 + gl.exp(-total)) * up_total  # SwiGLU
        at = rows[None, :] * N + columns[:, None]
        inside_y = (rows < M)[None, :] & known[:, None]
        if residual is not None:
            total += gl.load(residual + at, inside_y, 0.0).to(gl.float32)
        gl.store(y + at, total.to(y.dtype.element_ty), inside_y)


@lru_cache(maxsize=4)
def _layout(row_bytes: int, bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, row_bytes), element_bitwidth=bits, rank=2)


def _boxes(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What TMA needs to find boxes of [rows, columns] in a contiguous matrix."""
    return TensorDescriptor(
        matrix,
        list(matrix.shape),
        list(matrix.stride()),
        [rows, columns],
        _layout(columns * matrix.dtype.itemsize, 8 * matrix.dtype.itemsize),
    )


class StreamedWeight:
    """A weight of bfloat16 or float16 on the device, [n, k], or [2 * n, k] (gate before up) if `gated`.

    k is a multiple of 8. tilings: by the largest number of rows that they are for, None for those that
    another kernel is for; block_n is a multiple of 16 * warps, block_k one of 64. arrivals: int32 zeros, at
    least one for each block_n columns, and zeros again after each call; for one call at a time. ahead: scales
    of blocks are loaded a step ahead where x is in codes, too.
    """

    def __init__(
        self,
        weight: Tensor,
        arrivals: Tensor,
        tilings: Mapping[int, Tiling | None],
        *,
        gated: bool,
        pdl: bool,
        ahead: bool = False,
    ) -> None:
        self._weight, self._arrivals = weight, arrivals
        self._codes, self._scales, self._block = weight, None, (0, 0)
        if isinstance(weight, ScaledTensor):
            self._codes, self._scales = weight.as_subclass(Tensor), weight.scales
            self._block = weight.block if weight.block[1] < weight.shape[1] else (weight.block[0], 0)
        self._tilings = sorted(tilings.items(), key=itemgetter(0))
        self._gated, self._pdl, self._ahead = gated, pdl, ahead
        self._weight_boxes: dict[tuple[int, int], TensorDescriptor] = {}

    def tiling(self, rows: int) -> Tiling | None:
        """The tiling for x of so many rows, if there is one."""
        return next((tiling for most, tiling in self._tilings if 0 < rows <= most), None)

    def __call__(
        self,
        x: Tensor,
        tiling: Tiling,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        x_scales: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """act(x @ weight.T + bias) + residual, with float32 sums and one rounding at the end.

        x: [m, k] contiguous, of the weight's dtype; with a weight in codes, of 16 bits, or codes as well,
        which are added up with 14 bits or so, and x_scales: [m] float32, or [blocks, m] if the weight has a
        scale for each block of columns. bias: one number a row of the weight; residual: [m, n]; act is SwiGLU
        if gated. -> [m, n] of `dtype`, by default x's. Raises `ValueError` where more tiles have split sums
        than there are arrivals.
        """
        m, k = x.shape
        n = self._weight.shape[0] // (2 if self._gated else 1)
        place = (tiling.block_n, tiling.block_k)
        if place not in self._weight_boxes:
            self._weight_boxes[place] = _boxes(self._codes, *place)
        block_m = max(MIN_ROWS, triton.next_power_of_2(m))
        tiles, steps = triton.cdiv(n, tiling.block_n), triton.cdiv(k, tiling.block_k)
        chunk = triton.cdiv(steps, tiling.splits)
        splits = triton.cdiv(steps, chunk)
        if splits > 1 and tiles > len(self._arrivals):
            raise ValueError(f"{tiles} tiles of split sums, room for the arrivals of {len(self._arrivals)}")
        halves = 2 if self._gated else 1
        shape = (splits if splits > 1 else 0, tiles, halves, block_m, tiling.block_n)
        y = torch.empty(m, n, dtype=dtype or x.dtype, device=x.device)
        _stream_kernel[(tiles, splits)](
            y, _boxes(x, block_m, tiling.block_k), x_scales, self._weight_boxes[place], self._scales, bias,
            residual, torch.empty(shape, dtype=torch.float32, device=x.device), self._arrivals, m, n, k,
            chunk, BLOCK_M=block_m, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, STAGES=tiling.stages,
            SCALE_N=self._block[0], SCALE_K=self._block[1],
            EVEN=(
                self._ahead and x_scales is not None and self._block[1] >= tiling.block_k
                and self._block[0] % tiling.block_n == n % tiling.block_n == 0
            ),
            GATED=self._gated, num_warps=tiling.warps, maxnreg=tiling.max_registers,
            **launch_options(self._pdl),
        )  # fmt: skip
        return y
