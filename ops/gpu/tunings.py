"""Tilings that were measured on a device, by its name: what is not here is not in use there.

`scripts/gpu/tune_stream.py` finds them. A product is (n, k, gated): columns of the result, terms of a sum.
Its tilings are by the largest number of rows that they are for; None where another kernel was as fast within
a step of the whole model. Of tilings that are equally fast, one that another product has, too, is one kernel
less to compile.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from microvllm.ops.gpu.tiling import Tiling

# Tiling: block_n, block_k, warps, stages, splits
STREAM: Mapping[str, Mapping[tuple[int, int, bool], Mapping[int, Tiling | None]]] = {
    "NVIDIA H200": {
        # Qwen3-0.6B: qkv, o, gate_up, down, head
        (4096, 1024, False): {
            1: None,
            8: Tiling(64, 256, 4, 4),
            16: Tiling(64, 128, 4, 8),
            32: Tiling(64, 128, 4, 6),
            64: Tiling(64, 128, 4, 5),
        },
        (1024, 2048, False): {
            4: None,
            8: Tiling(64, 256, 4, 4, 2),
            16: Tiling(64, 256, 4, 4),
            32: Tiling(64, 128, 4, 6, 4),
            64: Tiling(64, 128, 4, 5),
        },
        (3072, 1024, True): {
            1: None,
            32: Tiling(64, 128, 4, 4),
            64: Tiling(64, 128, 4, 3),
        },
        (1024, 3072, False): {
            4: None,
            8: Tiling(64, 256, 4, 4, 2),
            16: Tiling(64, 256, 4, 4, 6),
            32: Tiling(64, 128, 4, 6, 4),
        },
        (151936, 1024, False): {
            1: None,
            16: Tiling(64, 128, 4, 3),
            32: Tiling(64, 128, 4, 2),
            64: Tiling(64, 128, 4, 3),
        },
        # Qwen2-7B: qkv, o, gate_up, down, head
        (4608, 3584, False): {
            1: None,
            8: Tiling(64, 256, 4, 3),
            16: Tiling(64, 128, 4, 5),
            32: Tiling(64, 128, 4, 6),
            64: Tiling(64, 128, 4, 5),
        },
        (3584, 3584, False): {
            2: None,
            16: Tiling(64, 256, 4, 4),
            32: Tiling(64, 128, 4, 6),
            64: Tiling(64, 128, 4, 5),
        },
        (18944, 3584, True): {
            1: None,
            8: Tiling(64, 128, 4, 4),
            16: None,
            32: Tiling(64, 128, 4, 4),
            48: None,
            64: Tiling(64, 128, 4, 3),
        },
        (3584, 18944, False): {
            2: None,
            8: Tiling(64, 256, 4, 4, 4),
            16: Tiling(64, 256, 4, 4),
            32: Tiling(64, 128, 4, 6, 2),
            48: None,
            64: Tiling(64, 128, 4, 5, 2),
        },
        (152064, 3584, False): {
            1: None,
            8: Tiling(64, 128, 4, 4),
            16: Tiling(64, 128, 4, 3),
            32: Tiling(128, 128, 4, 4),
            64: Tiling(128, 128, 8, 3),
        },
    },
}


def stream_tilings(device: torch.device, n: int, k: int, *, gated: bool) -> Mapping[int, Tiling | None]:
    """Those measured for a product on this device, perhaps none."""
    return STREAM.get(torch.cuda.get_device_name(device), {}).get((n, k, gated), {})


HEAD_ROWS = 1 << 16  # of a weight, and more: tiles enough for larger ones
LONG_SUMS = 8192  # terms, and more: of few columns, split among programs


def guessed_tilings(n: int, k: int, *, gated: bool) -> Mapping[int, Tiling | None]:
    """For a product that was not timed: those of Qwen2-7B's product that resembles it, up to 32 rows."""
    if gated:
        return {1: None, 8: Tiling(64, 128, 4, 4), 16: None, 32: Tiling(64, 128, 4, 4)}
    if n >= HEAD_ROWS:
        return {1: None, 8: Tiling(64, 128, 4, 4), 16: Tiling(64, 128, 4, 3), 32: Tiling(128, 128, 4, 4)}
    if k >= LONG_SUMS:
        few, many = Tiling(64, 256, 4, 4, 4), Tiling(64, 128, 4, 6, 2)
        return {2: None, 8: few, 16: Tiling(64, 256, 4, 4), 32: many}
    return {2: None, 16: Tiling(64, 256, 4, 4), 32: Tiling(64, 128, 4, 6)}
