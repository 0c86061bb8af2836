#!/usr/bin/env python3
"""Print how many tokens fit into the KV cache of models with sliding windows.

    python scripts/kv_pools.py [--max-num-seqs 256] [--max-num-batched-tokens 8192] [--block-size 64]

The shapes are those of the published models, the cache is of bfloat16, and two steps are in flight, as on a
GPU. Nothing is loaded. `windows ignored`: what fits if all layers keep all tokens.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from microvllm.runtime.kv_memory import KV_BYTES, CacheLayout, fit_pools


class Shape(NamedTuple):
    """A model's layers, how many of them have the window, heads of keys, their size, and the context."""

    name: str
    layers: int
    windowed: int
    window: int
    kv_heads: int
    head_dim: int
    context: int
    gib: tuple[int, ...]


SHAPES = (
    Shape("Gemma 3 270M", 18, 15, 512, 1, 256, 32_768, (8, 125)),
    Shape("Gemma 3 12B", 48, 40, 1024, 8, 256, 131_072, (40, 100)),
    Shape("gpt-oss-20b", 24, 12, 128, 8, 64, 131_072, (8, 110)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--block-size", type=int, default=64)
    options = parser.parse_args()
    size = options.block_size
    print("| | memory | windows ignored | layers without a window | windows | |")
    print("|---|---:|---:|---:|---:|---:|")
    for shape in SHAPES:
        layer = 2 * shape.kv_heads * shape.head_dim * KV_BYTES["bfloat16"] * size
        sizes = layer * (shape.layers - shape.windowed), layer * shape.windowed
        windows = None, shape.window
        layout = CacheLayout(windows, sizes, size, 2 * options.max_num_batched_tokens, options.max_num_seqs)
        name = f"{shape.name} ({shape.windowed} of {shape.layers} layers with {shape.window:,})"
        for gib in shape.gib:
            ignored = (gib << 30) // sum(sizes) * size
            pools, _ = fit_pools(layout, gib << 30, shape.context, "more memory", may_shorten=True)
            full, windowed = (blocks * size for blocks in pools)
            print(f"| {name} | {gib} GiB | {ignored:,} | {full:,} | {windowed:,} | {full / ignored:.1f} |")
            name = ""


if __name__ == "__main__":
    main()
