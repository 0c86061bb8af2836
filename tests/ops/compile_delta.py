"""Compiles kernels of layers with a state for compute capability 9.0, in sizes of real models; takes no GPU.

Prints the shared memory of each, one JSON object a kernel. Run by test_delta_compiles.py in its own process.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from compile_for_hopper import Hopper
from triton.runtime import driver
from triton.runtime.jit import JITFunction


def main() -> None:
    driver.set_active(Hopper())  # type: ignore[arg-type]
    from microvllm.ops.attention import AttentionBatch, SegmentTable
    from microvllm.ops.delta_rule import DeltaConfig, DeltaWeights
    from microvllm.ops.gpu.delta_rule import GpuDeltaRule
    from microvllm.ops.gpu.mamba2 import GpuMamba2
    from microvllm.ops.mamba2 import Mamba2Config, Mamba2Weights

    def compile_only(self: Any, grid: Any) -> Any:
        def compiled(*args: Any, **options: Any) -> None:
            kernel = JITFunction.run(self, *args, grid=grid, warmup=True, **options)
            waits = kernel.asm["ptx"].count("griddepcontrol.wait")
            print(json.dumps({"name": self.fn.__name__, "shared": kernel.metadata.shared, "waits": waits}))

        return compiled

    JITFunction.__getitem__ = compile_only  # type: ignore[method-assign]

    def index(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    # Qwen3.5's.
    heads, size = (16, 32), 128
    channels = (2 * heads[0] + heads[1]) * size
    weights = DeltaWeights(*(torch.zeros(shape) for shape in ((channels, 4), heads[1:], heads[1:], (size,))))
    states = GpuDeltaRule(DeltaConfig(*heads, size, size, 1e-6, 3, (weights,)), torch.bfloat16, pdl=True)
    table = SegmentTable(index(33), index(32), index(32, 4), 100)
    batch = AttentionBatch(index(102), index(102), 2, index(2, 4), index(2), table, index(34))
    width = channels + heads[1] * size + 2 * heads[1]
    states.begin_step(batch)(0, torch.zeros(102, width, dtype=torch.bfloat16))
    # Those of Nemotron Nano 9B v2.
    sizes = 128, 80, 8, 128
    inner, channels = 128 * 80, 128 * 80 + 2 * 8 * 128
    vectors = (torch.zeros(count) for count in (channels, *[128] * 3, inner))
    layer = Mamba2Weights(torch.zeros(channels, 4), *vectors)
    mamba = GpuMamba2(Mamba2Config(*sizes, 1e-5, 3, (layer,)), torch.bfloat16, pdl=True)
    mamba.begin_step(batch)(0, torch.zeros(102, channels + inner + 128, dtype=torch.bfloat16))


if __name__ == "__main__":
    main()
