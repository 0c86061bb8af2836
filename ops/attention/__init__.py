"""Attention over the paged KV cache: what a backend offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The fixed sizes of a model's attention. `window`: tokens a query sees, or None for all."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class PrefillSegment:
    """Tokens [first, first + num_new) of the step belong to one sequence and are its last ones.

    `context_len` counts all its tokens including these; `blocks`: [ceil(context_len / block)] int64.
    """

    first: int
    num_new: int
    context_len: int
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The sequences of one step: `num_decodes` tokens of one sequence each, then the segments.

    positions, slots: [n] int64, slot = block * block_size + offset, where a token's keys and values go.
    decode_blocks: [num_decodes, width] int64, padded with any valid block; decode_lens: [num_decodes]
    int64, context length including the new token.
    """

    positions: Tensor
    slots: Tensor
    num_decodes: int
    decode_blocks: Tensor
    decode_lens: Tensor
    segments: tuple[PrefillSegment, ...]


class StepAttention(Protocol):
    """A backend bound to the sequences of one step."""

    def __call__(self, layer: int, qk: Tensor, v: Tensor) -> Tensor:
        """Rotate q and k (perhaps in place), write k and v to the cache, attend.

        qk: [n, heads + kv_heads, d], queries first, not yet rotated; v: [n, kv_heads, d]
        -> [n, heads * d].
        """
        ...


class AttentionBackend(Protocol):
    """Owns the KV cache's memory layout."""

    def begin_step(self, batch: AttentionBatch) -> StepAttention: ...
