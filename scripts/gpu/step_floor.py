"""Counts the bytes that a decode step has to move, and the least time for them on an H200; takes no GPU.

    python scripts/gpu/step_floor.py FOLDER… [--requests 1 8 35 256] [--context 624]

FOLDER has a config.json, as `models.py` writes it. Bytes of a step: the weights of all layers, in the bits of
their format, and the head; of the experts those that so many tokens choose if each chooses alike often and by
itself, E (1 - (1 - k / E) ^ n) of E; keys and values of the context of each request, behind a window only
those in it; states read and written. Activations, of which a step moves little, are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.registry import load_spec
from microvllm.adapters.spec import LayerSpec, ModelSpec

READ_BYTES_S = 4.594e12  # as a kernel that only reads 8 GB reaches
DTYPE_BYTES = 2
# Of a weight with its share of scales and zero points: groups of 128, blocks of 128 x 128, MXFP4's experts.
BITS = {"fp8": 8 + 32 / 128**2, "gptq": 4 + 16 / 128, "awq": 4 + 24 / 128, "mxfp4": 4.25}


def weight_bytes(layer: LayerSpec, hidden: int, requests: int, method: str | None) -> float:
    bits, packed = BITS.get(method or "", 8 * DTYPE_BYTES), layer.mlp
    others = 8 * DTYPE_BYTES if method == "mxfp4" else bits
    weights = layer.mixer.num_products(hidden)
    if not isinstance(packed, Experts):
        return (weights + packed.num_products(hidden)) * others / 8
    expert = hidden * packed.size * (2 + packed.gated)
    chosen = packed.routing.num_chosen
    read = packed.count * (1 - (1 - chosen / packed.count) ** requests)
    weights += packed.num_products(hidden) - chosen * expert  # the router and what is shared
    return weights * others / 8 + read * expert * bits / 8


def step_bytes(spec: ModelSpec, method: str | None, requests: int, context: int) -> tuple[float, float]:
    """Of weights, and of keys, values and states."""
    weights = spec.vocab_size * spec.hidden_size * DTYPE_BYTES + sum(
        weight_bytes(layer, spec.hidden_size, requests, method) for layer in spec.layers
    )
    tokens = sum(
        layer.mixer.cache_size * min(context, layer.mixer.window or context) for layer in spec.layers
    )
    states = 2 * spec.state_bytes(DTYPE_BYTES)
    return weights, requests * (tokens * DTYPE_BYTES + states)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 35, 256])
    parser.add_argument("--context", type=int, default=624, help="tokens of each request")
    args = parser.parse_args()
    for folder in args.folders:
        spec = load_spec(folder)
        method = None if spec.quantization is None else spec.quantization.method
        for requests in args.requests:
            weights, kept = step_bytes(spec, method, requests, args.context)
            print(
                f"{folder.name:14} {requests:4} requests: {weights / 1e9:6.2f} GB of weights, "
                f"{kept / 1e9:6.2f} GB of cache and states: {(weights + kept) / READ_BYTES_S * 1e3:6.2f} ms"
            )


if __name__ == "__main__":
    main()
