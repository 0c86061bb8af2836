"""Attention whose output is multiplied by a sigmoid of the layer's input (arXiv:2505.06708)."""

from __future__ import annotations

from torch import Tensor

from microvllm.ops.attention import AttentionBackend, AttentionBatch, StepAttention


class GatedAttention:
    """A backend of which each token brings as many gates as it gets outputs: behind its q, k and v.

    width: of q, k and v together.
    """

    def __init__(self, backend: AttentionBackend, width: int) -> None:
        self._backend, self._width = backend, width

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        attend = self._backend.begin_step(batch)

        def gated(layer: int, qkv: Tensor) -> Tensor:
            out = attend(layer, qkv[:, : self._width].contiguous())
            return out.mul_(qkv[:, self._width :].sigmoid())

        return gated
