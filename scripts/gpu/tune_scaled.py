"""Times products with 8-bit codes (`ops.gpu.scaled`) on one GPU, for the rules in `ops/gpu/tiling.py`.

    python scripts/gpu/tune_scaled.py [--models NAME…] [--rows N…] [--compile] [--seconds N]

A line shows a product and a number of rows: microseconds and TB/s of codes of the best tilings, beside those
of the bf16 kernels in use and of the bytes alone at --floor TB/s. From `MAX_STREAMED_ROWS` on, or with
--many: `torch.mm` of bf16, `_scaled_mm` with and without fast accumulation (which blocks never have), and
rounding the rows. Everything is a CUDA graph over copies that together do not fit the L2 cache. --compile
only fills Triton's cache, on all cores.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from check_ops import BF16, DEVICE, MODELS, Product, graph_ms, normal, products, rotated
from torch import Tensor

from microvllm.ops.gpu.e4m3 import round_rows, widen
from microvllm.ops.gpu.operators import GpuOperators
from microvllm.ops.gpu.scaled import BLOCK_MULTIPLE
from microvllm.ops.gpu.scaled_gemv import scaled_gemv
from microvllm.ops.gpu.scaled_skinny import scaled_skinny
from microvllm.ops.gpu.stream import StreamedWeight
from microvllm.ops.gpu.tiling import MAX_GEMV_ROWS, MAX_STREAMED_ROWS, Tiling
from microvllm.ops.scaled import ScaledTensor, expand, quantize

# block_n, block_k, warps, stages, splits, registers. A thread widens x, and multiplies it with the norm's
# weight, for its rows together: with few of them it executes up to 1.8 times what it does with (8, 512, 4).
GEMV = (
    *((4, 2048, 4, 1), (4, 2048, 4, 2), (4, 4096, 8, 1), (8, 2048, 8, 1)),
    *((8, 512, 4, 2), (8, 512, 4, 2, 1, 128), (8, 1024, 4, 2), (8, 1024, 4, 2, 1, 128), (4, 512, 4, 4)),
)
GATED_GEMV = (
    *((2, 2048, 4, 1), (4, 4096, 8, 1), (8, 512, 4, 2), (8, 512, 4, 1, 1, 128), (4, 512, 4, 2)),
    *((4, 512, 4, ahead, 1, registers) for ahead in (2, 4) for registers in (96, 128)),
)
STREAM = (
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (64, 128, 4, 6),
    (64, 256, 4, 3),
    (64, 256, 4, 4),
    (128, 128, 8, 4),
)
SPLITS = (1, 2, 3, 4, 6, 8)
SKINNY = Tiling(64, 128, 4, 4)
Job = tuple[int, Product, Tiling, str, bool]


def candidates(rows: int, product: Product, rounds: bool) -> Iterator[Tiling]:
    n, k, gated, _, _ = product
    if rows <= MAX_GEMV_ROWS:
        yield from itertools.starmap(Tiling, GATED_GEMV if gated else GEMV)
        return
    size = 1 if rounds else 2
    if gated and rounds:
        yield Tiling(64, 128, 4, 3, 1, 168)
    for block_n, block_k, warps, stages in STREAM:
        tiles = -(-n // block_n)
        ring = stages * block_k * (block_n * (1 + gated) + size * max(8, 1 << (rows - 1).bit_length()))
        if ring > 220_000 or (gated and block_n > 64):
            continue
        for splits in SPLITS if tiles < 400 else (1,):
            if splits == 1 or (tiles * splits <= 600 and k >= 512 * splits):
                yield Tiling(block_n, block_k, warps, stages, splits)


def codes(n: int, k: int, kind: str) -> ScaledTensor:
    block = (128, 128) if kind == "block" else (1, 0)
    made, scales = quantize(normal(n, k), block)
    return ScaledTensor.of(made, scales, (block[0], block[1] or k), "token")


def group_of(weight: ScaledTensor) -> int:
    """Columns of x that share a scale with such a weight; 0 for all."""
    return 0 if weight.block[1] >= weight.shape[1] else weight.block[1]


def call(
    rows: int, product: Product, tiling: Tiling, weight: ScaledTensor, arrivals: Tensor, rounds: bool
) -> Callable[[], Tensor]:
    n, k, gated, norm, residual = product
    x, gamma, added = normal(rows, k), normal(k), normal(rows, n) if residual else None
    if rows <= MAX_GEMV_ROWS:
        gamma = gamma if norm and rows == 1 else None
        return lambda: scaled_gemv(x, weight, None, gamma, 1e-6, added, tiling, gated=gated, pdl=True)
    if tiling == SKINNY:
        return lambda: scaled_skinny(x, weight, arrivals, None, added, tiling, gated=gated, pdl=True)
    streamed = StreamedWeight(weight, arrivals, {}, gated=gated, pdl=True, ahead=rounds)
    if rounds:
        rounded, scales = round_rows(x, group=group_of(weight))
        return partial(streamed, rounded, tiling, None, added, scales, BF16)
    return partial(streamed, x, tiling, None, added)


def room() -> Tensor:
    return torch.zeros(1 << 16, dtype=torch.int32, device=DEVICE)


def compile_one(job: Job) -> None:
    """In a process of its own; the result goes to Triton's cache on the disk."""
    rows, product, tiling, kind, rounds = job
    n, k, gated, _, _ = product
    try:
        call(rows, product, tiling, codes(n * (1 + gated), k, kind), room(), rounds)()
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, ...
        print(f"no {job}: {error}"[:200], flush=True)


def jobs(models: list[str], rows: list[int], kind: str, rounds: bool) -> Iterator[Job]:
    """One for each kernel: streamed ones are the same for all shapes."""
    seen = set()
    for model, m in itertools.product(models, rows):
        for name, product in products(model).items():
            if name == "head" or m > MAX_STREAMED_ROWS:
                continue
            _, _, gated, norm, residual = product
            for tiling in candidates(m, product, rounds):
                key: tuple[object, ...] = (m, product, tiling)
                small = product
                if m > MAX_GEMV_ROWS:
                    tiling = replace(tiling, splits=1)
                    key = (max(8, 1 << (m - 1).bit_length()), gated, residual, tiling)
                    small = (512, 1024, gated, norm, residual)
                if key not in seen:
                    seen.add(key)
                    yield m, small, tiling, kind, rounds


def fastest_ms(calls: list[Callable[[], object]]) -> float:
    """Milliseconds of the fastest of many passes over the calls, which others on the GPU disturb least."""
    return graph_ms(calls, 12, min)


def time_few(model: str, rows: int, kind: str, floor: float, rounds: bool, beside: bool) -> None:
    arrivals, plain_ops, total = room(), GpuOperators(BF16, DEVICE, "triton"), [0.0, 0.0]
    for name, product in products(model).items():
        if name == "head":
            continue
        n, k, gated, norm, residual = product
        weights = [
            codes(n * (1 + gated), k, kind) for _ in range(max(2, 160_000_000 // (n * (1 + gated) * k)))
        ]
        weights = (weights * 8)[: max(8, len(weights))]

        def microseconds(calls: list[Callable[[], object]]) -> float:
            return fastest_ms(calls) / len(calls) * 1e3

        times = []
        for tiling in candidates(rows, product, rounds):
            if rows > MAX_GEMV_ROWS and kind == "block" and tiling.block_k > 128:
                continue
            try:
                calls = [call(rows, product, tiling, weight, arrivals, rounds) for weight in weights]
                times.append((microseconds(calls), tiling))
            except Exception as error:
                print(f"no {name} {tiling}: {error}"[:160], flush=True)
        times.sort(key=lambda each: each[0])
        megabytes = weights[0].nbytes / 1e6
        line = f"{model} {kind} {name:7} {rows:3} rows, {megabytes:.0f} MB ({megabytes / floor:.1f} us):"
        for us, t in times[:6]:
            line += f"  {us:.2f} {(t.block_n, t.block_k, t.warps, t.stages, t.splits, t.max_registers)}"
        line += f"; {megabytes / times[0][0]:.2f} TB/s"
        total[0] += times[0][0]
        if not beside:
            print(line, flush=True)
            continue
        x, added = normal(rows, k), normal(rows, n) if residual else None
        plain = rotated(partial(normal, n * (1 + gated), k), 12)
        gamma = normal(k)
        made = [
            plain_ops.norm_gate_up(gamma, 1e-6, w)
            if gated
            else plain_ops.norm_linear(gamma, 1e-6, w)
            if norm
            else plain_ops.linear(w)
            for w in plain
        ]
        bf16 = microseconds([partial(each, x, added) if residual else partial(each, x) for each in made])
        print(f"{line}; bf16 {bf16:.2f}", flush=True)
        total[1] += bf16
    print(f"{model} {kind} {rows} rows, a layer: {total[0]:.1f} us, bf16 {total[1]:.1f}", flush=True)


def time_many(model: str, rows: int, kind: str) -> None:
    total = [0.0] * 5
    for name, (n, k, gated, _, _) in products(model).items():
        if name == "head":
            continue
        out = n * (1 + gated)
        x, weight = normal(rows, k), codes(out, k, kind)
        plain, raw = normal(out, k), weight.as_subclass(Tensor)
        rounding = partial(round_rows, x, group=group_of(weight), multiple=BLOCK_MULTIPLE, pdl=True)
        rounded, scales = rounding()
        of_rows = weight.scales.t()

        def scaled_mm(
            fast: bool,
            raw: Tensor = raw,
            rounded: Tensor = rounded,
            scales: Tensor = scales,
            of_rows: Tensor = of_rows,
        ) -> Tensor:
            fast = fast and kind == "channel"
            return torch._scaled_mm(
                rounded, raw.t(), scale_a=scales, scale_b=of_rows, out_dtype=BF16, use_fast_accum=fast
            )

        times = [
            graph_ms([each] * 3, 4) / 3 * 1e3
            for each in (
                partial(torch.mm, x, plain.t()),
                partial(scaled_mm, True),
                partial(scaled_mm, False),
                rounding,
                partial(widen, weight, BF16, pdl=True),
            )
        ]
        exact = rounded.float() * expand(scales, (1, group_of(weight) or k), *rounded.shape)
        exact = exact @ weight.dequantized(torch.float32).t()
        errors = [float((scaled_mm(fast).float() - exact).norm() / exact.norm()) for fast in (True, False)]
        total = [a + b for a, b in zip(total, times, strict=True)]
        print(
            f"{model} {kind} {name:7} {rows} rows: mm {times[0]:.1f} us, fast {times[1]:.1f}, exact "
            f"{times[2]:.1f}, rounding {times[3]:.1f}, widening {times[4]:.1f}; "
            f"errors {errors[0]:.5f} {errors[1]:.5f}",
            flush=True,
        )
    print(f"{model} {kind} {rows} rows, a layer: {' '.join(f'{each:.1f}' for each in total)} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["Qwen2-7B"], choices=MODELS)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 2, 8, 35, 64, 128, 8192])
    parser.add_argument("--kind", default="channel", choices=("channel", "block"))
    parser.add_argument("--floor", type=float, default=4.594)
    parser.add_argument("--rounds", action="store_true", help="of x in codes, too")
    parser.add_argument("--no-bf16", action="store_true", help="leave the kernels for bf16 out")
    parser.add_argument("--many", action="store_true", help="torch's products, of few rows, too")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    begun = time.monotonic()
    with torch.inference_mode():
        if args.compile:
            todo = list(jobs(args.models, args.rows, args.kind, args.rounds))
            with multiprocessing.get_context("spawn").Pool(min(6, len(os.sched_getaffinity(0)))) as pool:
                pool.map(compile_one, todo, chunksize=2)
            print(f"{len(todo)} kernels compiled in {time.monotonic() - begun:.0f} s", flush=True)
            return
        for model, rows in itertools.product(args.models, args.rows):
            if time.monotonic() - begun > args.seconds:
                print("no time left", flush=True)
                break
            if args.many or rows > MAX_STREAMED_ROWS:
                time_many(model, rows, args.kind)
            else:
                time_few(model, rows, args.kind, args.floor, args.rounds, not args.no_bf16)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
