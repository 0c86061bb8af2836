"""Paged attention of one new token a sequence: everything between its qkv product and its output product.

One kernel normalises and rotates q and k, writes k and v to the cache, attends to the cached tokens and
merges the parts of a sequence that was split. Splitting keys and values among programs is flash-decoding
(Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html); the query heads that share a
KV head are the rows of one tile, so each key and value is read once.

The work is the *tiles* of all (sequence, KV head) pairs, called units, in a row. It is cut into equal runs,
one a program, whatever the lengths are: `plan` counts the tiles once a step, and from that count each
program finds its run. So the grid depends on no length, and a captured graph stays balanced.
A unit that lies in several runs is merged by the program that comes to it last (runs share at most one
unit with each neighbour, which is why two parts a program and one arrival counter a program are enough).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from microvllm.ops.attention import AttentionShape, QKNorms
from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.attention.triton_tiles import (
    LOG2_E,
    attend_tile,
    cached_rows,
    factors_of,
    halves,
    room_of,
    score_tile,
)
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.rope_cache import RotaryAngles, as_cached, as_factor, load_rotated

REGISTERS_OF_SM = 65536
MIN_DOT_ROWS = 16  # of a tensor core's tile
MAX_PARTS = 32  # of a unit, on average: more would take longer to merge than they save
SEARCH = 512  # sequences looked at at once where a program looks for its first
MANY_SEQS = 8  # from so many on a step's decodes fill the device


@triton.jit
def _cached_tiles(length, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """The first tile with a cached token that the newest one sees, and how many there are (perhaps 0)."""
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TILE
    cached = tl.maximum(length - 1, 0)
    return first, tl.maximum((cached + TILE - 1) // TILE - first, 0)


@triton.jit(do_not_specialize=["num_seqs"])
def _plan_kernel(
    tile_ends, lens, num_seqs,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, SEARCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    total = 0
    for start in range(0, num_seqs, SEARCH):
        seqs = start + tl.arange(0, SEARCH)
        length = tl.load(lens + seqs, seqs < num_seqs, 0).to(tl.int32)
        _, tiles = _cached_tiles(length, WINDOW, TILE)
        # A sequence without a cached token is a tile of its own: its output is still to be written.
        tiles = tl.where(seqs < num_seqs, tl.maximum(tiles, 1) * KV_HEADS, 0)
        tl.store(tile_ends + seqs, total + tl.cumsum(tiles, 0), seqs < num_seqs)
        total += tl.sum(tiles, 0)


@triton.jit
def _program_of(tile, programs, total):
    """Whose run holds a tile: program p's is [p * total // programs, (p + 1) * total // programs)."""
    return (((tile + 1).to(tl.int64) * programs - 1) // total).to(tl.int32)


@triton.jit
def _merge(
    out, partial, partial_lse, first, last,
    GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    MERGED_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Combine the parts that programs first ... last wrote for one unit.

    Every thread keeps its elements and takes the parts one by one, so that threads exchange nothing; the
    loads of MERGED_AT_ONCE parts are under way together.
    """
    rows = tl.arange(0, BLOCK_GROUP)
    d = tl.arange(0, BLOCK_D)
    inside = (rows < GROUP)[:, None] & (d < D)[None, :]
    highest = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_GROUP], tl.float32)
    total = tl.zeros([BLOCK_GROUP, BLOCK_D], tl.float32)
    for start in range(first, last + 1, MERGED_AT_ONCE):
        for i in tl.static_range(MERGED_AT_ONCE):
            program = start + i
            # Rows beyond the group repeat its last one, so that they are no NaN.
            at = (2 * program + (program == first).to(tl.int32)) * GROUP + tl.minimum(rows, GROUP - 1)
            written = program <= last
            lse = tl.load(partial_lse + at, written, -float("inf"))
            values = tl.load(partial + at[:, None] * D + d[None, :], inside & written, 0.0)
            # The first part is always there, so this is finite in every row of the group.
            higher = tl.maximum(highest, lse)
            kept, weight = tl.exp2(highest - higher), tl.exp2(lse - higher)
            weight_sum = weight_sum * kept + weight
            total = total * kept[:, None] + values * weight[:, None]
            highest = higher
    tl.store(out + rows[:, None] * D + d[None, :], total / weight_sum[:, None], inside)


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def _decode_kernel(
    out, qkv, keys, values, key_boxes, value_boxes, cos, sin, q_norm, k_norm, slots, lens, tables, tile_ends,
    partial, partial_lse, arrivals, num_seqs, table_stride, scale, k_scale, v_scale, eps, sinks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ROOM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_GROUP: tl.constexpr, MERGED_AT_ONCE: tl.constexpr, MAX_PARTS: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
    SEARCH: tl.constexpr, BOXES: tl.constexpr, FP8: tl.constexpr, SINKS: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program: a run of tiles.

    With FP8 the cache is of e4m3, two numbers in an int16 word of `keys` and `values`, and products are of
    float16, which has all of their values. With EARLY it looks for its run before it waits for the kernel
    ahead; see `decode_attention`.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    elif PDL:
        # In this order: what starts then finds all that was written before this kernel.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    total = tl.load(tile_ends + num_seqs - 1)
    programs = tl.minimum(tl.minimum(tl.num_programs(0), total), num_seqs * KV_HEADS * MAX_PARTS)
    if program >= programs:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        return
    tile = (program.to(tl.int64) * total // programs).to(tl.int32)
    end = ((program + 1).to(tl.int64) * total // programs).to(tl.int32)
    seq = 0
    for chunk in range(0, num_seqs, SEARCH):
        seqs = chunk + tl.arange(0, SEARCH)
        seq += tl.sum((tl.load(tile_ends + seqs, seqs < num_seqs, total) <= tile).to(tl.int32), 0)

    d = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, ROWS)
    one = tl.arange(0, 1)
    # A row of the cache as it is read.
    CACHED: tl.constexpr = tl.float8e4nv if FP8 else keys.dtype.element_ty
    DTYPE: tl.constexpr = out.dtype.element_ty
    FACTOR: tl.constexpr = tl.float16 if FP8 and tl.float32 != DTYPE else DTYPE
    WIDTH: tl.constexpr = D // 2 if FP8 else D
    BLOCK_WIDTH: tl.constexpr = BLOCK_D // 2 if FP8 else BLOCK_D
    column = tl.arange(0, BLOCK_WIDTH)
    keys_out, values_out = keys, values
    if FP8:
        keys_out = keys.to(tl.pointer_type(CACHED), bitcast=True)
        values_out = values.to(tl.pointer_type(CACHED), bitcast=True)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    while tile < end:
        # The unit, and the part of it that is this program's: tiles [tile, stop).
        length = tl.load(lens + seq).to(tl.int32)
        slot = tl.load(slots + seq).to(tl.int64)
        seq_end = tl.load(tile_ends + seq)
        first_tile, cached_tiles = _cached_tiles(length, WINDOW, TILE)
        unit_tiles = tl.maximum(cached_tiles, 1)
        seq_begin = seq_end - unit_tiles * KV_HEADS
        head = (tile - seq_begin) // unit_tiles
        unit_begin = seq_begin + head * unit_tiles
        stop = tl.minimum(end, unit_begin + unit_tiles)
        # The program that begins a unit also takes the new token, which no one has to wait for.
        begins = tile == unit_begin
        takes_new = begins & (length > 0)
        cached = length - 1
        table = tables + seq.to(tl.int64) * table_stride

        token = qkv + seq.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * D)
        position = tl.maximum(cached, 0).to(tl.int64) * (D // 2)
        q = load_rotated(
            token + head * (GROUP * D),
            rows,
            rows < GROUP,
            q_norm,
            cos + position,
            sin + position,
            eps,
            D,
            BLOCK_D,
            NORM,
        )
        q = as_factor(q, FACTOR)
        new_k = load_rotated(
            token + (HEADS + head) * D,
            one,
            (one == 0) & takes_new,
            k_norm,
            cos + position,
            sin + position,
            eps,
            D,
            BLOCK_D,
            NORM,
        )
        new_k = as_cached(new_k, k_scale, CACHED)
        new_v = tl.load(
            token + (HEADS + KV_HEADS + head) * D + d[None, :], ((d < D) & takes_new)[None, :], 0.0
        )
        new_v = as_cached(new_v.to(tl.float32), v_scale, CACHED)
        new_place = ((slot // PAGE * ROOM + head) * PAGE + slot % PAGE) * D + d[None, :]
        written = ((d < D) & takes_new & (slot >= 0))[None, :]
        tl.store(keys_out + new_place, new_k, written)
        tl.store(values_out + new_place, new_v, written)

        # Softmax as it goes, in powers of two (Milakov & Gimelshein, 2018, arXiv:1805.02867).
        scores = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale
        highest = tl.where(takes_new, scores, -float("inf"))
        weight_sum = tl.where(takes_new, 1.0, 0.0) + tl.zeros([ROWS], tl.float32)
        attended = tl.zeros([ROWS, BLOCK_D], tl.float32) + new_v.to(tl.float32)
        if SINKS:  # a key without a value, which is taken beside the new one
            sink = tl.load(sinks + head * GROUP + rows, rows < GROUP, 0.0)
            higher = tl.maximum(scores, sink)
            kept = tl.exp2(scores - higher)
            weight_sum = tl.where(takes_new, kept + tl.exp2(sink - higher), 0.0)
            highest = tl.where(takes_new, higher, highest)
            attended *= kept[:, None]
        attended = halves(attended, FP8)
        factors = halves(q, FP8)
        begin_tile, end_tile = tile - unit_begin, tl.minimum(stop - unit_begin, cached_tiles)
        if BOXES:
            # Whole tiles by TMA. The last one of a sequence may hold what others left there.
            whole = tl.minimum(end_tile, cached // TILE)
            for i in tl.range(begin_tile, whole, num_stages=STAGES):
                row = (tl.load(table + i * TILE // PAGE) * KV_HEADS + head) * PAGE + i * TILE % PAGE
                k = factors_of(key_boxes.load([row, 0]), FACTOR, FP8)
                tile_scores = score_tile(factors, k, scale)
                v = factors_of(value_boxes.load([row, 0]), FACTOR, FP8)
                attended, highest, weight_sum = attend_tile(attended, highest, weight_sum, tile_scores, v)
            begin_tile = tl.maximum(begin_tile, whole)
        for i in tl.range(begin_tile, end_tile, num_stages=1 if BOXES else STAGES):
            start = (first_tile + i) * TILE
            at = start + tl.arange(0, TILE)
            visible = at < cached
            if WINDOW > 0:
                visible &= at >= length - WINDOW
            place = cached_rows(table, start, cached, head, ROOM, PAGE, WIDTH, TILE)
            place = place[:, None] + column[None, :]
            inside = visible[:, None]
            if BLOCK_D != D:
                inside &= (column < WIDTH)[None, :]
            k = factors_of(tl.load(keys + place, inside, 0), FACTOR, FP8)
            tile_scores = tl.where(visible[None, :], score_tile(factors, k, scale), -float("inf"))
            v = factors_of(tl.load(values + place, inside, 0), FACTOR, FP8)
            attended, highest, weight_sum = attend_tile(attended, highest, weight_sum, tile_scores, v)
        if FP8:
            sums = tl.reshape(tl.join(attended[0], attended[1]), [ROWS, BLOCK_D]) * v_scale
        else:
            sums = attended[0]
        # Only padding (length 0) has no weight at all: its output is zeros.
        sums = sums / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]

        owned = (rows < GROUP)[:, None] & (d < D)[None, :]
        result = out + seq.to(tl.int64) * (HEADS * D) + head * (GROUP * D)
        first = _program_of(unit_begin, programs, total)
        last = _program_of(unit_begin + unit_tiles - 1, programs, total)
        if first == last:
            tl.store(result + rows[:, None] * D + d[None, :], sums, owned)
        else:
            part = (2 * program + begins.to(tl.int32)) * GROUP + rows
            tl.store(partial + part[:, None] * D + d[None, :], sums, owned)
            tl.store(partial_lse + part, highest + tl.log2(weight_sum), rows < GROUP)
            tl.debug_barrier()  # the whole part is written before one thread says so
            arrived = tl.atomic_add(arrivals + first, 1, sem="acq_rel", scope="gpu")
            if arrived == last - first:
                tl.store(arrivals + first, 0)  # as the next layer needs it
                _merge(
                    result, partial, partial_lse, first, last, GROUP, BLOCK_GROUP, D, BLOCK_D, MERGED_AT_ONCE
                )
        seq += (stop == seq_end).to(tl.int32)
        tile = stop


@dataclass(frozen=True, slots=True)
class DecodeTiling:
    """How the work is cut: tokens a tile, stages of the loop over tiles, warps a program, programs an SM.

    Triton gives every second stage to the look-up in the block table: 3 stages keep one tile in flight
    while another is computed, 5 stages two. boxes: whole tiles come by TMA (from compute
    capability 9.0 on; a tile lies within a block, heads are a power of two, and there is no window).
    """

    tile: int
    stages: int
    warps: int
    programs_per_sm: int
    boxes: bool = False

    @staticmethod
    def measured(dim: int, dtype: torch.dtype) -> DecodeTiling:
        """Tiles of 16 KiB of keys, of e4m3 of half that; the rest is for heads of 128 in bf16 on an H100."""
        row = triton.next_power_of_2(dim) * max(2, dtype.itemsize)
        return DecodeTiling(max(16, min(128, 16384 // row)), 3, 4, 3)

    @staticmethod
    def by_boxes(shape: AttentionShape, dtype: torch.dtype, block_size: int) -> DecodeTiling | None:
        """For MANY_SEQS sequences or more, where it was a gain: on an H200 a twentieth, for heads of 128.

        Four programs find room on a multiprocessor, because TMA computes the addresses.
        """
        fits = shape.head_dim == 128 and dtype.itemsize <= 2 and shape.window is None and block_size >= 64
        return DecodeTiling(64, 3, 4, 4, boxes=True) if fits else None

    @property
    def max_registers(self) -> int:
        """A thread's share, so that as many programs as are launched for an SM find room on it."""
        return min(255, REGISTERS_OF_SM // (self.programs_per_sm * self.warps * 32) // 8 * 8)


class DecodeWorkspace:
    """Room for the parts of split units, for all layers and batch sizes; used by one stream at a time.

    programs: multiprocessors * programs_per_sm, of the largest grid. partial: [2 * programs, group, d]
    float32, each part's attention; partial_lse: [2 * programs, group] float32, log2 of its sum of weights;
    arrivals: [programs] int32, how many parts of the unit that begins in a program's run are there: 0 between
    launches.
    """

    def __init__(
        self, shape: AttentionShape, multiprocessors: int, programs_per_sm: int, device: torch.device
    ) -> None:
        group = shape.num_heads // shape.num_kv_heads
        self.multiprocessors = multiprocessors
        programs = multiprocessors * programs_per_sm
        self.partial = torch.empty(2 * programs, group, shape.head_dim, device=device)
        self.partial_lse = torch.empty(2 * programs, group, device=device)
        self.arrivals = torch.zeros(programs, dtype=torch.int32, device=device)


def plan_decode(lens: Tensor, shape: AttentionShape, tiling: DecodeTiling, *, pdl: bool = False) -> Tensor:
    """lens: [b] context lengths with the new token, 0 for padding -> [b] int32 running sum of the tiles."""
    tile_ends = torch.empty(lens.shape[0], dtype=torch.int32, device=lens.device)
    _plan_kernel[(1,)](
        tile_ends, lens, lens.shape[0], KV_HEADS=shape.num_kv_heads, WINDOW=shape.window or 0,
        TILE=tiling.tile, SEARCH=SEARCH, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return tile_ends


def decode_attention(
    out: Tensor,
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lens: Tensor,
    tables: Tensor,
    tile_ends: Tensor,
    scales: KVScales,
    shape: AttentionShape,
    angles: RotaryAngles,
    norms: QKNorms | None,
    layer: int,
    tiling: DecodeTiling,
    workspace: DecodeWorkspace,
    *,
    sinks: Tensor | None = None,
    pdl: bool = False,
    early: bool = False,
) -> None:
    """Attention of b sequences' newest tokens, whose k and v are written to `slots`.

    qkv: [b, (heads + 2 * kv_heads) * d], not rotated; keys, values: [blocks, kv_heads, block, d], of its
    dtype or float8_e4m3fn, which `scales` are for; slots, lens: [b]; tables: [b, width], rows of blocks;
    tile_ends: of `plan_decode`; out: [b, heads * d]. A slot of -1 is not written; a length of 0 gives zeros.
    sinks: [heads] float32, in powers of two, or None.
    early: lens, slots, tables and tile_ends are read before the kernel ahead has ended, which is right behind
    one that waited before it let others start, as this one does without `early`.
    No host synchronisation, a grid that depends on no value: may be captured in a CUDA graph.
    """
    dim = shape.head_dim
    group = shape.num_heads // shape.num_kv_heads
    fp8 = keys.dtype == torch.float8_e4m3fn
    # Half of the columns are a factor beside e4m3, which the tensor core takes from 16 on.
    block_dim = max(32 if fp8 else 16, triton.next_power_of_2(dim))
    block_group = triton.next_power_of_2(group)
    q_norm, k_norm = norms.weights[layer] if norms else (qkv, qkv)
    if fp8:
        keys, values = keys.view(torch.int16), values.view(torch.int16)
    boxes, by_boxes = [keys, values], tiling.boxes and shape.window is None and keys.is_contiguous()
    if by_boxes:
        box = [tiling.tile, keys.shape[-1]]
        boxes = [TensorDescriptor.from_tensor(x.view(-1, box[1]), box) for x in boxes]
    _decode_kernel[(workspace.multiprocessors * tiling.programs_per_sm,)](
        out,
        qkv,
        keys,
        values,
        *boxes,
        angles.cos,
        angles.sin,
        q_norm,
        k_norm,
        slots,
        lens,
        tables,
        tile_ends,
        workspace.partial,
        workspace.partial_lse,
        workspace.arrivals,
        lens.shape[0],
        tables.stride(0),
        shape.scale * LOG2_E * scales.keys,
        *scales,
        norms.eps if norms else 0.0,
        sinks,
        HEADS=shape.num_heads,
        KV_HEADS=shape.num_kv_heads,
        ROOM=room_of(keys),
        D=dim,
        BLOCK_D=block_dim,
        ROWS=max(MIN_DOT_ROWS, block_group),
        BLOCK_GROUP=block_group,
        MERGED_AT_ONCE=max(1, min(8, 8192 // (block_group * block_dim))),  # 64 registers a thread
        MAX_PARTS=MAX_PARTS,
        PAGE=keys.shape[2],
        TILE=tiling.tile,
        WINDOW=shape.window or 0,
        STAGES=tiling.stages,
        NORM=norms is not None,
        SEARCH=SEARCH,
        BOXES=by_boxes,
        FP8=fp8,
        SINKS=sinks is not None,
        EARLY=pdl and early,
        num_warps=tiling.warps,
        maxnreg=tiling.max_registers,
        **launch_options(pdl),
    )
