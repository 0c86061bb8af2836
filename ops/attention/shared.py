"""Attention of layers that read the keys and values of an earlier one (Gemma 3n, Gemma 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBackend, AttentionBatch, StepAttention


def sharing(backend: AttentionBackend, sources: Sequence[int | None]) -> AttentionBackend:
    """The backend of layers of which some have a source; itself if none has."""
    found = {layer: source for layer, source in enumerate(sources) if source is not None}
    return SharedAttention(backend, found) if found else backend


class SharedAttention:
    """A backend of the layers that have a cache, and of those that share it.

    sources: the layer that each layer without a cache of its own reads from, which is computed before it and
    has queries of the same shape. Within a step the source's keys and values of the new tokens are kept, and
    are attended to by the source's own rules: a backend needs no other kernel, but writes them again.
    """

    def __init__(self, backend: AttentionBackend, sources: Mapping[int, int]) -> None:
        self._backend, self._sources = backend, sources
        self._read = frozenset(sources.values())

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        step = self._backend.begin_step(batch)
        kept: dict[int, Tensor] = {}

        def attend(layer: int, qkv: Tensor) -> Tensor:
            """qkv of a layer with a source: [n, heads * d], its queries alone."""
            source = self._sources.get(layer)
            if source is not None:
                return step(source, torch.cat((qkv, kept[source]), 1))
            if layer not in self._read:
                return step(layer, qkv)
            whole = qkv.clone()  # the backend may overwrite it
            attended = step(layer, qkv)
            kept[layer] = whole[:, attended.shape[1] :]
            return attended

        return attend
