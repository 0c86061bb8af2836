"""Compiles the kernels of `ops.gpu.stream` for compute capability 9.0, which takes no GPU.

Prints what of their loads lies where, one JSON object a kernel. Run by test_stream_compiles.py in a process
of its own.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Hopper:
    """As much of a driver as compilation calls."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def report(kernel: Any, *, gated: bool, stages: int) -> None:
    before, _, after = kernel.asm["ptx"].partition("griddepcontrol.wait")
    print(
        json.dumps(
            {
                "gated": gated,
                "stages": stages,
                "copies before the wait": before.count("cp.async.bulk.tensor"),
                "copies after the wait": after.count("cp.async.bulk.tensor"),
                "products": len(re.findall(r"wgmma\.mma_async\S*m64n8k16", after)),
                "shared memory": kernel.metadata.shared,
            }
        )
    )


def main() -> None:
    driver.set_active(Hopper())  # type: ignore[arg-type]
    from microvllm.ops.gpu.stream import StreamedWeight
    from microvllm.ops.gpu.tiling import Tiling

    compiled: list[Any] = []

    def compile_only(self: Any, grid: Any) -> Any:
        return lambda *args, **options: compiled.append(
            JITFunction.run(self, *args, grid=grid, warmup=True, **options)
        )

    JITFunction.__getitem__ = compile_only  # type: ignore[method-assign]
    for gated, tiling in ((False, Tiling(64, 128, 4, 3)), (True, Tiling(64, 64, 4, 4, splits=2))):
        weight = torch.zeros(256, 512, dtype=torch.bfloat16)
        residual = torch.zeros(5, 128 if gated else 256, dtype=torch.bfloat16)
        product = StreamedWeight(weight, torch.zeros(8, dtype=torch.int32), {}, gated=gated, pdl=True)
        product(torch.zeros(5, 512, dtype=torch.bfloat16), tiling, None, residual)
        report(compiled[-1], gated=gated, stages=tiling.stages)


if __name__ == "__main__":
    main()
