"""Times the experts of one layer against the bytes of those that the tokens choose, and finds their tilings.

    python scripts/gpu/check_experts.py [--tune] [--codes] [--models NAME ...] [--rows N ...] [--out FOLDER]
    python scripts/gpu/check_experts.py --mxfp4 [--tilings] [--models gpt-oss-20b gpt-oss-120b] [--rows N ...]

Everything is timed inside CUDA graphs, over random tokens that choose other experts in every call; the median
of the replays is shown. For correctness see tests/ops/test_triton_experts.py, which runs on a GPU, too.
`--tune` tries tilings for each product and number of tokens, and writes all times to
FOLDER/tune_experts.json.

`--mxfp4` times a layer of gpt-oss, sorted by expert and, up to 16 tokens, also without sorting
(`ops.gpu.mxfp4_experts`), in turns, and prints by how much the two results differ. With `--tilings` it times
both sorted products by themselves, the tiling in use (`mxfp4_tiling` in `ops/gpu/experts.py`) first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import torch
from check_ops import BF16, DEVICE, graph_ms, normal
from torch import Tensor
from triton.runtime.errors import OutOfResources

from microvllm.adapters.formats.mxfp4 import round_to_mxfp4
from microvllm.ops.activation import CLAMPED
from microvllm.ops.experts import ExpertBiases, ExpertWeights
from microvllm.ops.gpu import experts as gpu_experts
from microvllm.ops.gpu.expert_gemv import expert_gemv
from microvllm.ops.gpu.experts import MAX_GEMV_TOKENS, GpuExperts
from microvllm.ops.gpu.grouped import GroupedTiling, GroupedWeight, sum_choices
from microvllm.ops.gpu.mxfp4 import Mxfp4Weight
from microvllm.ops.gpu.operators import GpuOperators
from microvllm.ops.gpu.routing import choose, sort_choices
from microvllm.ops.gpu.tiling import Tiling
from microvllm.ops.mxfp4 import Mxfp4Tensor
from microvllm.ops.routing import Routing
from microvllm.ops.scaled import E4M3, ScaledTensor

READ_BYTES_S = 4.594e12  # of an H200, measured
# name: (hidden, width of an expert, experts, chosen)
MODELS = {
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "gpt-oss-120b": (2880, 2880, 128, 4),
}
MXFP4_SHAPES = ((64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 8, 2), (128, 8, 3))  # columns, warps, stages
CALLS = 8  # with other tokens each
Call = Callable[[], object]


def in_blocks(weight: Tensor) -> ScaledTensor:
    """In e4m3, a scale for each block of 128 x 128."""
    scales = torch.full((weight.shape[0] // 128, weight.shape[1] // 128), 1e-3, device=DEVICE)
    return ScaledTensor.of((weight * 1e3).to(E4M3), scales, (128, 128))


class Layer:
    """Random weights of one layer, and tokens with what they choose."""

    def __init__(self, model: str, *, codes: bool = False) -> None:
        self.hidden, self.width, self.count, self.chosen = MODELS[model]
        self.routing = Routing(num_chosen=self.chosen)
        # Logits of a deviation of 1, as dummy weights give: nearly every expert as often.
        self.weights = ExpertWeights(
            normal(self.count, self.hidden) * (50 / self.hidden**0.5),
            torch.empty(self.count * 2 * self.width, self.hidden, dtype=BF16, device=DEVICE),
            torch.empty(self.count * self.hidden, self.width, dtype=BF16, device=DEVICE),
        )
        for matrix in self.weights[1:3]:
            matrix.normal_(0, 0.02)
        if codes:
            in_codes = {name: in_blocks(getattr(self.weights, name)) for name in ("gate_up", "down")}
            self.weights = self.weights._replace(**in_codes)
        self.norm = normal(self.hidden) + 1, 1e-6
        self.gate_up = GroupedWeight(self.weights.gate_up, self.width, BF16, gated=True, boxes=True)
        self.down = GroupedWeight(self.weights.down, self.hidden, BF16, boxes=True)
        _, self.experts = GpuOperators(BF16, DEVICE, "triton").experts(
            self.norm, self.weights, self.routing, "silu"
        )

    def tokens(self, rows: int) -> list[Tensor]:
        return [normal(rows, self.hidden) * 50 for _ in range(CALLS)]

    def choices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return choose(x @ self.weights.router.t(), self.routing)

    def bytes_of(self, xs: list[Tensor]) -> float:
        """Of the matrices of all chosen experts, on average."""
        distinct = sum(self.choices(x)[1].unique().numel() for x in xs) / len(xs)
        return distinct * 3 * self.hidden * self.width * self.weights.down.dtype.itemsize


class Mxfp4Layer(Layer):
    """As `Layer`, with a clamped SwiGLU, biases, and the experts both ways: sorted, and of few tokens not."""

    def __init__(self, model: str) -> None:
        self.hidden, self.width, self.count, self.chosen = MODELS[model]
        self.routing = Routing(num_chosen=self.chosen)
        shapes = (self.count * 2 * self.width, self.hidden), (self.count * self.hidden, self.width)
        self.weights = ExpertWeights(
            normal(self.count, self.hidden) * (50 / self.hidden**0.5),
            *(self._random(*shape) for shape in shapes),
            biases=ExpertBiases(None, *(normal(rows) for rows, _ in shapes)),
        )
        self.norm = normal(self.hidden) + 1, 1e-6
        gate_up, down = self.weights.biases.gate_up, self.weights.biases.down
        self.gate_up = Mxfp4Weight(self.weights.gate_up, self.width, gate_up, gated=True, clamped=True)
        self.down = Mxfp4Weight(self.weights.down, self.hidden, down)
        self.ways: dict[str, GpuExperts] = {
            name: self._experts(few) for name, few in (("sorted", False), ("few", True))
        }

    def _random(self, rows: int, columns: int) -> Mxfp4Tensor:
        """Of as many random rows as an expert has, for all of them: other bits read no faster."""
        one = round_to_mxfp4(normal(rows // self.count, columns) * 50 / columns**0.5)
        words, scales = one.as_subclass(Tensor), one.scales
        return Mxfp4Tensor.of(words.repeat(self.count, 1), columns, scales.repeat(self.count, 1))

    def _experts(self, few: bool) -> GpuExperts:
        operators = GpuOperators(BF16, DEVICE, "triton")
        operators.levers = replace(operators.levers, few_mxfp4=few)
        made = operators.experts(self.norm, self.weights, self.routing, CLAMPED)[1]
        assert isinstance(made, GpuExperts)
        return made

    def bytes_of(self, xs: list[Tensor]) -> float:
        distinct = sum(self.choices(x)[1].unique().numel() for x in xs) / len(xs)
        matrices = self.weights.gate_up, self.weights.down
        return distinct / self.count * sum(each.nbytes + each.scales.nbytes for each in matrices)


def time_both_ways(layer: Mxfp4Layer, rows: int) -> None:
    xs = layer.tokens(rows)
    ways = dict(layer.ways) if rows <= gpu_experts.MAX_MXFP4_TOKENS else {"sorted": layer.ways["sorted"]}
    read = layer.bytes_of(xs)
    floor = read / READ_BYTES_S * 1e6
    shown = []
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, experts in ways.items():
            times[name].append(graph_ms([partial(experts, x, x.clone()) for x in xs]) / CALLS * 1e3)
    for name, taken in times.items():
        us = sorted(taken)[1]
        shown.append(f"{name} {us:7.1f} us ({floor / us:4.0%} of the bytes' rate)")
    if len(ways) == 2:
        one, other = (experts(xs[0], None).float() for experts in ways.values())
        shown.append(f"differing by {float((one - other).norm() / one.norm()):.1e}")
    print(f"{rows:5} tokens: floor {floor:6.1f} us, {read / 1e6:6.1f} MB; " + "; ".join(shown), flush=True)


def time_tilings(layer: Mxfp4Layer, rows: int) -> None:
    """The sorted products, each alone, with as many rows of a tile as are in use, half and twice as many."""
    xs = layer.tokens(rows)
    for name, call in (("gate_up", gated_call), ("down", down_call)):
        used = layer.ways["sorted"].tiling(rows * layer.chosen, BF16.itemsize, gated=name == "gate_up")
        sizes = dict.fromkeys((used.rows, max(8, used.rows // 2), min(64, 2 * used.rows)))
        shapes = itertools.product(sizes, MXFP4_SHAPES)
        tilings = [
            replace(used, rows=each, columns=columns, warps=warps, stages=stages)
            for each, (columns, warps, stages) in shapes
        ]
        times = {}
        for tiling in dict.fromkeys((used, *tilings)):
            try:
                calls = [call(layer, x, tiling) for x in xs]
                times[tiling] = graph_ms(calls) / len(calls) * 1e3
            except OutOfResources:
                continue
        shown = "  ".join(
            f"{us:.1f} {(each.rows, each.columns, each.warps, each.stages)}"
            for each, us in sorted(times.items(), key=lambda each: each[1])
        )
        print(f"{rows:5} tokens, {name}: {shown}; in use {times[used]:.1f}", flush=True)


def time_layer(layer: Layer, rows: int) -> None:
    xs = layer.tokens(rows)
    us = graph_ms([partial(layer.experts, x, x.clone()) for x in xs]) / CALLS * 1e3
    read = layer.bytes_of(xs)
    floor = read / READ_BYTES_S * 1e6
    flops = 6 * rows * layer.chosen * layer.hidden * layer.width
    print(
        f"{rows:5} tokens: {us:8.1f} us, floor {floor:7.1f} us ({floor / us:4.0%}), {read / 1e6:6.0f} MB"
        f" {read / us / 1e6:.2f} TB/s, {flops / us / 1e6:.0f} TFLOP/s",
        flush=True,
    )


# ---- tuning ---------------------------------------------------------------------------------------


def candidates(rows: int, *, gated: bool) -> list[GroupedTiling]:
    """Tilings that fill the shared memory of a multiprocessor by one program, or by two."""
    if rows <= 32:
        ways = ((False, False), (True, True))
        shapes = itertools.product(ways, ((64, 4), (128, 4)), (64, 128))
    else:
        ways = ((False, False), (False, True))
        shapes = itertools.product(ways, ((64, 4), (128, 4), (128, 8), (256, 8)), (64,))
    found = {}
    for (swapped, boxes), (columns, warps), block_k in shapes:
        step = ((2 if gated else 1) * columns + rows) * block_k * BF16.itemsize
        sums = (2 if gated else 1) * columns * rows / (32 * warps)
        for budget in (225_000, 112_000):
            stages = min(budget // step, 8)
            if stages >= 2 and sums <= 128:
                found[GroupedTiling(rows, columns, block_k, warps, stages, swapped, boxes)] = None
    return list(found)


GEMV = [
    Tiling(n, k, warps)
    for n, k, warps in itertools.product((2, 4, 8), (256, 512, 1024), (4, 8))
    if 4 <= n * k / (32 * warps) <= 32
]


def gated_call(layer: Layer, x: Tensor, tiling: GroupedTiling) -> Call:
    _, chosen = layer.choices(x)
    sort = sort_choices(chosen, layer.count, tiling.rows)
    return lambda: layer.gate_up(x, sort, layer.chosen, tiling, pdl=True)


def down_call(layer: Layer, x: Tensor, tiling: GroupedTiling) -> Call:
    weights, chosen = layer.choices(x)
    sort, inner = sort_choices(chosen, layer.count, tiling.rows), normal(chosen.numel(), layer.width)
    return lambda: layer.down(inner, sort, layer.chosen, tiling, scales=weights, pdl=True)


def gemv_call(layer: Layer, x: Tensor, inner: Tiling, outer: Tiling) -> Call:
    weights, chosen = layer.choices(x)
    matrices = layer.weights.gate_up, layer.weights.down
    return lambda: expert_gemv(
        x, *matrices, weights, chosen, x.clone(), *layer.norm, inner=inner, outer=outer, pdl=True
    )


Job = tuple[str, bool, GroupedTiling]  # model, gated, tiling


def compile_one(job: Job) -> bool:
    """In a process of its own, on a layer of few experts; the result goes to Triton's cache on the disk."""
    model, gated, tiling = job
    hidden, width, count, chosen = MODELS[model]
    picked = torch.arange(chosen, dtype=torch.int32, device=DEVICE)[None]
    sort = sort_choices(picked, count, tiling.rows)
    scales = torch.ones(1, chosen, device=DEVICE)
    try:
        if gated:
            x, weight = normal(1, hidden), normal(chosen * 2 * width, hidden)
            GroupedWeight(weight, width, BF16, gated=True, boxes=True)(x, sort, chosen, tiling, pdl=True)
        else:
            x, weight = normal(chosen, width), normal(chosen * hidden, width)
            GroupedWeight(weight, hidden, BF16, boxes=True)(x, sort, chosen, tiling, scales=scales, pdl=True)
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, ...: this tiling is none
        print(f"no {job}: {error}"[:200], flush=True)
        return False
    return True


def compile_gemv(job: tuple[str, Tiling]) -> None:
    """As `compile_one`."""
    model, tiling = job
    hidden, width, _, chosen = MODELS[model]
    matrices = normal(chosen * 2 * width, hidden), normal(chosen * hidden, width)
    picked = torch.arange(chosen, dtype=torch.int32, device=DEVICE)[None]
    x, norm, scales = normal(1, hidden), normal(hidden), torch.ones(1, chosen, device=DEVICE)
    expert_gemv(x, *matrices, scales, picked, x, norm, 1e-6, inner=tiling, outer=tiling, pdl=True)
    torch.cuda.synchronize()


def tune(model: str, rows: list[int], tiles: list[int], out: Path, seconds: float, processes: int) -> None:
    begin = time.monotonic()
    jobs: list[Job] = [
        (model, gated, tiling)
        for gated in (True, False)
        for size in tiles
        for tiling in candidates(size, gated=gated)
    ]
    if processes:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            compiled = pool.map(compile_one, jobs, chunksize=2)
            if min(rows) <= MAX_GEMV_TOKENS:
                pool.map(compile_gemv, [(model, tiling) for tiling in GEMV], chunksize=2)
        jobs = [job for job, ok in zip(jobs, compiled, strict=True) if ok]
        print(f"{len(jobs)} tilings compiled in {time.monotonic() - begin:.0f} s", flush=True)
    if time.monotonic() - begin > seconds:
        return
    layer, results = Layer(model), []
    for count in rows:
        xs = layer.tokens(count)
        read = layer.bytes_of(xs)
        for gated in (True, False):
            make, share = (gated_call, 2 / 3) if gated else (down_call, 1 / 3)
            times = []
            for _, _, tiling in (job for job in jobs if job[1] == gated):
                if time.monotonic() - begin > seconds:
                    break
                try:
                    us = graph_ms([make(layer, x, tiling) for x in xs], 5) / CALLS * 1e3
                except OutOfResources:
                    continue
                times.append((us, astuple(tiling)))
            times.sort()
            name = "gate_up" if gated else "down"
            results.append((count, name, times))
            best = "  ".join(f"{us:.1f}: {tiling}" for us, tiling in times[:6])
            floor = share * read / READ_BYTES_S * 1e6
            print(f"{count:5} tokens {name:8} floor {floor:.1f} us  {best}", flush=True)
        if count <= MAX_GEMV_TOKENS:
            for which in ("inner", "outer"):
                times = []
                for tiling in GEMV:
                    both = {"inner": Tiling(4, 512, 4), "outer": Tiling(4, 1024, 4), which: tiling}
                    us = graph_ms([gemv_call(layer, x, **both) for x in xs], 5) / CALLS * 1e3
                    times.append((us, astuple(tiling)))
                times.sort()
                results.append((count, which, times))
                best = "  ".join(f"{us:.1f}: {tiling}" for us, tiling in times[:6])
                print(f"{count:5} tokens {which:8} both {best}", flush=True)
        (out / "tune_experts.json").write_text(json.dumps(results))


def time_others(layer: Layer, rows: int) -> None:
    """The kernels around the products."""
    x = normal(rows, layer.hidden)
    logits = x @ layer.weights.router.t()
    _, chosen = choose(logits, layer.routing)
    parts = normal(rows * layer.chosen, layer.hidden)
    calls = {
        "choose": lambda: choose(logits, layer.routing, pdl=True),
        "sort": lambda: sort_choices(chosen, layer.count, 16, pdl=True),
        "sum": lambda: sum_choices(parts, layer.chosen, x, pdl=True),
    }
    times = {name: graph_ms([call] * CALLS) / CALLS * 1e3 for name, call in calls.items()}
    print(f"{rows:5} tokens: " + ", ".join(f"{name} {us:.1f} us" for name, us in times.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--codes", action="store_true", help="matrices in FP8, unless --tune")
    parser.add_argument("--mxfp4", action="store_true", help="matrices in MXFP4, of gpt-oss")
    parser.add_argument("--tilings", action="store_true", help="of the sorted products, for --mxfp4")
    parser.add_argument("--models", nargs="*", choices=MODELS)
    parser.add_argument("--rows", nargs="*", type=int)
    parser.add_argument("--tiles", nargs="*", type=int, default=[16], help="rows of a tile, for --tune")
    parser.add_argument("--seconds", type=float, default=100, help="for --tune; 0 only compiles")
    parser.add_argument("--processes", type=int, default=4, help="that compile, for --tune; 0: none")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    if args.mxfp4 and (args.tune or args.codes):
        parser.error("--mxfp4 goes with neither --tune nor --codes")
    if args.tilings and not args.mxfp4:
        parser.error("--tilings goes with --mxfp4")
    few = [1, 2, 4, 8, 16, 35, 64]
    all_rows = args.rows or [*few, *([256] if args.mxfp4 else [128, 256, 1024, 8192])]
    gpu_experts.MAX_MXFP4_TOKENS = 16
    with torch.inference_mode():
        for model in args.models or ["gpt-oss-20b" if args.mxfp4 else "Qwen3-30B-A3B"]:
            print(model, flush=True)
            if args.tune:
                tune(model, all_rows, args.tiles, args.out, args.seconds, args.processes)
                continue
            layer = Mxfp4Layer(model) if args.mxfp4 else Layer(model, codes=args.codes)
            if args.tilings and isinstance(layer, Mxfp4Layer):
                for rows in all_rows:
                    time_tilings(layer, rows)
                continue
            for rows in all_rows:
                time_both_ways(layer, rows) if isinstance(layer, Mxfp4Layer) else time_layer(layer, rows)
            for rows in all_rows:
                time_others(layer, rows)


if __name__ == "__main__":
    main()
