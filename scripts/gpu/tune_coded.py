"""Times products with codes of 4 bits (`ops.gpu.coded`) on one GPU, for the rules in `ops/gpu/tiling.py`.

    python scripts/gpu/tune_coded.py [--models NAME…] [--rows N…] [--zeros] [--compile] [--seconds N]

A line shows a product and a number of rows: microseconds of the tilings, from the fastest on, and TB/s of
codes and scales (groups of 128), beside the time of these bytes alone at --floor TB/s and that of the way in
use. "plain" multiplies gate and up as one product, and leaves SwiGLU to a kernel of its own; of more rows
than 8 both ways are timed. "gemv" is `ops.gpu.coded_gemv`, which is in use where it was the fastest.
`count_instructions.py` shows what their kernels execute and take. Everything is a CUDA graph over copies that
together do not fit the L2 cache. --compile only fills Triton's cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from check_ops import DEVICE, MODELS, Product, graph_ms, normal, products
from torch import Tensor

from microvllm.ops.coded import CodedTensor, pack
from microvllm.ops.gpu.activation import silu_and_mul
from microvllm.ops.gpu.coded_gemv import coded_gemv
from microvllm.ops.gpu.coded_skinny import coded_skinny, widened
from microvllm.ops.gpu.launch import shared_memory
from microvllm.ops.gpu.tiling import (
    MAX_EARLY_CODED_ROWS,
    MAX_GATED_CODED_ROWS,
    Tiling,
    coded_gemv_tiling,
    coded_tiling,
)

GROUP, STEP = 128, 256
FEW = (
    *((64, 4, stages, programs, None) for stages in (3, 4) for programs in (132, 264, 400, 528)),
    (64, 4, 5, 500, None),
    *((128, 4, 3, programs, None) for programs in (132, 264)),
    (32, 2, 4, 1000, None),
)
# block_n, warps, stages, programs, registers. Counted, each program of 64 rows reads x again, which takes the
# L2 cache longer than the codes take the memory; 8 warps of 64 rows execute 1.6 times what 4 do.
MANY = (
    *((64, 4, stages, programs, None) for stages in (2, 3) for programs in (132, 224, 264)),
    *((64, 4, 2, programs, 168) for programs in (132, 224, 336)),  # three programs on a multiprocessor
    *((128, 8, stages, programs, None) for stages in (2, 3) for programs in (66, 132, 252)),
    *((128, 8, 2, programs, 128) for programs in (132, 252)),
    *((128, 4, 2, programs, None) for programs in (132, 252)),
)
# block_n, warps, runs of words ahead, parts of a row, of `coded_gemv`
GEMV = (
    *((16, 8, ahead, 8) for ahead in (1, 2, 3)),
    *((16, 4, ahead, 8) for ahead in (1, 2)),
    *((16, 4, ahead, 4) for ahead in (2, 4)),
    *((16, 8, ahead, 4) for ahead in (1, 2, 4)),  # gated: a warp for each half of each part
    *((16, warps, 4, 2) for warps in (2, 4)),
    (32, 8, 2, 4),
)
COPIES_MB = 150


class Way(NamedTuple):
    """tiling: of the product; plain: gate and up are one product without SwiGLU; gemv: by `coded_gemv`."""

    tiling: Tiling
    plain: bool = False
    gemv: bool = False


Job = tuple[int, Product, Way, bool]


def candidates(rows: int, product: Product, memory: int, step: int = STEP) -> Iterator[Way]:
    """That of `coded_tiling` first. memory: of a program, in bytes; step: columns of a run of words."""
    n, k, gated, _, _ = product
    plain = gated and rows > MAX_GATED_CODED_ROWS
    sizes = rows, n * (1 + plain), k, step, memory
    yield Way(coded_tiling(*sizes, gated=gated and not plain), plain)
    for plain in (False, True) if gated and rows > 8 else (False,):
        columns = n * (1 + plain)
        for block_n, warps, stages, programs, registers in FEW if rows <= 8 else MANY:
            splits = max(1, min(-(-programs // -(-columns // block_n)), k // (2 * STEP)))
            if not gated or plain or rows <= 8 or block_n == 64:  # others spill
                yield Way(Tiling(block_n, STEP, warps, stages, splits, registers), plain)
    for block_n, warps, ahead, parts in GEMV if rows <= 2 else ():
        if rows * parts <= 8 and warps * 16 <= block_n * parts * (1 + gated):
            yield Way(Tiling(block_n, STEP, warps, ahead, parts), gemv=True)


def in_use(rows: int, product: Product, *, has_zeros: bool) -> Way:
    _, k, gated, _, _ = product
    if rows <= MAX_EARLY_CODED_ROWS and not has_zeros:
        return Way(coded_gemv_tiling(rows, -(-k // STEP), gated=gated), gemv=True)
    return next(candidates(rows, product, shared_memory(DEVICE)))


def random_codes(product: Product, *, has_zeros: bool) -> CodedTensor:
    n, k, gated, _, _ = product
    rows = n * (1 + gated)
    words = pack(torch.randint(0, 16, (rows, k), dtype=torch.uint8, device=DEVICE), 4)
    scales = (torch.rand(-(-k // GROUP), rows, device=DEVICE) * 0.01).half()
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, device=DEVICE) if has_zeros else None
    return CodedTensor.of(words, 4, k, GROUP, scales, zeros)


def call(
    rows: int, product: Product, way: Way, weight: CodedTensor, arrivals: Tensor
) -> Callable[[], Tensor]:
    n, k, gated, _, residual = product
    x, added = normal(rows, k), normal(rows, n) if residual else None

    def multiply() -> Tensor:
        fused = gated and not way.plain
        if way.gemv:
            return coded_gemv(x, weight, None, added, way.tiling, gated=fused, pdl=True)
        y = coded_skinny(x, weight, arrivals, None, added, way.tiling, gated=fused, pdl=True)
        return silu_and_mul(y, pdl=True) if way.plain else y

    return multiply


def room() -> Tensor:
    return torch.zeros(1 << 12, dtype=torch.int32, device=DEVICE)


def compile_one(job: Job) -> None:
    """In a process of its own; the result goes to Triton's cache on the disk."""
    rows, product, way, has_zeros = job
    try:
        call(rows, product, way, random_codes(product, has_zeros=has_zeros), room())()
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, ...
        print(f"no {job}: {error}"[:200], flush=True)


def time_product(name: str, rows: int, product: Product, floor: float, *, has_zeros: bool) -> float:
    """Microseconds of the tiling in use."""
    n, k, gated, _, _ = product
    megabytes = n * (1 + gated) * k * (4 + 16 / GROUP) / 8 / 1e6
    weights = [
        random_codes(product, has_zeros=has_zeros) for _ in range(max(2, int(COPIES_MB // megabytes) + 1))
    ]
    weights = (weights * 12)[: max(12, len(weights))]
    arrivals, times = room(), dict[Way, float]()
    current = in_use(rows, product, has_zeros=has_zeros)
    for way in dict.fromkeys((current, *candidates(rows, product, shared_memory(DEVICE)))):
        try:
            calls = [call(rows, product, way, weight, arrivals) for weight in weights]
            times[way] = graph_ms(calls, 5) / len(calls) * 1e3
        except Exception as error:
            print(f"no {name} {way}: {error}"[:160], flush=True)
    order = sorted(times, key=times.__getitem__)
    shown = "  ".join(
        f"{times[way]:.1f} {'plain ' * way.plain}{'gemv ' * way.gemv}"
        f"{(t.block_n, t.warps, t.stages, t.splits, t.max_registers)}"
        for way in order
        for t in [way.tiling]
    )
    used = times[current]
    rate = megabytes / times[order[0]]
    print(
        f"{name} {rows} rows, {megabytes:.1f} MB ({megabytes / floor:.1f} us): {shown}; {rate:.2f} TB/s; "
        f"in use {used:.1f}",
        flush=True,
    )
    return used


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["Qwen2-7B"], choices=MODELS)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8, 20, 35, 64])
    parser.add_argument("--floor", type=float, default=4.594)
    parser.add_argument("--zeros", action="store_true", help="a zero point for each group")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processes", type=int, default=4, help="that compile")
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    begun = time.monotonic()
    with torch.inference_mode():
        if args.compile:
            todo = {
                (rows, product, way, args.zeros): None
                for model in args.models
                for rows in sorted(
                    {
                        rows if rows <= 2 else 8 if rows <= 8 else 32 if rows <= 32 else 64
                        for rows in args.rows
                    }
                )
                for name, product in products(model).items()
                if name != "head"
                for way in (
                    in_use(rows, product, has_zeros=args.zeros),
                    *candidates(rows, product, shared_memory(DEVICE)),
                )
            }
            with multiprocessing.get_context("spawn").Pool(
                min(args.processes, len(os.sched_getaffinity(0)))
            ) as pool:
                pool.map(compile_one, todo, chunksize=1)
            print(f"{len(todo)} kernels compiled in {time.monotonic() - begun:.0f} s", flush=True)
            return
        for model in args.models:
            for rows in args.rows:
                total = 0.0
                for name, product in products(model).items():
                    if name == "head":
                        continue
                    if time.monotonic() - begun > args.seconds:
                        print("no time left", flush=True)
                        return
                    total += time_product(name, rows, product, args.floor, has_zeros=args.zeros)
                print(f"{model} {rows} rows, a layer: {total:.1f} us", flush=True)
            widest = products(model)["gate_up"]
            weight = random_codes(widest, has_zeros=args.zeros)
            out = torch.empty(weight.shape[0], weight.columns, dtype=torch.bfloat16, device=DEVICE)
            widening = graph_ms([partial(widened, weight, out, pdl=True)] * 4, 5) / 4 * 1e3
            print(f"{model} gate_up widened: {widening:.1f} us", flush=True)


if __name__ == "__main__":
    main()
