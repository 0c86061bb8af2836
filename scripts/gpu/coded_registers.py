"""Compiles products with codes of 4 bits for compute capability 9.0, and prints what each takes; no GPU.

    python scripts/gpu/coded_registers.py [--rows 35] [--model Qwen2-7B] [--group 128]

A line a tiling of gate_up, gated and as a plain product of twice the columns (of which SwiGLU is a kernel of
its own): registers of a thread, bytes of its stack, where it spills, and of shared memory, and how many warps
a multiprocessor holds by them (of 64). `tune_coded.py` times both ways on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SIZES = {"Qwen2-7B": (18944, 3584), "Qwen3-8B": (12288, 4096), "Qwen3-0.6B": (3072, 1024)}
# block_n, warps, stages
TILINGS = ((64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 4, 2), (128, 8, 2), (128, 8, 3))
REGISTERS, SHARED_MEMORY, WARPS = 65_536, 227 << 10, 64  # of a multiprocessor of an H100 or H200


class Hopper:
    """As much of a driver as compilation calls."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def resources(kernel: Any) -> dict[str, int]:
    """What ptxas says of a compiled kernel: REG, STACK, SHARED, LOCAL."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        shown = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", shown)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=35)
    parser.add_argument("--model", choices=SIZES, default="Qwen2-7B")
    parser.add_argument("--group", type=int, default=128)
    args = parser.parse_args()
    driver.set_active(Hopper())  # type: ignore[arg-type]
    from microvllm.ops.coded import CodedTensor
    from microvllm.ops.gpu import coded_skinny
    from microvllm.ops.gpu.tiling import Tiling

    compiled: list[Any] = []

    def compile_only(self: Any, grid: Any) -> Any:
        return lambda *given, **options: compiled.append(
            JITFunction.run(self, *given, grid=grid, warmup=True, **options)
        )

    JITFunction.__getitem__ = compile_only  # type: ignore[method-assign]
    n, k = SIZES[args.model]
    scales = torch.zeros(-(-k // args.group), 2 * n, dtype=torch.float16)
    words = torch.zeros(2 * n, k // 8, dtype=torch.int32)
    weight = CodedTensor.of(words, 4, k, args.group, scales)
    x, arrivals = torch.zeros(args.rows, k, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int32)
    print(f"{'':8}{'rows':>5}{'block_n':>8}{'warps':>6}{'stages':>7}{'registers':>10}{'stack':>7}", end="")
    print(f"{'shared':>8}{'warps held':>11}")
    most = coded_skinny.MOST_ROWS
    for gated, block_m, (block_n, warps, stages) in itertools.product((True, False), (most, 32), TILINGS):
        if block_m != most and args.rows <= block_m:
            continue
        coded_skinny.MOST_ROWS = block_m
        tiling = Tiling(block_n, weight.step, warps, stages)
        coded_skinny.coded_skinny(x, weight, arrivals, None, None, tiling, gated=gated, pdl=True)
        used, shared = resources(compiled[-1]), compiled[-1].metadata.shared
        by_registers = REGISTERS // (-(-used["REG"] // 8) * 8 * 32 * warps)
        held = min(by_registers, SHARED_MEMORY // (shared + 1024)) * warps
        name = "gated" if gated else "plain"
        print(f"{name:8}{block_m:5}{block_n:8}{warps:6}{stages:7}{used['REG']:10}{used['STACK']:7}", end="")
        print(f"{shared:8}{min(held, WARPS):11}", flush=True)


if __name__ == "__main__":
    main()
