"""Layers of a gated delta rule on a GPU: an attention backend of kernels that CUDA graphs can capture."""

from __future__ import annotations

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.delta_rule import DeltaConfig, RowStates
from microvllm.ops.gpu.delta_decode import decode
from microvllm.ops.gpu.delta_prefill import prefill
from microvllm.ops.row_states import rows_of


class GpuDeltaRule(RowStates):
    """See `ops.delta_rule.TorchDeltaRule`. A decode of context length 0 is padding and writes no state."""

    def __init__(self, config: DeltaConfig, dtype: torch.dtype, *, pdl: bool) -> None:
        super().__init__(config, dtype)
        self.pdl = pdl

    def begin_step(self, batch: AttentionBatch) -> GpuDeltaStep:
        return GpuDeltaStep(self, batch)


class GpuDeltaStep:
    """Computes one step, layer by layer; reads nothing of it on the host."""

    def __init__(self, states: GpuDeltaRule, batch: AttentionBatch) -> None:
        rows_of(batch)
        self._states, self._batch = states, batch

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [n, channels + values + 2 Hv], q, k, v, z, b and a of each token -> [n, values]."""
        states, batch, config = self._states, self._batch, self._states.config
        qkv = qkv.contiguous()
        mixed, out = qkv.new_empty(len(qkv), config.channels), qkv.new_empty(len(qkv), config.values)
        if batch.num_decodes:
            decode(states, layer, qkv, batch, mixed, out, pdl=states.pdl)
        if batch.num_decodes < len(qkv):
            prefill(states, layer, qkv, batch, mixed, out, pdl=states.pdl)
        return out
