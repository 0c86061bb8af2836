"""Attention of a model whose layers differ in their windows, rotations or heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from microvllm.ops.attention import AttentionBackend, AttentionBatch, StepAttention


class MixedAttention:
    """One backend per kind, which holds the KV cache of that kind's layers.

    kinds: each backend and the numbers of the layers that it computes, in the order of its own cache.
    """

    def __init__(self, kinds: Sequence[tuple[AttentionBackend, Sequence[int]]]) -> None:
        self._backends = [backend for backend, _ in kinds]
        self._places = {
            layer: (kind, place)
            for kind, (_, layers) in enumerate(kinds)
            for place, layer in enumerate(layers)
        }

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        steps = [backend.begin_step(batch) for backend in self._backends]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            kind, place = self._places[layer]
            return steps[kind](place, qkv)

        return attend
