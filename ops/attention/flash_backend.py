"""Paged attention by FlashAttention 2 (Dao, 2023, arXiv:2307.08691), from the package `flash-attn`.

It wants blocks of a multiple of 256, bfloat16 or float16, and head sizes that are multiples of 8 up to 256.
It has no attention sinks.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, AttentionConfig
from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.gpu.rope_cache import RotaryAngles, rope_and_cache

BLOCK_MULTIPLE = 256
MAX_SPLITS = 32
KEYS_A_SPLIT = 128  # fewer are not worth a split


class FlashAttentionMissingError(RuntimeError):
    """The package is not there, or was built for another torch."""


def load_flash_attention() -> ModuleType:
    """The module `flash_attn`. Raises `FlashAttentionMissingError` saying how to get it."""
    try:
        return importlib.import_module("flash_attn")
    except ImportError as error:
        raise FlashAttentionMissingError(
            "the flash_attn attention backend needs the package flash-attn "
            f"(pip install flash-attn --no-build-isolation): {error}"
        ) from error


class FlashAttention:
    """Decodes by `flash_attn_with_kvcache`, segments by `flash_attn_varlen_func`, both on the paged cache.

    Rotation and cache write of a decode are part of its one call, unless the model normalises q and k:
    then, and for segments, `rope_and_cache` goes before. The cache is [places, 2, blocks + 1, block_size,
    kv_heads, d], with a layer at its place in `places`; the last block is the padding rows', whose keys and
    values have to be written somewhere.
    """

    def __init__(self, config: AttentionConfig) -> None:
        """Raises `FlashAttentionMissingError`, or ValueError for what the kernels cannot do."""
        shape, block_size, dtype = config.shape, config.block_size, config.dtype
        if block_size % BLOCK_MULTIPLE:
            raise ValueError(f"block_size: the flash_attn backend needs a multiple of 256, not {block_size}")
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: the flash_attn backend needs bfloat16 or float16, not {dtype}")
        if shape.head_dim % 8 or shape.head_dim > 256:
            raise ValueError(f"head_dim: the flash_attn backend cannot do {shape.head_dim}")
        self.module = load_flash_attention()
        self.shape = shape
        self.norms = config.qk_norms
        self.num_blocks = config.num_blocks
        # A decode call wants angles for all that its block table could hold.
        self.max_blocks = -(-config.max_position // block_size)
        self.angles = RotaryAngles.up_to(self.max_blocks * block_size, config.inv_freq, shape.rotary_scale)
        self.cos, self.sin = self.angles.cos.to(dtype), self.angles.sin.to(dtype)
        pages = config.layer_pages
        # Zeroed: a padding row reads slots that were never written.
        self.cache = pages.blocks(2, (block_size, shape.num_kv_heads, shape.head_dim), spare=1)
        self.places = pages.places
        self.sms = 1
        if config.inv_freq.device.type == "cuda":
            self.sms = torch.cuda.get_device_properties(config.inv_freq.device).multi_processor_count

    def num_splits(self, batch_size: int) -> int:
        """How many programs share a sequence and KV head: as many as fill the GPU twice.

        Left alone the kernel decides by the width of the block table, which under a captured graph is that
        of the longest possible sequence; by that width or not, a step without a graph has to sum in the same
        order. A split beyond a sequence's end does nothing.
        """
        wanted = 2 * self.sms // (batch_size * self.shape.num_kv_heads)
        longest = self.max_blocks * self.cache.shape[3]
        return max(1, min(wanted, MAX_SPLITS, -(-longest // KEYS_A_SPLIT)))

    def begin_step(self, batch: AttentionBatch) -> FlashStep:
        return FlashStep(self, batch)


class FlashStep:
    """Computes one step's attention, layer by layer."""

    def __init__(self, backend: FlashAttention, batch: AttentionBatch) -> None:
        self._backend = backend
        self._batch = batch
        window = backend.shape.window
        self._window = (-1, -1) if window is None else (window - 1, 0)
        if batch.num_decodes:
            lens = batch.decode_lens.int()
            # A padding row writes a first token to the last block, which no sequence has.
            self._cached_lens = (lens - 1).clamp_(min=0)
            blocks = batch.decode_blocks[:, : backend.max_blocks].int()
            self._blocks = blocks.masked_fill((lens == 0).unsqueeze(1), backend.num_blocks)
            self._splits = backend.num_splits(batch.num_decodes)
        if batch.segment_table is not None and batch.num_decodes < batch.positions.shape[0]:
            self._segments = batch.segment_table
            ends = self._segments.context_lens.cumsum(0, dtype=torch.int32)
            self._context_starts = torch.nn.functional.pad(ends, (1, 0))

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        decodes = self._batch.num_decodes
        if decodes == qkv.shape[0]:
            return self._decode(layer, qkv)
        segments = self._prefill(layer, qkv[decodes:])
        return torch.cat((self._decode(layer, qkv[:decodes]), segments)) if decodes else segments

    def _decode(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [b, (heads + 2 * kv_heads) * d] -> [b, heads * d]."""
        backend, shape = self._backend, self._backend.shape
        keys, values = backend.cache[backend.places[layer]]
        common = {
            "block_table": self._blocks,
            "causal": True,
            "window_size": self._window,
            "softmax_scale": shape.scale,
            "num_splits": self._splits,
        }
        flash = backend.module.flash_attn_with_kvcache
        if backend.norms is None:
            heads, kv_heads = shape.num_heads, shape.num_kv_heads
            tokens = qkv.view(-1, 1, heads + 2 * kv_heads, shape.head_dim)
            q, k, v = tokens[:, :, :heads], tokens[:, :, heads:-kv_heads], tokens[:, :, -kv_heads:]
            out = flash(
                q,
                keys,
                values,
                k=k,
                v=v,
                rotary_cos=backend.cos,
                rotary_sin=backend.sin,
                rotary_interleaved=False,
                cache_seqlens=self._cached_lens,
                **common,
            )
        else:
            q = self._rotate(layer, qkv, slice(None, qkv.shape[0]))
            out = flash(q.unsqueeze(1), keys, values, cache_seqlens=self._cached_lens + 1, **common)
        attended: Tensor = out.view(qkv.shape[0], -1)
        return attended

    def _prefill(self, layer: int, qkv: Tensor) -> Tensor:
        """The segments' tokens. qkv: [m, (heads + 2 * kv_heads) * d] -> [m, heads * d]."""
        backend, table = self._backend, self._segments
        keys, values = backend.cache[backend.places[layer]]
        out: Tensor = backend.module.flash_attn_varlen_func(
            self._rotate(layer, qkv, slice(self._batch.num_decodes, None)),
            keys,
            values,
            cu_seqlens_q=table.starts,
            cu_seqlens_k=self._context_starts,
            max_seqlen_q=table.longest,
            max_seqlen_k=table.blocks.shape[1] * backend.cache.shape[3],
            causal=True,
            window_size=self._window,
            softmax_scale=backend.shape.scale,
            block_table=table.blocks,
        )
        return out.view(qkv.shape[0], -1)

    def _rotate(self, layer: int, qkv: Tensor, tokens: slice) -> Tensor:
        backend, batch = self._backend, self._batch
        keys, values = backend.cache[backend.places[layer]]
        return rope_and_cache(
            qkv,
            batch.positions[tokens],
            batch.slots[tokens],
            keys,
            values,
            KVScales(),
            backend.shape,
            backend.angles,
            backend.norms,
            layer,
            heads_first=False,
        )
