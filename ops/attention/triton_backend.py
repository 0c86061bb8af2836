"""Paged attention by Triton kernels: any CUDA GPU, nothing to compile beforehand, any power-of-two block."""

from __future__ import annotations

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, AttentionConfig, SegmentTable, StepAttention
from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.attention.triton_decode import (
    MANY_SEQS,
    DecodeTiling,
    DecodeWorkspace,
    decode_attention,
    plan_decode,
)
from microvllm.ops.attention.triton_prefill import PrefillTiling, prefill_attention
from microvllm.ops.attention.triton_tiles import LOG2_E
from microvllm.ops.gpu.levers import Levers
from microvllm.ops.gpu.rope_cache import RotaryAngles, rope_and_cache

MIN_BLOCK = 16
INTERPRETED_SMS = 3  # where there are no multiprocessors to fill: enough to split sequences


class TritonAttention:
    """Decodes by one kernel; segments by two, one that writes their keys and values and one that attends.

    The cache is [places, 2, blocks, kv_heads, block_size, d], keys before values: what a head reads of a
    block is one contiguous run. A layer's place is that in `places`. float32, bfloat16 or float16; a head's
    size is even.
    `pdl`: let each kernel start before the one in front of it has ended (programmatic dependent launch,
    from compute capability 9.0 on); then the kernels around these have to wait in the same way.
    `levers`: none by default. `decode_tiling` is for few sequences and many. `fixed_order`: a token's result
    has the same bits whatever is computed with it, as decodes, too, are segments (`FixedOrderStep`).
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        pdl: bool = False,
        levers: Levers | None = None,
        decode_tiling: DecodeTiling | None = None,
        prefill_tiling: PrefillTiling | None = None,
        fixed_order: bool = False,
    ) -> None:
        """Raises ValueError for a block size that is no power of two from 16 on."""
        shape, block_size, dtype = config.shape, config.block_size, config.dtype
        if block_size < MIN_BLOCK or block_size & (block_size - 1):
            raise ValueError(f"block_size: {block_size} is no power of two from {MIN_BLOCK} on")
        levers = levers or Levers()
        device = config.inv_freq.device
        self.shape = shape
        self.norms = config.qk_norms
        self.scales = config.scales or (KVScales(),) * shape.num_layers
        # In powers of two, as the kernels have scores.
        self.sinks: list[Tensor | None] = [None] * shape.num_layers
        if config.sinks:
            self.sinks = [sink * LOG2_E for sink in config.sinks]
        self.pdl = pdl
        self.fixed_order = fixed_order
        self.angles = RotaryAngles.up_to(config.max_position, config.inv_freq, shape.rotary_scale)
        pages = config.layer_pages
        self.cache = pages.blocks(2, (shape.num_kv_heads, block_size, shape.head_dim))
        self.places = pages.places
        self._few = self._many = decode_tiling or DecodeTiling.measured(shape.head_dim, dtype)
        if decode_tiling is None and levers.boxes and pages.pages.is_uniform:  # the blocks are one matrix
            self._many = DecodeTiling.by_boxes(shape, dtype, block_size) or self._few
        self.early_reads = levers.early_reads
        group = shape.num_heads // shape.num_kv_heads
        self.prefill_tiling = prefill_tiling or PrefillTiling.measured(shape.head_dim, dtype, group)
        sms = INTERPRETED_SMS
        if device.type == "cuda":
            sms = torch.cuda.get_device_properties(device).multi_processor_count
        most = max(self._few.programs_per_sm, self._many.programs_per_sm)
        self.workspace = DecodeWorkspace(shape, sms, most, device)

    def rotated(self, qkv: Tensor, positions: Tensor, slots: Tensor, layer: int) -> Tensor:
        """Write the tokens' keys and values to the cache of a layer -> their queries: `rope_and_cache`."""
        keys, values = self.cache[self.places[layer]]
        return rope_and_cache(
            qkv,
            positions,
            slots,
            keys,
            values,
            self.scales[layer],
            self.shape,
            self.angles,
            self.norms,
            layer,
            heads_first=True,
            pdl=self.pdl,
        )

    def decode_tiling(self, sequences: int) -> DecodeTiling:
        return self._many if sequences >= MANY_SEQS else self._few

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        return FixedOrderStep(self, batch) if self.fixed_order else TritonStep(self, batch)


class TritonStep:
    """Computes one step's attention, layer by layer."""

    def __init__(self, backend: TritonAttention, batch: AttentionBatch) -> None:
        self._backend = backend
        self._batch = batch
        self._tiling = backend.decode_tiling(batch.num_decodes)
        self._early = False
        if batch.num_decodes:
            self._tile_ends = plan_decode(batch.decode_lens, backend.shape, self._tiling, pdl=backend.pdl)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        backend, batch, decodes = self._backend, self._batch, self._batch.num_decodes
        shape = backend.shape
        keys, values = backend.cache[backend.places[layer]]
        out = torch.empty(qkv.shape[0], shape.num_heads * shape.head_dim, dtype=qkv.dtype, device=qkv.device)
        if decodes:
            decode_attention(
                out,
                qkv,
                keys,
                values,
                batch.slots,
                batch.decode_lens,
                batch.decode_blocks,
                self._tile_ends,
                backend.scales[layer],
                shape,
                backend.angles,
                backend.norms,
                layer,
                self._tiling,
                backend.workspace,
                sinks=backend.sinks[layer],
                pdl=backend.pdl,
                early=self._early,
            )
            self._early = backend.early_reads  # behind the step's first
        if batch.segment_table is not None and decodes < qkv.shape[0]:
            q = backend.rotated(qkv[decodes:], batch.positions[decodes:], batch.slots[decodes:], layer)
            prefill_attention(
                out[decodes:],
                q,
                keys,
                values,
                backend.scales[layer],
                batch.segment_table,
                shape,
                backend.prefill_tiling,
                sinks=backend.sinks[layer],
                pdl=backend.pdl,
            )
        return out


class FixedOrderStep:
    """Computes one step's attention with one kernel for decodes and segments, in one order of the keys.

    A decode is a segment of one token. A program goes through the keys of its tokens alone, from the first
    tile on: a long sequence of few is slower than by `TritonStep`, which shares it among programs.
    """

    def __init__(self, backend: TritonAttention, batch: AttentionBatch) -> None:
        self._backend, self._batch = backend, batch
        decodes, self._segments = batch.num_decodes, list[tuple[slice, SegmentTable]]()
        if decodes:
            starts = torch.arange(decodes + 1, dtype=torch.int32, device=batch.decode_lens.device)
            table = SegmentTable(starts, batch.decode_lens, batch.decode_blocks, 1)
            self._segments.append((slice(0, decodes), table))
        if batch.segment_table is not None:
            self._segments.append((slice(decodes, None), batch.segment_table))

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        backend, batch = self._backend, self._batch
        shape, (keys, values) = backend.shape, backend.cache[backend.places[layer]]
        out = torch.empty(qkv.shape[0], shape.num_heads * shape.head_dim, dtype=qkv.dtype, device=qkv.device)
        q = backend.rotated(qkv, batch.positions, batch.slots, layer)
        for rows, table in self._segments:
            prefill_attention(
                out[rows],
                q[rows],
                keys,
                values,
                backend.scales[layer],
                table,
                shape,
                backend.prefill_tiling,
                sinks=backend.sinks[layer],
                uniform=True,
                pdl=backend.pdl,
            )
        return out
