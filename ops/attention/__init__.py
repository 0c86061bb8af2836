"""Attention over the paged KV cache: what a backend offers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The fixed sizes of a model's attention.

    window: tokens a query sees, or None for all; rotary_scale: cos and sin are multiplied by it, which
    YaRN and LongRoPE temper the attention with.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    rotary_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class QKNorms:
    """RMSNorm over each head of q and of k before the rotation, as in Qwen3 (arXiv:2505.09388).

    weights: for each layer those of q and of k, each [d] in the activations' dtype.
    """

    weights: tuple[tuple[Tensor, Tensor], ...]
    eps: float


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

    @staticmethod
    def of(segments: tuple[PrefillSegment, ...], device: torch.device) -> SegmentTable:
        """Of segments that follow each other, as in an `AttentionBatch`."""
        lengths = [segment.num_new for segment in segments]
        width = max((len(segment.blocks) for segment in segments), default=0)
        blocks = torch.zeros(len(segments), width, dtype=torch.int32, device=device)
        for row, segment in zip(blocks, segments, strict=True):
            row[: len(segment.blocks)] = segment.blocks
        return SegmentTable(
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            torch.tensor([s.context_len for s in segments], dtype=torch.int32, device=device),
            blocks,
            max(lengths, default=0),
        )

    def unpacked(self, first: int, block_size: int) -> tuple[PrefillSegment, ...]:
        """One by one, with tokens; `first`: the step's first token that is no decode."""
        starts, contexts = self.starts.tolist(), self.context_lens.tolist()
        return tuple(
            PrefillSegment(first + start, end - start, context, blocks[: -(-context // block_size)])
            for (start, end), context, blocks in zip(pairwise(starts), contexts, self.blocks, strict=True)
            if start < end
        )


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The sequences of one step: `num_decodes` tokens of one sequence each, then the segments.

    positions, slots: [n] int64, slot = block * block_size + offset, where a token's keys and values go.
    decode_blocks: [num_decodes, width] int64, padded with any valid block; decode_lens: [num_decodes]
    int64, context length including the new token. From one step to the next the values of positions, slots
    and decode_lens may change in place.

    Where there is a `segment_table` it stands for `segments`. On a GPU all of these may be int32 as well, a
    slot of -1 is not written, and a decode_len of 0 marks a row that only pads a captured batch (its output
    is finite).
    """

    positions: Tensor
    slots: Tensor
    num_decodes: int
    decode_blocks: Tensor
    decode_lens: Tensor
    segments: tuple[PrefillSegment, ...]
    segment_table: SegmentTable | None = None


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
