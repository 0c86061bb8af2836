"""Layers of a gated delta rule by the kernels of this folder."""

from __future__ import annotations

from typing import Any

import torch

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.cpu.state_kernel import KernelStep, StateKernel
from microvllm.ops.delta_rule import L2_EPS, DeltaConfig, RowStates


class CpuDeltaRule(RowStates):
    """See `ops.delta_rule.TorchDeltaRule`; a token has the same bits in any batch and any chunk."""

    def __init__(self, config: DeltaConfig, kernels: Any) -> None:
        """kernels: see `ops.cpu.state_kernel.StateKernel`."""
        super().__init__(config, torch.float32)
        layers = [
            (layer.conv.T.contiguous(), *layer[1:], self.conv[index], self.delta[index])
            for index, layer in enumerate(self.layers)
        ]
        heads = config.num_key_heads, config.num_value_heads
        sizes = *heads, config.key_dim, config.value_dim, config.conv_size
        self._kernel = StateKernel(kernels, "delta_rule", layers, sizes, (config.eps, L2_EPS), config.values)

    def begin_step(self, batch: AttentionBatch) -> KernelStep:
        return self._kernel.begin_step(batch)
