"""Names the kernels of layers with a state, by what their backends are made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from microvllm.ops.attention import AttentionBackend
from microvllm.ops.delta_rule import DeltaConfig
from microvllm.ops.gpu.delta_rule import GpuDeltaRule
from microvllm.ops.gpu.mamba2 import GpuMamba2
from microvllm.ops.mamba2 import Mamba2Config
from microvllm.ops.row_states import Recurrence

# Each takes the recurrence, the activations' dtype, and `pdl`.
RECURRENCES: Mapping[type[Recurrence], Callable[..., AttentionBackend]] = {
    DeltaConfig: GpuDeltaRule,
    Mamba2Config: GpuMamba2,
}
