"""Finds the tilings of products of few rows (`ops.gpu.stream`) on one GPU, for `ops/gpu/tunings.py`.

    python scripts/gpu/tune_stream.py [--models NAME…] [--rows N…] [--seconds N] [--known] [--out FILE.json]

Each tiling is timed alone, as a CUDA graph over copies of the weight that together do not fit the L2 cache.
A line shows a product and a number of rows: microseconds of `torch.mm`, of the kernel that is used without a
tiling, and of the best tilings. A tiling is of use only where it is faster within a step of the whole model
as well: profile_decode.py with and without it decides. Compiling the candidates takes most of the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton
from check_ops import BF16, DEVICE, MODELS, Product, graph_ms, normal, products, rotated
from torch import Tensor

from microvllm.ops.gpu.operators import GpuProduct
from microvllm.ops.gpu.stream import MIN_ROWS, StreamedWeight
from microvllm.ops.gpu.tiling import Tiling
from microvllm.ops.gpu.tunings import STREAM

RINGS = (36 << 10, 54 << 10, 74 << 10, 110 << 10, 160 << 10)  # bytes of shared memory that stages may take
SPLITS = (1, 2, 4, 6, 8)
SHOWN = 3
Kernel = tuple[int, bool, bool, int, int, int, int]  # rows, gated, residual, block_n, block_k, warps, stages


def known(rows: int, product: Product) -> Iterator[Tiling]:
    """Those in use for other products and about as many rows, split in other numbers, too."""
    found = {
        (tiling.block_n, tiling.block_k, tiling.warps, tiling.stages)
        for (_, _, gated), tilings in STREAM.get(torch.cuda.get_device_name(), {}).items()
        for most, tiling in tilings.items()
        if tiling is not None and gated == product[2] and rows <= most <= 2 * rows
    }
    for (block_n, block_k, warps, stages), splits in itertools.product(sorted(found), SPLITS[:4]):
        if splits == 1 or 2 * splits * block_k <= product[1]:
            yield Tiling(block_n, block_k, warps, stages, splits)


def candidates(rows: int, product: Product) -> Iterator[Tiling]:
    """Tilings that keep a good part of the weight, or of what memory has under way, in flight."""
    n, k, gated, _, _ = product
    halves, block_m = 2 if gated else 1, max(MIN_ROWS, triton.next_power_of_2(rows))
    for block_n, block_k in itertools.product((64,) if gated else (64, 128), (64, 128, 256)):
        stage_bytes = (halves * block_n + block_m) * block_k * 2
        tiles = triton.cdiv(n, block_n)
        for stages, splits in itertools.product(sorted({ring // stage_bytes for ring in RINGS}), SPLITS):
            resident = min(tiles * splits, 132 * ((220 << 10) // max(1, stages * stage_bytes)))
            in_flight = resident * stages * stage_bytes
            enough = in_flight >= min(4e6, 0.6 * 2 * halves * n * k)
            if 2 <= stages <= 16 and enough and (splits == 1 or 2 * splits * block_k <= k):
                yield Tiling(block_n, block_k, 4, stages, splits)


def kernel_of(rows: int, product: Product, tiling: Tiling) -> Kernel:
    """Tilings with the same one share a kernel."""
    return rows, product[2], product[4], *tuple_of(tiling)[:4]


def compile_one(kernel: Kernel) -> None:
    """In a process of its own; the result goes to Triton's cache on the disk."""
    rows, gated, residual, *tiling = kernel
    weight = torch.zeros(512, 512, device=DEVICE, dtype=BF16)
    product = StreamedWeight(weight, arrivals(), {}, gated=gated, pdl=True)
    x = torch.zeros(rows, 512, device=DEVICE, dtype=BF16)
    added = torch.zeros(rows, 256 if gated else 512, device=DEVICE, dtype=BF16) if residual else None
    product(x, Tiling(*tiling), None, added)
    torch.cuda.synchronize()


def arrivals() -> Tensor:
    return torch.zeros(1 << 16, dtype=torch.int32, device=DEVICE)


def tune_product(
    rows: int, product: Product, weights: list[Tensor], tilings: Iterable[Tiling]
) -> tuple[float, float, list[tuple[float, Tiling]]]:
    """Microseconds of `torch.mm`, of the other kernels, and of each tiling, the fastest first."""
    n, k, gated, _, residual = product
    x, added = normal(rows, k), normal(rows, n) if residual else None
    shared = arrivals()

    def microseconds(calls: list[partial[Tensor]]) -> float:
        return graph_ms(list(calls), 4) / len(calls) * 1e3

    plain = microseconds([partial(torch.mm, x, weight.t()) for weight in weights])
    others = [GpuProduct(weight, None, shared, None, gated=gated, pdl=True) for weight in weights]
    other = microseconds([partial(call, x, added) for call in others])
    streamed = [StreamedWeight(weight, shared, {}, gated=gated, pdl=True) for weight in weights]
    times = []
    for tiling in tilings:
        calls = [partial(call, x, tiling, None, added) for call in streamed]
        times.append((microseconds(calls), tiling))
    return plain, other, sorted(times, key=lambda each: each[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["Qwen3-0.6B", "Qwen2-7B"], choices=MODELS)
    parser.add_argument("--rows", nargs="*", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--known", action="store_true", help="only tilings that other products have")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begun, found = time.monotonic(), []
    jobs = [
        (model, name, product, rows)
        for model in args.models
        for name, product in products(model).items()
        for rows in args.rows
    ]
    choose = known if args.known else candidates
    kernels = {
        kernel_of(rows, product, tiling) for _, _, product, rows in jobs for tiling in choose(rows, product)
    }
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        pool.map(compile_one, sorted(kernels), chunksize=2)
    print(f"{len(kernels)} kernels compiled in {time.monotonic() - begun:.0f} s", flush=True)
    with torch.inference_mode():
        for (model, name, product), group in itertools.groupby(jobs, key=lambda job: job[:3]):
            if time.monotonic() - begun > args.seconds:
                print("no time left", flush=True)
                break
            n, k, gated, _, _ = product
            weights = rotated(partial(normal, 2 * n if gated else n, k), 3 if n > 100_000 else 10)
            for *_, rows in group:
                plain, other, times = tune_product(rows, product, weights, choose(rows, product))
                best = "  ".join(f"{us:.2f} {tuple_of(tiling)}" for us, tiling in times[:SHOWN])
                print(
                    f"{model} {name:7} ({n}, {k}, {gated}) {rows:2} rows: mm {plain:.2f} us, now {other:.2f},"
                    f" streamed {best}",
                    flush=True,
                )
                found.append([model, name, rows, plain, other, [(us, tuple_of(t)) for us, t in times]])
    if args.out:
        args.out.write_text(json.dumps(found))


def tuple_of(tiling: Tiling) -> tuple[int, ...]:
    """As the arguments of `Tiling`."""
    return tiling.block_n, tiling.block_k, tiling.warps, tiling.stages, tiling.splits


if __name__ == "__main__":
    main()
