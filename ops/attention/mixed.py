"""Attention of a model whose layers differ in their windows, rotations or heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import repeat

from torch import Tensor

from microvllm.ops.attention import AttentionBackend, AttentionBatch, SegmentTable, StepAttention


class MixedAttention:
    """One backend per kind, which holds the KV cache of that kind's layers.

    kinds: each backend, the numbers of the layers that it computes, in the order of its own cache, and the
    pool that hands out its blocks. Kinds of one pool have the same block tables.
    """

    def __init__(self, kinds: Sequence[tuple[AttentionBackend, Sequence[int], int]]) -> None:
        self._kinds = [(backend, pool) for backend, _, pool in kinds]
        self._places = {
            layer: (kind, place)
            for kind, (_, layers, _) in enumerate(kinds)
            for place, layer in enumerate(layers)
        }

    @property
    def backends(self) -> list[AttentionBackend]:
        """One for each kind."""
        return [backend for backend, _ in self._kinds]

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        batches = (batch, *batch.others)
        steps = [backend.begin_step(batches[pool]) for backend, pool in self._kinds]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            kind, place = self._places[layer]
            return steps[kind](place, qkv)

        return attend


def batch_of_pools(
    positions: Tensor,
    slots: Iterable[Tensor],
    decode_blocks: Iterable[Tensor],
    decode_lens: Tensor,
    segments: Sequence[SegmentTable] = (),
    rows: Tensor | None = None,
) -> AttentionBatch:
    """Return the batch of the first pool, with those of the others in it.

    As `AttentionBatch` has them, but of each pool: slots, decode_blocks and, if there are any, segments.
    """
    batches = [
        AttentionBatch(positions, places, len(decode_lens), blocks, decode_lens, table, rows)
        for places, blocks, table in zip(slots, decode_blocks, segments or repeat(None), strict=False)
    ]
    return replace(batches[0], others=tuple(batches[1:])) if batches[1:] else batches[0]
