"""Attention over latent keys and values (MLA, arXiv:2405.04434): one cached vector a token for all heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, StepAttention
from microvllm.ops.rotary import RotaryTable, apply_rotary

MAX_SCORES = 1 << 24  # computed at a time in a prefill


@dataclass(frozen=True, slots=True)
class LatentShape:
    """The fixed sizes: keys of `rank` + `rope_dim` elements, of which the last are rotated, by halves.

    The first `rank` are the values, too. scale: of scores; rotary_scale: cos and sin are multiplied by it.
    """

    num_layers: int
    num_heads: int
    rank: int
    rope_dim: int
    scale: float
    rotary_scale: float = 1.0

    @property
    def key_dim(self) -> int:
        return self.rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """What a backend is made for: as `ops.attention.AttentionConfig`; inv_freq: [rope_dim / 2]."""

    shape: LatentShape
    num_blocks: int
    block_size: int
    inv_freq: Tensor
    max_position: int
    dtype: torch.dtype

    def check(self) -> None:
        """Raise ValueError for a cache in a type that no backend has."""
        if self.dtype.itemsize == 1:
            raise ValueError("--kv-cache-dtype fp8: latent keys and values are not cached in it")


class TorchLatentAttention:
    """Plain torch: gathers the blocks of a sequence. The cache is [layers, blocks, block_size, key_dim]."""

    def __init__(self, config: LatentConfig, activation_dtype: torch.dtype) -> None:
        """Raises ValueError as `LatentConfig.check` does."""
        config.check()
        shape = config.shape
        self.shape, self.activation_dtype = shape, activation_dtype
        device = config.inv_freq.device
        self.rotary = RotaryTable(config.inv_freq, config.max_position, activation_dtype, shape.rotary_scale)
        # Zeroed, because a padded row multiplies whatever lies in its slots by zero weight.
        sizes = shape.num_layers, config.num_blocks, config.block_size, shape.key_dim
        self.cache = torch.zeros(sizes, dtype=config.dtype, device=device)

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        return TorchLatentStep(self, batch)


class TorchLatentStep:
    """Computes one step's attention, layer by layer."""

    def __init__(self, backend: TorchLatentAttention, batch: AttentionBatch) -> None:
        self._backend, self._batch = backend, batch
        # (first token, last token + 1, context, blocks) of each segment, tokens counted in the step.
        self._segments: list[tuple[int, int, int, Tensor]] = []
        if (table := batch.segment_table) is not None:
            ends = [batch.num_decodes + start for start in table.starts.tolist()]
            for (first, stop), context, blocks in zip(
                pairwise(ends), table.context_lens.tolist(), table.blocks, strict=True
            ):
                if first < stop:
                    count = -(-context // backend.cache.shape[2])
                    self._segments.append((first, stop, context, blocks[:count]))

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [n, (heads + 1) key_dim], queries and key, perhaps overwritten -> [n, heads * rank]."""
        shape, batch, cache = self._backend.shape, self._batch, self._backend.cache[layer]
        qk = qkv.view(len(qkv), shape.num_heads + 1, shape.key_dim)
        qk[..., shape.rank :] = apply_rotary(qk[..., shape.rank :], *self._rotation)
        q, key = qk[:, :-1], qk[:, -1]
        cache.view(-1, shape.key_dim).index_copy_(0, batch.slots, key.to(cache.dtype))
        out = torch.empty(len(q), shape.num_heads, shape.rank, dtype=qkv.dtype, device=qkv.device)
        decodes = batch.num_decodes
        if decodes:
            keys = cache.index_select(0, batch.decode_blocks.flatten())
            keys = keys.view(decodes, -1, shape.key_dim).to(q.dtype)
            out[:decodes] = self._attend(q[:decodes], keys, self._decode_mask)
        for first, stop, context, blocks in self._segments:
            keys = cache.index_select(0, blocks).view(1, -1, shape.key_dim)[:, :context].to(q.dtype)
            step = max(1, MAX_SCORES // (shape.num_heads * context))
            at = torch.arange(context, device=q.device)
            for start in range(first, stop, step):
                end = min(stop, start + step)
                # All heads of all these queries over one sequence's keys.
                positions = context - stop + torch.arange(start, end, device=q.device)
                hidden = (at > positions[:, None]).repeat_interleave(shape.num_heads, 0)
                mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
                rows = q[start:end].reshape(1, -1, shape.key_dim)
                attended = self._attend(rows, keys, mask.masked_fill_(hidden, -torch.inf))
                out[start:end] = attended.view(end - start, shape.num_heads, shape.rank)
        return out.flatten(1)

    def _attend(self, q: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """q: [b, m, key_dim], keys: [b, t, key_dim] -> [b, m, rank]; mask: added to scores [b, m, t]."""
        shape = self._backend.shape
        scores = torch.bmm(q, keys.transpose(1, 2)) * shape.scale + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights, keys[..., : shape.rank])

    @cached_property
    def _rotation(self) -> tuple[Tensor, Tensor]:
        return self._backend.rotary.at(self._batch.positions)

    @cached_property
    def _decode_mask(self) -> Tensor:
        """0 where a key is visible and -inf where not: [b, 1, width * block_size]."""
        batch, block_size = self._batch, self._backend.cache.shape[2]
        at = torch.arange(batch.decode_blocks.shape[1] * block_size, device=batch.slots.device)
        hidden = at >= batch.decode_lens[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._backend.activation_dtype, device=hidden.device)
        return mask.masked_fill_(hidden, -torch.inf).unsqueeze(1)
