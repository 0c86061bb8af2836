"""Paged attention in plain torch: runs anywhere, and is the reference of every other backend."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from microvllm.ops.attention import AttentionBatch, AttentionConfig, AttentionShape, SegmentTable
from microvllm.ops.attention.e4m3 import E4M3, KVScales, storable, to_e4m3
from microvllm.ops.norm import rms_norm
from microvllm.ops.rotary import RotaryTable, apply_rotary


class HeadMajorCache:
    """What a model's attention consists of between two steps, where a head's tokens lie side by side.

    The cache is [places, 2 * kv_heads, blocks, block_size, d], keys before values, and in memory [places,
    blocks, 2 * kv_heads, block_size, d]: the keys and values of a block are one run, whichever blocks a
    sequence has, and a layer's blocks lie in few huge pages. A layer's place is that in `places`.
    """

    def __init__(self, config: AttentionConfig, activation_dtype: torch.dtype | None = None) -> None:
        """activation_dtype: that of the cache if not given."""
        shape, inv_freq, dtype = config.shape, config.inv_freq, config.dtype
        self.shape = shape
        self.qk_norms = config.qk_norms
        self.block_size = config.block_size
        self.activation_dtype = activation_dtype or dtype
        self.rotary = RotaryTable(inv_freq, config.max_position, self.activation_dtype, shape.rotary_scale)
        # Zeroed, because a padded row multiplies whatever lies in its slots by zero weight, and
        # 0 * NaN is NaN.
        pages = config.layer_pages
        block = 2 * shape.num_kv_heads, config.block_size, shape.head_dim
        self.cache = pages.blocks(1, block)[:, 0].transpose(1, 2)
        self.places = pages.places
        self.scales = config.scales or (KVScales(),) * shape.num_layers
        self.sinks = config.sinks

    def layer(self, layer: int) -> Tensor:
        """The keys and values of a layer: [2 * kv_heads, blocks, block_size, d]."""
        return self.cache[self.places[layer]]


class TorchAttention(HeadMajorCache):
    """Gathers the blocks of a sequence, then attends to them as to a dense cache."""

    def begin_step(self, batch: AttentionBatch) -> TorchStep:
        return TorchStep(self, batch)


class _Segment(NamedTuple):
    """Tokens [first, first + num_new) of the step are the last ones of a sequence of `context_len`.

    It begins with the first block that one of them sees.
    """

    first: int
    num_new: int
    context_len: int
    blocks: Tensor

    @staticmethod
    def all_of(table: SegmentTable | None, first: int, block_size: int, window: int | None) -> list[_Segment]:
        """Those that have tokens; first: the step's first token that is no decode."""
        if table is None:
            return []
        found = []
        starts, contexts = table.starts.tolist(), table.context_lens.tolist()
        for (start, end), context, blocks in zip(pairwise(starts), contexts, table.blocks, strict=True):
            if start < end:
                seen = 0 if window is None else max(0, context - (end - start) - window + 1) // block_size
                blocks = blocks[seen : -(-context // block_size)]
                found.append(_Segment(first + start, end - start, context - seen * block_size, blocks))
        return found


class _DecodeKeys(NamedTuple):
    """blocks: [b, m]; mask: [kv_heads * b, 1, m * block_size], 0 where a key is seen and -inf where not."""

    blocks: Tensor
    mask: Tensor


class TorchStep:
    """Computes one step's attention, layer by layer."""

    def __init__(self, backend: TorchAttention, batch: AttentionBatch) -> None:
        self._backend = backend
        self._batch = batch
        sizes = backend.block_size, backend.shape.window
        self._segments = _Segment.all_of(batch.segment_table, batch.num_decodes, *sizes)
        self._segment_masks = [self._make_segment_mask(segment) for segment in self._segments]

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        decodes = self._batch.num_decodes
        q = self._rotate_and_cache(layer, qkv)
        if decodes == q.shape[0]:
            return self._decode(layer, q)
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        if decodes:
            out[:decodes] = self._decode(layer, q[:decodes])
        for segment, mask in zip(self._segments, self._segment_masks, strict=True):
            end = segment.first + segment.num_new
            out[segment.first : end] = self._prefill(layer, q[segment.first : end], segment, mask)
        return out

    def _rotate_and_cache(self, layer: int, qkv: Tensor) -> Tensor:
        """Rotated queries: [n, heads, d], after keys and values went to their slots."""
        shape, norms = self._backend.shape, self._backend.qk_norms
        heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        qkv = qkv.view(-1, heads + 2 * kv_heads, dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if norms is not None:
            q_norm, k_norm = norms.weights[layer]
            q, k = qk[:, :heads], qk[:, heads:]
            qk = torch.cat((rms_norm(q, q_norm, norms.eps), rms_norm(k, k_norm, norms.eps)), 1)
        qk = apply_rotary(qk, *self._rotation)
        cache, slots, size = self._backend.layer(layer), self._batch.slots, self._backend.block_size
        blocks, offsets, parts = slots // size, slots % size, storable(cache).view(2, -1, *cache.shape[1:])
        for part, x, scale in zip(parts, (qk[:, heads:], v), self._backend.scales[layer], strict=True):
            x = to_e4m3(x, scale) if cache.dtype == E4M3 else x.to(cache.dtype)
            part[:, blocks, offsets] = storable(x).transpose(0, 1)
        return qk[:, :heads]

    def _gather(self, layer: int, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """blocks: [m] -> keys and values of these blocks, [2, kv_heads, m * block_size, d]."""
        kv_heads, dim = self._backend.shape.num_kv_heads, self._backend.shape.head_dim
        cache, scales = self._backend.layer(layer), self._backend.scales[layer]
        runs = cache.flatten(2).index_select(1, blocks)
        gathered = runs.view(2, kv_heads, -1, dim).to(dtype)
        for part, scale in zip(gathered, scales, strict=True):
            if scale != 1.0:
                part *= scale
        return gathered

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        """One query a sequence, all sequences at once. q: [b, heads, d] -> [b, heads * d]."""
        shape = self._backend.shape
        b, kv_heads, dim = q.shape[0], shape.num_kv_heads, shape.head_dim
        group = shape.num_heads // kv_heads
        gathered = self._gather(layer, self._decode_keys.blocks.view(-1), q.dtype)
        keys, values = gathered.view(2, kv_heads * b, -1, dim)
        # Query heads that share a KV head are the rows of one small matrix product.
        grouped = q.reshape(b, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads * b, group, dim)
        if shape.softcap is None:
            mask = self._decode_keys.mask
            scores = torch.baddbmm(mask, grouped, keys.transpose(1, 2), alpha=shape.scale)
        else:
            scores = capped(torch.bmm(grouped, keys.transpose(1, 2)) * shape.scale, shape.softcap)
            scores += self._decode_keys.mask
        sinks = None
        if self._backend.sinks:
            sinks = self._backend.sinks[layer].view(kv_heads, 1, group, 1).expand(-1, b, -1, -1).flatten(0, 1)
        weights = softmax(scores, sinks).to(q.dtype)
        out = torch.bmm(weights, values).view(kv_heads, b, group * dim)
        return out.transpose(0, 1).reshape(b, -1)

    def _prefill(self, layer: int, q: Tensor, segment: _Segment, mask: Tensor | None) -> Tensor:
        """The new tokens of one sequence. q: [m, heads, d] -> [m, heads * d]."""
        gathered = self._gather(layer, segment.blocks, q.dtype)[:, :, : segment.context_len]
        keys, values = gathered.unsqueeze(1)
        shape, queries = self._backend.shape, q.transpose(0, 1).unsqueeze(0)
        if shape.softcap is None and not self._backend.sinks:
            out = scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=mask is None, scale=shape.scale, enable_gqa=True
            )
        else:
            sinks = self._backend.sinks[layer].view(-1, 1, 1) if self._backend.sinks else None
            out = explicit_attention(queries, keys, values, mask, shape, sinks)
        return out.squeeze(0).transpose(0, 1).reshape(q.shape[0], -1)

    @cached_property
    def _rotation(self) -> tuple[Tensor, Tensor]:
        return self._backend.rotary.at(self._batch.positions)

    @cached_property
    def _decode_keys(self) -> _DecodeKeys:
        """All blocks; with a window those that it reaches into, from the first on that is seen."""
        batch, shape, size = self._batch, self._backend.shape, self._backend.block_size
        blocks, lens = batch.decode_blocks, batch.decode_lens[:, None]
        at = torch.arange(blocks.shape[1] * size, device=batch.slots.device)
        hidden = at >= lens
        if shape.window is not None:
            begin = (lens - shape.window).clamp_(min=0)
            columns = torch.arange(min(blocks.shape[1], (shape.window - 2) // size + 2), device=at.device)
            columns = columns + begin // size
            blocks = blocks.gather(1, columns.clamp(max=blocks.shape[1] - 1))
            at = (columns[:, :, None] * size + at[:size]).flatten(1)
            hidden = (at >= lens) | (at < begin)
        mask = torch.zeros(hidden.shape, dtype=self._backend.activation_dtype, device=hidden.device)
        mask.masked_fill_(hidden, -torch.inf)
        return _DecodeKeys(blocks, mask.repeat(shape.num_kv_heads, 1).unsqueeze(1))

    def _make_segment_mask(self, segment: _Segment) -> Tensor | None:
        """True where query i sees key j: [num_new, context_len]; None for plain causal from the start."""
        window = self._backend.shape.window
        if segment.num_new == segment.context_len and (window is None or segment.context_len <= window):
            return None
        device = self._batch.slots.device
        keys = torch.arange(segment.context_len, device=device)
        queries = keys[segment.context_len - segment.num_new :, None]
        seen = keys <= queries
        if window is not None:
            seen &= keys > queries - window
        return seen


def capped(scores: Tensor, cap: float) -> Tensor:
    """Bound scores smoothly to (-cap, cap)."""
    return (scores / cap).tanh_() * cap


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """[..., rows, keys] -> weights in float32, which leave a part to a sink, [..., rows or 1, 1]."""
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32)
    sinks = sinks.expand(*scores.shape[:-1], 1)
    return torch.cat((scores.float(), sinks), -1).softmax(-1)[..., :-1]


def explicit_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    shape: AttentionShape,
    sinks: Tensor | None,
) -> Tensor:
    """As `scaled_dot_product_attention`, which has neither caps nor sinks, [heads, 1, 1].

    mask: None is causal from the start.
    """
    groups = shape.num_heads // shape.num_kv_heads
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = q @ keys.transpose(-1, -2) * shape.scale
    if shape.softcap is not None:
        scores = capped(scores, shape.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
    weights = softmax(scores.masked_fill(~mask, -torch.inf), sinks)
    return weights.to(values.dtype) @ values
