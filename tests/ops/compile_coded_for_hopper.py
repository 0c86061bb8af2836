"""Compiles the kernels of codes of 4 and 8 bits for compute capability 9.0, which takes no GPU.

Prints one JSON object a kernel. Run by test_coded_compiles.py in a process of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "gpu"))


def main() -> None:
    from count_instructions import compile_only, resources

    from microvllm.ops.coded import NARROW_PLANE, PLANE, CodedTensor
    from microvllm.ops.experts import ExpertBiases
    from microvllm.ops.gpu.coded_gemv import coded_gemv
    from microvllm.ops.gpu.coded_grouped import CodedGroupedWeight
    from microvllm.ops.gpu.coded_skinny import coded_skinny
    from microvllm.ops.gpu.grouped import GroupedTiling
    from microvllm.ops.gpu.mxfp4_experts import mxfp4_experts
    from microvllm.ops.gpu.routing import SortedChoices
    from microvllm.ops.gpu.tiling import coded_gemv_tiling, coded_tiling
    from microvllm.ops.mxfp4 import Mxfp4Tensor

    launches = compile_only()

    def weight(rows: int, bits: int, group: int, offsets: bool, *, zeros: bool = False) -> CodedTensor:
        plane = NARROW_PLANE if group == 16 else PLANE
        words = torch.zeros(rows, 1024 * bits // 32, dtype=torch.int32)
        scales = torch.zeros(1024 // group, rows, dtype=torch.float32 if offsets else torch.float16)
        moved = scales if offsets else scales.to(torch.uint8) if zeros else None
        return CodedTensor.of(words, bits, 1024, group, scales, moved, plane=plane)

    def report(name: str, rows: int, place: int = -1) -> None:
        kernel = launches[place].kernel
        used, before = resources(kernel), kernel.asm["ptx"].partition("griddepcontrol.wait")[0]
        shown = {
            "name": name,
            "rows": rows,
            "registers": used["REG"],
            "spills": max(used["STACK"], used["LOCAL"]),
            "early loads": before.count("ld.global.v4"),
            "early requests": before.count("prefetch.global.L2"),
            "requests": kernel.asm["ptx"].count("prefetch.global.L2"),
        }
        print(json.dumps({**shown, "shared memory": kernel.metadata.shared}))

    kinds = {"Q4_K": (4, 32, True), "Q2_K": (4, 16, True), "Q6_K": (8, 16, False), "GPTQ": (4, 128, False)}
    arrivals, count = torch.zeros(1024, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)

    x = torch.zeros(35, 1024, dtype=torch.bfloat16)

    def multiply(name: str, made: CodedTensor, *, fetch: bool = False) -> None:
        tiling = coded_tiling(35, 512, 1024, made.step, 99 << 10, gated=False)
        coded_skinny(x, made, arrivals, None, None, tiling, gated=False, pdl=fetch, fetch=fetch)
        report(f"product {name}", 35)

    multiply("AWQ", weight(512, *kinds["GPTQ"], zeros=True))
    multiply("AWQ, fetched", weight(512, *kinds["GPTQ"], zeros=True), fetch=True)
    for name, kind in kinds.items():
        multiply(name, weight(512, *kind))
        grouped = CodedGroupedWeight(weight(4 * 512, *kind), 256, gated=True)
        choices, rows = SortedChoices(count, count, count, count), grouped.max_rows
        grouped(x, choices, 1, GroupedTiling(rows, 64, 64, 4, 2))
        report(f"experts {name}", rows)
    made = weight(2 * 512, *kinds["GPTQ"])
    early = coded_gemv_tiling(1, made.shape[1] // made.plane, gated=True)
    coded_gemv(torch.zeros(1, 1024).bfloat16(), made, None, None, early, gated=True, pdl=True)
    report("early GPTQ", 1)
    hidden = 2880  # gpt-oss's
    matrices = [
        Mxfp4Tensor.of(
            torch.zeros(rows, 12 * PLANE, dtype=torch.int32), hidden, torch.zeros(rows, 96, dtype=torch.uint8)
        )
        for rows in (4 * 2 * hidden, 4 * hidden)
    ]
    x, weights, chosen = torch.zeros(1, hidden, dtype=torch.bfloat16), torch.zeros(1, 4), count[:4].view(1, 4)
    biases = ExpertBiases(None, *(torch.zeros(len(each), dtype=x.dtype) for each in matrices))
    mxfp4_experts(x, *matrices, weights, chosen, x, biases, clamped=True)
    report("gate and up of a token's experts, MXFP4", 1, -2)
    report("down of a token's experts, MXFP4", 1)


if __name__ == "__main__":
    main()
