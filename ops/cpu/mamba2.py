"""Layers of Mamba-2 by the kernels of this folder."""

from __future__ import annotations

from typing import Any

import torch

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.cpu.state_kernel import KernelStep, StateKernel
from microvllm.ops.mamba2 import Mamba2Config, Mamba2States


class CpuMamba2(Mamba2States):
    """See `ops.mamba2.TorchMamba2`; a token has the same bits in any batch and any chunk."""

    def __init__(self, config: Mamba2Config, kernels: Any) -> None:
        """kernels: see `ops.cpu.state_kernel.StateKernel`."""
        super().__init__(config, torch.float32)
        layers = [
            (layer.conv.T.contiguous(), *layer[1:], self.conv[index], self.ssm[index])
            for index, layer in enumerate(self.layers)
        ]
        sizes = config.num_heads, config.head_dim, config.num_groups, config.state_size, config.conv_size
        self._kernel = StateKernel(kernels, "mamba2", layers, sizes, (config.eps,), config.inner)

    def begin_step(self, batch: AttentionBatch) -> KernelStep:
        return self._kernel.begin_step(batch)
