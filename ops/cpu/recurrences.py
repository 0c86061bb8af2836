"""Names the kernels of layers with a state, by what their backends are made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from microvllm.ops.attention import AttentionBackend
from microvllm.ops.cpu.delta_rule import CpuDeltaRule
from microvllm.ops.cpu.mamba2 import CpuMamba2
from microvllm.ops.delta_rule import DeltaConfig
from microvllm.ops.mamba2 import Mamba2Config
from microvllm.ops.row_states import Recurrence

# Each takes the recurrence and `ops.cpu.operators.Kernels`.
RECURRENCES: Mapping[type[Recurrence], Callable[[Any, Any], AttentionBackend]] = {
    DeltaConfig: CpuDeltaRule,
    Mamba2Config: CpuMamba2,
}
