"""Attention over latent keys and values by Triton kernels: the reference is `ops.attention.latent`.

One kernel rotates queries and keys and writes the keys to the cache. A second one attends: its rows are the
heads of a sequence's new tokens, all of which read the same keys, as keys and as values, so a decode is a
segment of one token. The keys of decodes are shared out among programs (flash-decoding: Dao et al., 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html), whose parts a third kernel adds up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, StepAttention
from microvllm.ops.attention.latent import LatentConfig, LatentShape
from microvllm.ops.attention.triton_tiles import LOG2_E
from microvllm.ops.gpu.launch import follow, launch_options, shared_memory
from microvllm.ops.gpu.rope_cache import RotaryAngles

HEADS_AT_ONCE = 16  # that a program rotates
MIN_ROWS = 16  # of a tensor core's tile
MAX_SPLITS = 16
INTERPRETED_SMS = 3  # where there are no multiprocessors to fill: enough to split sequences


@triton.jit
def _rotate_and_write_kernel(
    qk, cache, positions, slots, cos, sin,
    HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: ROWS heads of one token, whose queries are rotated in place; the first writes the key, too."""
    follow(PDL)
    KEY: tl.constexpr = RANK + 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, BLOCK_HALF)
    at = tl.load(positions + token).to(tl.int64) * HALF + half
    c = tl.load(cos + at, half < HALF, 0.0)
    s = tl.load(sin + at, half < HALF, 0.0)
    start = qk + token * ((HEADS + 1) * KEY)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (rows < HEADS)[:, None] & (half < HALF)[None, :]
    place = start + rows[:, None] * KEY + RANK + half[None, :]
    x = tl.load(place, inside, 0.0).to(tl.float32)
    y = tl.load(place + HALF, inside, 0.0).to(tl.float32)
    tl.store(place, x * c[None, :] - y * s[None, :], inside)
    tl.store(place + HALF, y * c[None, :] + x * s[None, :], inside)
    if tl.program_id(1) == 0:
        slot = tl.load(slots + token).to(tl.int64)
        key = start + HEADS * KEY
        out = cache + tl.maximum(slot, 0) * KEY
        r = tl.arange(0, BLOCK_RANK)
        tl.store(out + r, tl.load(key + r, r < RANK, 0.0), (r < RANK) & (slot >= 0))
        written = (half < HALF) & (slot >= 0)
        left = tl.load(key + RANK + half, half < HALF, 0.0).to(tl.float32)
        right = tl.load(key + RANK + HALF + half, half < HALF, 0.0).to(tl.float32)
        tl.store(out + RANK + half, left * c - right * s, written)
        tl.store(out + RANK + HALF + half, right * c + left * s, written)


@triton.jit(do_not_specialize=["table_stride"])
def _attend_kernel(
    out, partial, partial_lse, qk, cache, starts, lens, tables, table_stride, scale,
    HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: some rows of one segment, and one of SPLITS parts of the keys that they see."""
    follow(PDL)
    KEY: tl.constexpr = RANK + ROPE
    seq, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = tl.load(starts + seq).to(tl.int64)
    num_rows = (tl.load(starts + seq + 1).to(tl.int64) - first) * HEADS
    begin_row = tl.program_id(0).to(tl.int64) * ROWS
    if begin_row >= num_rows:
        return
    rows = begin_row + tl.arange(0, ROWS)
    present = rows < num_rows
    token, head = first + rows // HEADS, rows % HEADS
    # How many keys a row sees, and how many any of these do.
    context = tl.load(lens + seq).to(tl.int64)
    sees = context - num_rows // HEADS + rows // HEADS + 1
    most = tl.minimum(context, context - num_rows // HEADS + (begin_row + ROWS - 1) // HEADS + 1)
    tiles = (most + TILE - 1) // TILE
    each = (tiles + SPLITS - 1) // SPLITS
    begin, end = split * each, tl.minimum((split + 1) * each, tiles)

    r, p = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_ROPE)
    query = qk + (token * (HEADS + 1) + head) * KEY
    q = tl.load(query[:, None] + r[None, :], present[:, None] & (r < RANK)[None, :], 0.0)
    q_rotated = tl.load(query[:, None] + RANK + p[None, :], present[:, None] & (p < ROPE)[None, :], 0.0)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, BLOCK_RANK], tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        at = i * TILE + tl.arange(0, TILE)
        block = tl.load(tables + seq * table_stride + at // PAGE, at < most, 0).to(tl.int64)
        place = cache + (block * PAGE + at % PAGE) * KEY
        seen = (at < most)[:, None]
        k = tl.load(place[:, None] + r[None, :], seen & (r < RANK)[None, :], 0.0)
        k_rotated = tl.load(place[:, None] + RANK + p[None, :], seen & (p < ROPE)[None, :], 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.dot(q_rotated, tl.trans(k_rotated), scores, input_precision="ieee") * scale
        scores = tl.where(at[None, :] < sees[:, None], scores, -float("inf"))
        # Softmax as it goes, in powers of two (Milakov & Gimelshein, 2018, arXiv:1805.02867).
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet stays without weight.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(highest - base)
        weight_sum = weight_sum * kept + tl.sum(weights, 1)
        attended = tl.dot(weights.to(k.dtype), k, attended * kept[:, None], input_precision="ieee")
        highest = higher
    attended = attended / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
    owned = present[:, None] & (r < RANK)[None, :]
    row = token * HEADS + head
    if SPLITS == 1:
        tl.store(out + row[:, None] * RANK + r[None, :], attended, owned)
    else:
        part = row * SPLITS + split
        tl.store(partial + part[:, None] * RANK + r[None, :], attended, owned)
        tl.store(partial_lse + part, highest + tl.log2(weight_sum), present)


@triton.jit
def _merge_kernel(
    out, partial, partial_lse,
    RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one head of one decode. A part without a key has a weight of 0."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    splits, r = tl.arange(0, SPLITS), tl.arange(0, BLOCK_RANK)
    lse = tl.load(partial_lse + row * SPLITS + splits)
    highest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(highest == -float("inf"), 0.0, highest))
    place = partial + (row * SPLITS + splits)[:, None] * RANK + r[None, :]
    values = tl.load(place, (r < RANK)[None, :], 0.0)
    total = tl.sum(weights, 0)
    merged = tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * RANK + r, merged, r < RANK)


@dataclass(frozen=True, slots=True)
class LatentTiling:
    """How the work is cut: rows (token and head) of decodes and of segments, keys a tile, stages, warps."""

    decode_rows: int
    segment_rows: int
    tile: int
    stages: int
    warps: int

    @staticmethod
    def of(shape: LatentShape, dtype: torch.dtype, shared: int) -> LatentTiling:
        """Tiles that fit into so many bytes of shared memory, by their size: none is measured."""
        decode = max(MIN_ROWS, min(32, triton.next_power_of_2(shape.num_heads)))
        if dtype.itemsize > 2:
            return LatentTiling(MIN_ROWS, MIN_ROWS, 16, 1, 8)
        rows = (shared // (shape.key_dim * dtype.itemsize)) - 2 * 32  # beside two tiles of 32 keys
        return LatentTiling(decode if rows >= 32 else MIN_ROWS, 64 if rows >= 64 else MIN_ROWS, 32, 2, 8)


class TritonLatentAttention:
    """The cache is [layers, blocks, block_size, key_dim], of float32, bfloat16 or float16.

    `pdl`: see `ops.attention.triton_backend.TritonAttention`.
    """

    def __init__(
        self, config: LatentConfig, *, pdl: bool = False, tiling: LatentTiling | None = None
    ) -> None:
        """Raises ValueError as `LatentConfig.check` does."""
        config.check()
        shape, device = config.shape, config.inv_freq.device
        self.shape, self.pdl = shape, pdl
        self.angles = RotaryAngles.up_to(config.max_position, config.inv_freq, shape.rotary_scale)
        sizes = shape.num_layers, config.num_blocks, config.block_size, shape.key_dim
        self.cache = torch.zeros(sizes, dtype=config.dtype, device=device)
        self.tiling = tiling or LatentTiling.of(shape, config.dtype, shared_memory(device))
        self.sms = INTERPRETED_SMS
        if device.type == "cuda":
            self.sms = torch.cuda.get_device_properties(device).multi_processor_count

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        return TritonLatentStep(self, batch)

    def splits(self, sequences: int, width: int) -> int:
        """Programs that share the keys of a decode: as many as fill the device, of tables of this width."""
        tiles: int = triton.cdiv(width * self.cache.shape[2], self.tiling.tile)
        blocks = sequences * triton.cdiv(self.shape.num_heads, self.tiling.decode_rows)
        wanted: int = min(MAX_SPLITS, max(1, 2 * self.sms // blocks), tiles)
        return 1 << (wanted.bit_length() - 1)


class TritonLatentStep:
    """Computes one step's attention, layer by layer."""

    def __init__(self, backend: TritonLatentAttention, batch: AttentionBatch) -> None:
        self._backend, self._batch = backend, batch
        decodes = batch.num_decodes
        if decodes:
            self._starts = torch.arange(decodes + 1, dtype=torch.int32, device=batch.decode_lens.device)
            self._splits = backend.splits(decodes, batch.decode_blocks.shape[1])

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [n, (heads + 1) key_dim], rotated in place -> [n, heads * rank]."""
        backend, batch, shape = self._backend, self._batch, self._backend.shape
        cache, tiling, n = backend.cache[layer], backend.tiling, qkv.shape[0]
        out = torch.empty(n, shape.num_heads * shape.rank, dtype=qkv.dtype, device=qkv.device)
        _rotate_and_write_kernel[(n, triton.cdiv(shape.num_heads, HEADS_AT_ONCE))](
            qkv, cache, batch.positions, batch.slots, backend.angles.cos, backend.angles.sin,
            HEADS=shape.num_heads, RANK=shape.rank, BLOCK_RANK=triton.next_power_of_2(shape.rank),
            HALF=shape.rope_dim // 2, BLOCK_HALF=triton.next_power_of_2(shape.rope_dim // 2),
            ROWS=HEADS_AT_ONCE, **launch_options(backend.pdl),
        )  # fmt: skip
        if decodes := batch.num_decodes:
            tables = batch.decode_lens, batch.decode_blocks
            self._attend(
                out[:decodes], qkv, cache, self._starts, *tables, 1, tiling.decode_rows, self._splits
            )
        table = batch.segment_table
        if table is not None and decodes < n and table.longest:
            self._attend(
                out[decodes:],
                qkv[decodes:],
                cache,
                table.starts,
                table.context_lens,
                table.blocks,
                table.longest,
                tiling.segment_rows,
                1,
            )
        return out

    def _attend(
        self,
        out: Tensor,
        qk: Tensor,
        cache: Tensor,
        starts: Tensor,
        lens: Tensor,
        tables: Tensor,
        longest: int,
        rows: int,
        splits: int,
    ) -> None:
        """Segments of at most `longest` tokens, in tiles of so many rows."""
        backend, shape, tiling = self._backend, self._backend.shape, self._backend.tiling
        partial = lse = out
        if splits > 1:
            sizes = len(out), shape.num_heads, splits
            partial = torch.empty(*sizes, shape.rank, dtype=torch.float32, device=out.device)
            lse = torch.empty(sizes, dtype=torch.float32, device=out.device)
        block_rank = triton.next_power_of_2(shape.rank)
        grid = triton.cdiv(longest * shape.num_heads, rows), len(lens), splits
        _attend_kernel[grid](
            out, partial, lse, qk, cache, starts, lens, tables, tables.stride(0), shape.scale * LOG2_E,
            HEADS=shape.num_heads, RANK=shape.rank, BLOCK_RANK=max(MIN_ROWS, block_rank), ROPE=shape.rope_dim,
            BLOCK_ROPE=max(MIN_ROWS, triton.next_power_of_2(shape.rope_dim)), PAGE=cache.shape[1], ROWS=rows,
            TILE=tiling.tile, STAGES=tiling.stages, SPLITS=splits, num_warps=tiling.warps,
            **launch_options(backend.pdl),
        )  # fmt: skip
        if splits > 1:
            _merge_kernel[(len(out) * shape.num_heads,)](
                out, partial, lse, RANK=shape.rank, BLOCK_RANK=block_rank, SPLITS=splits,
                **launch_options(backend.pdl),
            )  # fmt: skip
