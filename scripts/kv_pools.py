#!/usr/bin/env python3
"""Print how many requests fit into the KV cache of models with sliding windows.

    python scripts/kv_pools.py [--block-size 64]

The shapes are those of the published models, and the cache is of bfloat16. Nothing is loaded. In brackets:
how many fit if all layers keep all tokens.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from microvllm.adapters.cache_plan import CachePlan
from microvllm.runtime.kv_memory import KV_BYTES, CacheLayout

LENGTHS = (1024, 4096, 32_768)
BYTES = KV_BYTES["bfloat16"]


class Layers(NamedTuple):
    """So many layers with a window, their heads of keys, and the size of these."""

    number: int
    window: int | None
    kv_heads: int
    head_dim: int

    @property
    def as_planned(self) -> tuple[int | None, int, int]:
        """A layer as `CachePlan.of` has it."""
        return self.window, 2 * self.kv_heads * self.head_dim, self.head_dim


class Shape(NamedTuple):
    """The layers of a model that have a cache of their own, and memory for it in GiB."""

    name: str
    full: Layers
    windowed: Layers
    gib: int


SHAPES = (
    Shape("Gemma 3 270M", Layers(3, None, 1, 256), Layers(15, 512, 1, 256), 8),
    Shape("Gemma 3 1B", Layers(4, None, 1, 256), Layers(22, 512, 1, 256), 8),
    Shape("Gemma 3 4B", Layers(5, None, 4, 256), Layers(29, 1024, 4, 256), 60),
    Shape("Gemma 3 12B", Layers(8, None, 8, 256), Layers(40, 1024, 8, 256), 100),
    Shape("Gemma 3 27B", Layers(10, None, 16, 128), Layers(52, 1024, 16, 128), 60),
    Shape("Gemma 4 E2B", Layers(3, None, 1, 512), Layers(12, 512, 1, 256), 60),
    Shape("Gemma 4 E4B", Layers(4, None, 2, 512), Layers(20, 512, 2, 256), 60),
    Shape("Gemma 4 26B-A4B", Layers(5, None, 2, 512), Layers(25, 1024, 8, 256), 60),
    Shape("Gemma 4 31B", Layers(10, None, 4, 512), Layers(50, 1024, 16, 256), 60),
    Shape("Gemma 2 9B", Layers(21, None, 8, 256), Layers(21, 4096, 8, 256), 60),
    Shape("Olmo 3 7B", Layers(8, None, 32, 128), Layers(24, 4096, 32, 128), 60),
    Shape("gpt-oss-20b", Layers(12, None, 8, 64), Layers(12, 128, 8, 64), 110),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block-size", type=int, default=64)
    size = parser.parse_args().block_size
    print("| | memory | groups | left empty |", *(f"{length:,} tokens |" for length in LENGTHS))
    print("|---|---:|---|---:|" + "---:|" * len(LENGTHS))
    for name, full, windowed, gib in SHAPES:
        kinds, memory = (full, windowed), gib << 30
        layers = [each.as_planned for each in kinds for _ in range(each.number)]
        plan, filled = CachePlan.of(layers), sum(elements for _, elements, _ in layers)
        layout = CacheLayout(plan.windows, plan.page_size * BYTES * size, size, 0)
        unshared = memory // (filled * BYTES * size) * size
        cells = [
            f"{layout.tokens(memory // layout.page_bytes, length) // length:,} ({unshared // length:,}) |"
            for length in LENGTHS
        ]
        groups, number = len(plan.windows), plan.windows.count(None)
        print(
            f"| {name} ({full.number} + {windowed.number} of {windowed.window:,}) | {gib} GiB |",
            f"{number} + {groups - number} | {1 - filled / (plan.page_size * groups):.0%} |",
            *cells,
        )


if __name__ == "__main__":
    main()
