"""Paged attention of several new tokens a sequence: prefill, whole or in chunks, of all sequences at once.

The queries of a segment attend causally to all cached tokens of its sequence, their own included: the cache
is written before (`ops.gpu.rope_cache`). The algorithm is FlashAttention-2 (Dao, 2023, arXiv:2307.08691);
as in the decode kernel, the query heads that share a KV head lie in one tile, so that a short chunk fills it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.attention import AttentionShape, SegmentTable
from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.attention.triton_tiles import LOG2_E, cached_rows, room_of
from microvllm.ops.gpu.launch import follow, launch_options

SEGMENTS_AT_ONCE = 32  # that a program looks through for its own


@triton.jit
def _attend(
    attended, highest, weight_sum, q, keys, values, table, positions, oldest, begin, end, head, scale,
    ROOM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys [begin, end) into the running softmax. Without MASKED every query sees all of them.

    Keys before `oldest`, which is for a WINDOW, are seen by no query, and their blocks may be others'.
    """
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        at = start + tl.arange(0, TILE)
        place = cached_rows(table, start, end, head, ROOM, PAGE, D, TILE)
        place = place[:, None] + d[None, :]
        inside = (at < end)[:, None] & (d < D)[None, :]
        if MASKED and WINDOW > 0:
            inside &= (at >= oldest)[:, None]
        k = tl.load(keys + place, inside, 0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            seen = at[None, :] <= positions[:, None]
            if WINDOW > 0:
                seen &= at[None, :] > positions[:, None] - WINDOW
            scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A query may see nothing in a window's first tile: -inf - -inf must not become NaN.
        base = tl.where(higher == -float("inf"), 0.0, higher) if MASKED else higher
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(highest - base)
        weight_sum = weight_sum * kept + tl.sum(weights, 1)
        v = tl.load(values + place, inside, 0.0).to(q.dtype)
        attended = tl.dot(weights.to(v.dtype), v, attended * kept[:, None], input_precision="ieee")
        highest = higher
    return attended, highest, weight_sum


@triton.jit
def _find_tile(starts, num_segments, index, TOKENS: tl.constexpr, SEGMENTS: tl.constexpr):
    """The segment of tile `index` and the tile's number in it; the segments' tiles lie one behind the other.

    A segment of `num_segments` or more: there is no such tile.
    """
    segment, before, total = index * 0, index * 0, index * 0
    for first in range(0, num_segments, SEGMENTS):
        at = first + tl.arange(0, SEGMENTS)
        inside = at < num_segments
        num_new = tl.load(starts + at + 1, inside, 0) - tl.load(starts + at, inside, 0)
        tiles = ((num_new + TOKENS - 1) // TOKENS).to(tl.int32)
        earlier = inside & (total + tl.cumsum(tiles, 0) <= index)
        segment += tl.sum(earlier.to(tl.int32), 0)
        before += tl.sum(tl.where(earlier, tiles, 0), 0)
        total += tl.sum(tiles, 0)
    return segment, index - before


@triton.jit(do_not_specialize=["num_segments", "table_stride"])
def _prefill_kernel(
    out, q, keys, values, starts, context_lens, tables, num_segments, table_stride, scale, v_scale, sinks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ROOM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTS: tl.constexpr, ONE_TILE: tl.constexpr, UNIFORM: tl.constexpr, SINKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program: up to ROWS // GROUP consecutive tokens of a segment and one KV head's group of query heads.

    ONE_TILE: no segment has more tokens than that.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = ROWS // GROUP
    follow(PDL)
    # The last queries see most keys: begin with them, so that no long program is left at the end.
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    segment, chunk = index, index * 0
    if not ONE_TILE:
        segment, chunk = _find_tile(starts, num_segments, index, TOKENS, SEGMENTS)
        if segment >= num_segments:
            return
    start = tl.load(starts + segment)
    num_new = tl.load(starts + segment + 1) - start
    token = chunk * TOKENS
    if token >= num_new:
        return
    context = tl.load(context_lens + segment)
    table = tables + segment.to(tl.int64) * table_stride
    rows = tl.arange(0, ROWS)
    # rows // GROUP as a product: with a division that is no shift, ptxas 12.8 runs the tensor core's
    # instructions of the loop one by one (C7515).
    row_token = (rows * (65536 // GROUP + 1)) >> 16
    tokens = token + row_token
    inside = (tokens < num_new) & (rows < TOKENS * GROUP)
    positions = context - num_new + tokens
    d = tl.arange(0, BLOCK_D)
    place = ((start + tokens).to(tl.int64) * HEADS + head * GROUP + rows - row_token * GROUP) * D
    place = place[:, None] + d[None, :]
    inside = inside[:, None] & (d < D)[None, :]
    queries = tl.load(q + place, inside, 0.0)

    # Keys from `begin` on are seen by some query, those of [full_begin, full_end) by all of them.
    first = context - num_new + token
    end = tl.minimum(context, first + TOKENS)
    oldest = first * 0
    begin = oldest
    full_begin = begin
    full_end = (first + 1) // TILE * TILE
    if WINDOW > 0:
        oldest = tl.maximum(first - WINDOW + 1, 0)
        begin = oldest // TILE * TILE
        full_begin = (tl.maximum(end - WINDOW, 0) + TILE - 1) // TILE * TILE
        full_begin = tl.minimum(full_begin, end)
        full_end = tl.maximum(full_end, full_begin)
    if UNIFORM:  # which keys all queries see depends on what else is in the program
        full_begin = begin
        full_end = begin
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    if SINKS:  # a key that all see, with a value of zeros
        highest = tl.load(sinks + head * GROUP + rows - row_token * GROUP)
        weight_sum += 1.0
    attended = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if WINDOW > 0 and not UNIFORM:
        attended, highest, weight_sum = _attend(
            attended, highest, weight_sum, queries, keys, values, table, positions, oldest,
            begin, full_begin, head, scale, ROOM, D, BLOCK_D, PAGE, TILE, WINDOW, STAGES, True,
        )  # fmt: skip
    if not UNIFORM:
        attended, highest, weight_sum = _attend(
            attended, highest, weight_sum, queries, keys, values, table, positions, oldest,
            full_begin, full_end, head, scale, ROOM, D, BLOCK_D, PAGE, TILE, WINDOW, STAGES, False,
        )  # fmt: skip
    attended, highest, weight_sum = _attend(
        attended, highest, weight_sum, queries, keys, values, table, positions, oldest,
        full_end, end, head, scale, ROOM, D, BLOCK_D, PAGE, TILE, WINDOW, STAGES, True,
    )  # fmt: skip
    weight_sum = tl.where(weight_sum == 0.0, 1.0, weight_sum)
    tl.store(out + place, attended / weight_sum[:, None] * v_scale, inside)


@dataclass(frozen=True, slots=True)
class PrefillTiling:
    """How the work is cut: rows (token and head) and keys a tile, tiles in flight, warps a program.

    registers: at most so many a thread.
    """

    rows: int
    tile: int
    stages: int
    warps: int
    registers: int | None = None

    @staticmethod
    def measured(dim: int, dtype: torch.dtype, group: int) -> PrefillTiling:
        """What was fastest on an H100 for heads of 128 in bf16; smaller tiles where a row is wider.

        dtype: of the cache. Beside e4m3 products are of 16 bits, and three programs find room on a
        multiprocessor: on an H200 a fifth faster than two for 8 prompts of 1,024, an eleventh for one of
        8,192.
        """
        row = triton.next_power_of_2(dim) * max(2, dtype.itemsize)
        if row > 256:
            return PrefillTiling(max(32, triton.next_power_of_2(group)), max(16, 16384 // row), 2, 4)
        rows = max(64, triton.next_power_of_2(group))
        return PrefillTiling(rows, 64, 5, 4, 168 if dtype.itemsize == 1 and rows == 64 else None)


def prefill_attention(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: KVScales,
    segments: SegmentTable,
    shape: AttentionShape,
    tiling: PrefillTiling,
    *,
    sinks: Tensor | None = None,
    uniform: bool = False,
    pdl: bool = False,
) -> None:
    """Attention of the segments' tokens, whose keys and values are in the cache.

    q: [n, heads, d], rotated, the step's tokens from its first; keys, values: [blocks, kv_heads, block, d],
    of its dtype or float8_e4m3fn, which `scales` are for; out: [n, heads * d], of which the segments' rows
    are written. sinks: [heads] float32, in powers of two, or None.
    uniform: a token's result has the same bits whatever is computed with it.
    No host synchronisation; the grid depends on the number of tokens and of segments alone.
    """
    group = shape.num_heads // shape.num_kv_heads
    num_segments = segments.context_lens.shape[0]
    if num_segments == 0 or len(q) == 0:
        return
    tokens = tiling.rows // group
    one_tile = segments.longest <= tokens
    tiles = num_segments if one_tile else triton.cdiv(len(q), tokens) + num_segments - 1
    grid = (tiles, shape.num_kv_heads)
    _prefill_kernel[grid](
        out, q, keys, values, segments.starts, segments.context_lens, segments.blocks, num_segments,
        segments.blocks.stride(0), shape.scale * LOG2_E * scales.keys, scales.values, sinks,
        HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, ROOM=room_of(keys), D=shape.head_dim,
        BLOCK_D=triton.next_power_of_2(shape.head_dim), ROWS=tiling.rows, PAGE=keys.shape[2],
        TILE=tiling.tile, WINDOW=shape.window or 0, STAGES=tiling.stages, SEGMENTS=SEGMENTS_AT_ONCE,
        ONE_TILE=one_tile, UNIFORM=uniform, SINKS=sinks is not None, num_warps=tiling.warps,
        maxnreg=tiling.registers, **launch_options(pdl),
    )  # fmt: skip
