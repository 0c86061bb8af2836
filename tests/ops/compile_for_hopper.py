"""Compiles the kernels of `ops.gpu.stream` for compute capability 9.0, which takes no GPU.

Prints what of their loads lies where, one JSON object a kernel. Run by test_stream_compiles.py in a process
of its own.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "gpu"))


class Hopper:
    """As much of a driver as compilation calls."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def report(kernel: Any, *, codes: bool, gated: bool, stages: int) -> None:
    from count_instructions import resources

    used = resources(kernel)
    before, _, after = kernel.asm["ptx"].partition("griddepcontrol.wait")
    print(
        json.dumps(
            {
                "codes": codes,
                "gated": gated,
                "stages": stages,
                "copies before the wait": before.count("cp.async.bulk.tensor"),
                "copies after the wait": after.count("cp.async.bulk.tensor"),
                "products": len(re.findall(r"wgmma\.mma_async\S*m64n(8k16|64k32)", after)),
                # An instruction of a fourth of the rate of those by way of float32.
                "slow conversions": after.count("cvt.rn.bf16.f16"),
                "shared memory": kernel.metadata.shared,
                "spills": max(used["STACK"], used["LOCAL"]),
            }
        )
    )


def main() -> None:
    driver.set_active(Hopper())  # type: ignore[arg-type]
    from microvllm.ops.gpu.stream import StreamedWeight
    from microvllm.ops.gpu.tiling import Tiling
    from microvllm.ops.scaled import ScaledTensor

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
        report(compiled[-1], codes=False, gated=gated, stages=tiling.stages)
    for gated, block, tiling in (
        (False, (1, 512), Tiling(64, 128, 4, 6)),
        (True, (128, 128), Tiling(64, 128, 4, 4, splits=2)),
        (False, (1, 64), Tiling(64, 64, 4, 6)),  # rows of codes that are shorter than TMA's longest
    ):
        shape = -(-256 // block[0]), -(-512 // block[1])
        codes = torch.zeros(256, 512, dtype=torch.float8_e4m3fn)
        scaled = ScaledTensor.of(codes, torch.zeros(shape), block)
        product = StreamedWeight(scaled, torch.zeros(8, dtype=torch.int32), {}, gated=gated, pdl=True)
        product(torch.zeros(5, 512, dtype=torch.bfloat16), tiling)
        report(compiled[-1], codes=True, gated=gated, stages=tiling.stages)
    codes = torch.zeros(256, 512, dtype=torch.float8_e4m3fn)
    scaled = ScaledTensor.of(codes, torch.zeros(2, 4), (128, 128), "token")
    product = StreamedWeight(scaled, torch.zeros(8, dtype=torch.int32), {}, gated=True, pdl=True, ahead=True)
    tiling = Tiling(64, 128, 4, 3, max_registers=168)
    product(codes[:40], tiling, None, None, torch.zeros(4, 40), torch.bfloat16)
    report(compiled[-1], codes=True, gated=True, stages=tiling.stages)


if __name__ == "__main__":
    main()
