"""Compiles the kernels of latent attention for compute capability 9.0, which takes no GPU.

Prints what each takes, one JSON object a kernel. Run by test_latent_compiles.py in a process of its own.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from compile_for_hopper import Hopper
from triton.runtime import driver
from triton.runtime.jit import JITFunction

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    driver.set_active(Hopper())  # type: ignore[arg-type]
    from attention_case import segment_table

    from microvllm.ops.attention import AttentionBatch
    from microvllm.ops.attention.latent import LatentConfig, LatentShape
    from microvllm.ops.attention.triton_latent import TritonLatentAttention

    compiled: list[Any] = []

    def compile_only(self: Any, grid: Any) -> Any:
        return lambda *args, **options: compiled.append(
            JITFunction.run(self, *args, grid=grid, warmup=True, **options)
        )

    JITFunction.__getitem__ = compile_only  # type: ignore[method-assign]
    for name, dtype in DTYPES.items():
        for heads in (128, 20):
            shape = LatentShape(1, heads, 512, 64, 0.1)
            config = LatentConfig(shape, 200, 16, torch.ones(32), 4096, dtype)
            backend = TritonLatentAttention(config, pdl=True)
            at = torch.arange(4, dtype=torch.int32)
            blocks = torch.zeros(2, 100, dtype=torch.int32)
            lens = torch.tensor([1000, 900], dtype=torch.int32)
            table = segment_table([(2, 2, [0])], int32=True)
            batch = AttentionBatch(at, at, 2, blocks, lens, table)
            backend.sms = 132
            compiled.clear()
            backend.begin_step(batch)(0, torch.zeros(4, (heads + 1) * 576, dtype=dtype))
            for kernel in compiled:
                ptx = kernel.asm["ptx"]
                print(
                    json.dumps(
                        {
                            "dtype": name,
                            "heads": heads,
                            "kernel": kernel.metadata.name,
                            "shared memory": kernel.metadata.shared,
                            "products": len(re.findall(r"(?:wgmma\.mma_async|mma\.sync)\.", ptx)),
                            "waits": ptx.count("griddepcontrol.wait"),
                        }
                    )
                )


if __name__ == "__main__":
    main()
