"""Attention of a model whose layers differ in their windows, rotations or heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import repeat

from torch import Tensor

from microvllm.ops.attention import AttentionBackend, AttentionBatch, SegmentTable, StepAttention


class MixedAttention:
    """One backend per kind, which computes the layers of that kind.

    kinds: each backend, and the numbers of the layers that it computes, in its own order. groups: of each
    layer of the model; those of a group have the same block tables.
    """

    def __init__(
        self, kinds: Sequence[tuple[AttentionBackend, Sequence[int]]], groups: Sequence[int]
    ) -> None:
        self.backends = [backend for backend, _ in kinds]
        self._steps: dict[tuple[int, int], int] = {}  # by kind and group
        self._places: dict[int, tuple[int, int]] = {}
        for kind, (_, layers) in enumerate(kinds):
            for place, layer in enumerate(layers):
                step = self._steps.setdefault((kind, groups[layer]), len(self._steps))
                self._places[layer] = step, place

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        batches = (batch, *batch.others)
        steps = [self.backends[kind].begin_step(batches[group]) for kind, group in self._steps]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            step, place = self._places[layer]
            return steps[step](place, qkv)

        return attend


def batch_of_groups(
    positions: Tensor,
    slots: Iterable[Tensor],
    decode_blocks: Iterable[Tensor],
    decode_lens: Tensor,
    segments: Sequence[SegmentTable] = (),
    rows: Tensor | None = None,
) -> AttentionBatch:
    """Return the batch of the first group of layers, with those of the others in it.

    As `AttentionBatch` has them, but of each group: slots, decode_blocks and, if there are any, segments.
    """
    batches = [
        AttentionBatch(positions, places, len(decode_lens), blocks, decode_lens, table, rows)
        for places, blocks, table in zip(slots, decode_blocks, segments or repeat(None), strict=False)
    ]
    return replace(batches[0], others=tuple(batches[1:])) if batches[1:] else batches[0]
