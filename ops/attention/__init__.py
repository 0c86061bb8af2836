"""The interface of attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.attention.pages import LayerPages


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The fixed sizes of a model's attention.

    window: tokens a query sees, or None for all; rotary_scale: cos and sin are multiplied by it, the
    attention temperature of YaRN and LongRoPE. score_scale: head_dim ** -0.5 if None; softcap: scores become
    cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118).
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    rotary_scale: float = 1.0
    score_scale: float | None = None
    softcap: float | None = None

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale


@dataclass(frozen=True, slots=True)
class QKNorms:
    """RMSNorm over each head of q and of k before the rotation, as in Qwen3 (arXiv:2505.09388).

    weights: for each layer those of q and of k, each [d] in the activations' dtype.
    """

    weights: tuple[tuple[Tensor, Tensor], ...]
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """What a backend is made for: a model's attention, and its KV cache.

    num_blocks, block_size: of the cache, which is of `dtype` on the device of `inv_freq`: [d / 2], the angle
    per position of each pair of a head's elements. max_position: no position is larger. scales: of each
    layer, for a cache of float8_e4m3fn; all 1 if there are none. sinks: of each layer, [heads] float32, the
    score of a key of each head that has no value (gpt-oss, arXiv:2508.10925); none if empty. pages: the
    cache, which may hold other layers, too; if there are none the backend has a cache for its own.
    """

    shape: AttentionShape
    num_blocks: int
    block_size: int
    inv_freq: Tensor
    max_position: int
    dtype: torch.dtype
    qk_norms: QKNorms | None = None
    scales: tuple[KVScales, ...] = ()
    sinks: tuple[Tensor, ...] = ()
    pages: LayerPages | None = None

    @property
    def layer_pages(self) -> LayerPages:
        """Where the layers lie in the cache."""
        sizes = self.shape.num_layers, 2 * self.shape.num_kv_heads * self.shape.head_dim, self.num_blocks
        return self.pages or LayerPages.own(*sizes, self.block_size, self.dtype, self.inv_freq.device)


class AttentionWeights(NamedTuple):
    """One layer's part of `AttentionConfig`; qk_norm and sinks may be missing."""

    qk_norm: tuple[Tensor, Tensor] | None
    sinks: Tensor | None
    scales: KVScales


class BackendConfig(NamedTuple):
    """What the backend of a mixer's layers is made for, beside their weights.

    pages: where the layers lie in the KV cache; max_position: no position is larger; rows: how many have
    states; eps: of the model's norms.
    """

    pages: LayerPages
    max_position: int
    rows: int
    eps: float


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """Prefill segments as arrays on the device, for kernels that take all of them in one launch.

    All are int32, or, on a CPU, int64. starts: [s + 1], where each segment's new tokens begin, counted from
    the step's first token that is no decode, and where the last one's end; equal neighbours are an empty
    segment, which is padding. context_lens: [s]; blocks: [s, width], padded with any valid block; longest:
    no segment has more new tokens.
    """

    starts: Tensor
    context_lens: Tensor
    blocks: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The sequences of one step: `num_decodes` tokens of one sequence each, then the segments.

    positions, slots: [n] int64, slot = block * block_size + offset, where a token's keys and values go.
    decode_blocks: [num_decodes, width] int64, padded with any valid block; decode_lens: [num_decodes]
    int64, context length including the new token. From one step to the next the values of positions, slots
    and decode_lens may change in place. segment_table: needed if there are more tokens than decodes.

    rows: [num_decodes + segments], the row of each sequence, at which layers with a state keep it. others:
    the same tokens in the blocks of further groups of layers, where layers differ in their windows. Table
    entries of blocks that lie wholly behind the window are never read.

    On a GPU all of these may be int32 as well, a slot of -1 is not written, and a decode_len of 0 marks a row
    that only pads a captured batch (its output is finite).
    """

    positions: Tensor
    slots: Tensor
    num_decodes: int
    decode_blocks: Tensor
    decode_lens: Tensor
    segment_table: SegmentTable | None = None
    rows: Tensor | None = None
    others: tuple[AttentionBatch, ...] = ()


class StepAttention(Protocol):
    """A backend bound to the sequences of one step."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Normalise q and k if the backend has norms, rotate them, write k and v to the cache, attend.

        qkv: [n, (heads + 2 * kv_heads) * d], queries, keys, values; perhaps overwritten -> [n, heads * d].
        """
        ...


class AttentionBackend(Protocol):
    """Owns the KV cache's memory layout."""

    def begin_step(self, batch: AttentionBatch) -> StepAttention: ...
