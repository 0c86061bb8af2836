"""Times the GPU operators against cuBLAS and against the bytes they move, and finds the products' tilings.

    python scripts/gpu/check_ops.py [--tune] [--out FOLDER]

Everything is timed inside CUDA graphs, over copies of the inputs that together do not fit the L2 cache; the
median of the replays is shown. For correctness see tests/ops/test_triton_ops.py, which runs on a GPU, too.
`--tune` tries many tilings for each product and writes all times to FOLDER/tune.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from microvllm.ops.gpu.activation import silu_and_mul
from microvllm.ops.gpu.norm import rms_norm
from microvllm.ops.gpu.operators import GpuOperators
from microvllm.ops.gpu.sampling import TokenSampler
from microvllm.ops.gpu.skinny import MAX_SPLIT_TILES, skinny_linear
from microvllm.ops.gpu.tiling import Tiling, prefers_gemv

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
CACHE_BYTES = 150_000_000  # of copies that a timing rotates through: three times the L2 cache
# name: (hidden, heads, kv_heads, head_dim, intermediate, vocab, qkv bias)
MODELS = {
    "Qwen3-0.6B": (1024, 16, 8, 128, 3072, 151936, False),
    "Qwen2-7B": (3584, 28, 4, 128, 18944, 152064, True),
    "Qwen2-7B-of-2": (3584, 14, 2, 128, 9472, 76032, True),  # what one of two ranks computes
    "Qwen2.5-0.5B": (896, 14, 2, 64, 4864, 151936, True),
    "SmolLM2-135M": (576, 9, 3, 64, 1536, 49152, False),
    "Llama-3-8B": (4096, 32, 8, 128, 14336, 128256, False),
}
LAYERS = 28
Product = tuple[int, int, bool, bool, bool]  # n, k, gated, norm, residual


def products(model: str) -> dict[str, Product]:
    hidden, heads, kv_heads, dim, inter, vocab, _ = MODELS[model]
    return {
        "qkv": ((heads + 2 * kv_heads) * dim, hidden, False, True, False),
        "o": (hidden, heads * dim, False, False, True),
        "gate_up": (inter, hidden, True, True, False),
        "down": (hidden, inter, False, False, True),
        "head": (vocab, hidden, False, True, False),
    }


def graph_ms(
    calls: list[Callable[[], object]],
    replays: int = 7,
    choose: Callable[[list[float]], float] = statistics.median,
) -> float:
    """Milliseconds of one pass over the calls, captured as one graph; `choose` takes it from the replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return choose(times[1:])


def rotated(make: Callable[[], Tensor], passes: int = 24) -> list[Tensor]:
    """At least `passes` references to copies of a tensor that together do not fit the cache."""
    first = make()
    copies = [first]
    while len(copies) * first.nbytes < CACHE_BYTES or len(copies) < 2:
        copies.append(make())
    return list(itertools.islice(itertools.cycle(copies), max(passes, len(copies))))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=BF16) * 0.02


# ---- tuning ---------------------------------------------------------------------------------------


def candidates(m: int, product: Product) -> list[Tiling]:
    n, k, gated, _, _ = product
    if prefers_gemv(m, n, k, gated=gated):
        wishes = [
            (2, 512, 4),
            (4, 512, 4),
            (1, 1024, 4),
            (2, 1024, 4),
            (4, 1024, 4),
            (8, 512, 4),
            (1, 2048, 8),
        ]
        wishes += [(2, 2048, 8), (4, 2048, 8)]
        most = 16 // m // (2 if gated else 1)
        return [Tiling(*wish) for wish in wishes if wish[0] <= max(most, 2) and wish[1] < 2 * k]
    # What is in flight is stages * (block_n + m) * block_k * 2 bytes.
    found = []
    for (block_n, block_k, stages), per_sm in itertools.product(
        ((16, 256, 3), (32, 128, 4), (32, 256, 3), (64, 128, 3), (64, 64, 5)), (1, 2, 4)
    ):
        splits = max(1, per_sm * 132 // -(-n // block_n))
        tiling = Tiling(block_n, block_k, 4, stages, splits)
        if tiling not in found and splits * block_k <= k:
            found.append(tiling)
    return found


def run_product(
    m: int, product: Product, tiling: Tiling | None, weights: list[Tensor]
) -> list[Callable[[], object]]:
    n, k, gated, norm, residual = product
    x, gamma, added = normal(m, k), normal(k), normal(m, n)
    arrivals = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)

    def call(weight: Tensor) -> Callable[[], object]:
        return lambda: skinny_linear(
            x,
            weight,
            arrivals,
            norm=gamma if norm else None,
            eps=1e-6,
            residual=added if residual else None,
            gated=gated,
            tiling=tiling,
            pdl=True,
        )

    return [call(weight) for weight in weights]


def compile_one(job: tuple[int, Product, Tiling]) -> bool:
    """In a process of its own; the result goes to Triton's cache on the disk."""
    m, (n, k, gated, norm, residual), tiling = job
    weight = torch.empty(2 * n if gated else n, k, device=DEVICE, dtype=BF16)
    try:
        run_product(m, (n, k, gated, norm, residual), tiling, [weight])[0]()
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, ...: this tiling is none
        print(f"no {job}: {error}"[:160], flush=True)
        return False
    return True


def tune(models: list[str], rows: list[int], out: Path, seconds: float) -> None:
    begin = time.monotonic()
    jobs = [
        (m, product, tiling)
        for model in models
        for product in products(model).values()
        for m in rows
        for tiling in candidates(m, product)
    ]
    # One kernel serves all rows from 5 to 16.
    compiled = [job for job in jobs if job[0] != 8]
    with multiprocessing.get_context("spawn").Pool(16) as pool:
        good = {
            job for job, ok in zip(compiled, pool.map(compile_one, compiled, chunksize=4), strict=True) if ok
        }
    print(f"{len(good)} of {len(compiled)} kernels compiled in {time.monotonic() - begin:.0f} s", flush=True)
    results = []
    for model, m in itertools.product(models, rows):
        for name, product in products(model).items():
            if time.monotonic() - begin > seconds:
                print("no time left", flush=True)
                break
            n, k, gated, _, _ = product
            weights = rotated(lambda n=n, k=k, gated=gated: normal(2 * n if gated else n, k), 12)
            x = normal(m, k)
            plain = graph_ms([partial(torch.mm, x, w.t()) for w in weights]) / len(weights) * 1e3
            times = []
            for tiling in candidates(m, product):
                if (16 if m == 8 else m, product, tiling) not in good:
                    continue
                us = graph_ms(run_product(m, product, tiling, weights), 5) / len(weights) * 1e3
                times.append((us, tiling.block_n, tiling.block_k, tiling.warps, tiling.stages, tiling.splits))
            times.sort()
            gigabytes = weights[0].nbytes / 1e9
            results.append([model, name, m, product, plain, times])
            best = " ".join(f"{t[0]:.2f}:{t[1]}x{t[2]}w{t[3]}s{t[4]}/{t[5]}" for t in times[:3])
            rate = gigabytes / times[0][0] * 1e3
            print(f"{model[:10]} {name:7} m={m:<2} mm {plain:6.2f} us  {rate:.2f} TB/s  {best}", flush=True)
            (out / "tune.json").write_text(json.dumps(results))


# ---- what a decode step costs ---------------------------------------------------------------------------


def time_step(model: str, rows: list[int]) -> None:
    """All products of a step with norms, SwiGLU and residuals: our operators, and cuBLAS's bare products."""
    hidden, heads, kv_heads, dim, inter, vocab, bias = MODELS[model]
    ops = GpuOperators(BF16, DEVICE, "triton")
    norm, offset = normal(hidden) + 1, normal((heads + 2 * kv_heads) * dim) if bias else None
    layers = []
    for _ in range(LAYERS):
        qkv, o = normal((heads + 2 * kv_heads) * dim, hidden), normal(hidden, heads * dim)
        gate_up, down = normal(2 * inter, hidden), normal(hidden, inter)
        fused = (
            ops.norm_linear(norm, 1e-6, qkv, offset),
            ops.linear(o),
            ops.norm_gate_up(norm, 1e-6, gate_up),
            ops.linear(down),
        )
        layers.append((fused, (qkv, o, gate_up, down)))
    last = normal(vocab, hidden)
    head = ops.norm_linear(norm, 1e-6, last)
    read = sum(w.nbytes for _, weights in layers for w in weights) + last.nbytes
    for m in rows:
        x, attended, act = normal(m, hidden), normal(m, heads * dim), normal(m, inter)

        def ours(x: Tensor = x, attended: Tensor = attended) -> None:
            stream = x.clone()
            for (qkv, o, gate_up, down), _ in layers:
                qkv(stream)
                stream = o(attended, stream)
                stream = down(gate_up(stream), stream)
            head(stream)

        def plain(x: Tensor = x, attended: Tensor = attended, act: Tensor = act) -> None:
            for _, (qkv, o, gate_up, down) in layers:
                for a, w in ((x, qkv), (attended, o), (x, gate_up), (act, down)):
                    torch.mm(a, w.t())
            torch.mm(x, last.t())

        a, b = graph_ms([ours]), graph_ms([plain])
        print(
            f"step {model:12} m={m:<3} ours {a:.3f} ms {read / a / 1e9:.2f} TB/s   mm alone {b:.3f} ms"
            f" {read / b / 1e9:.2f} TB/s",
            flush=True,
        )
    torch.cuda.empty_cache()


def time_others() -> None:
    for n, d in ((1, 1024), (64, 3584), (2048, 3584)):
        xs, gamma = rotated(lambda n=n, d=d: normal(n, d)), normal(d)
        us = graph_ms([partial(rms_norm, x, gamma, 1e-6, pdl=True) for x in xs]) / len(xs) * 1e3
        print(f"rms_norm {n} x {d}: {us:.2f} us {2 * xs[0].nbytes / us / 1e6:.2f} TB/s", flush=True)
        xs = rotated(lambda n=n, d=d: normal(n, 6 * d))
        us = graph_ms([partial(silu_and_mul, x, pdl=True) for x in xs]) / len(xs) * 1e3
        print(f"silu_and_mul {n} x {6 * d}: {us:.2f} us {1.5 * xs[0].nbytes / us / 1e6:.2f} TB/s", flush=True)


def time_sampling() -> None:
    vocab = 151936
    ways = (
        ("greedy", 0.0, 0, 1.0),
        ("gumbel", 1.0, 0, 1.0),
        ("top-k 20 top-p .95", 0.6, 20, 0.95),
        ("top-p .9", 1.0, 0, 0.9),
    )
    for dtype, m in itertools.product((BF16, torch.float32), (1, 8, 64, 256)):
        sampler = TokenSampler(m, DEVICE, pdl=True)
        rows = torch.arange(m, device=DEVICE)
        logits = rotated(lambda m=m, dtype=dtype: torch.randn(m, vocab, device=DEVICE).to(dtype) * 3, 4)[:8]
        line = f"sample {m} x {vocab} {str(dtype)[6:]}:"
        for name, t, k, p in ways:
            tables = {
                "temperature": torch.full((m,), t, device=DEVICE),
                "top_k": torch.full((m,), k, device=DEVICE, dtype=torch.int32),
                "top_p": torch.full((m,), p, device=DEVICE),
                "min_p": torch.zeros(m, device=DEVICE),
                "seed": rows * 7919,
            }
            filters = k > 0 or p < 1
            calls = [partial(sampler, x, rows, rows, filters=filters, **tables) for x in logits]
            us = graph_ms(calls) / len(calls) * 1e3
            line += f"  {name} {us:.1f} us ({logits[0].nbytes / us / 1e6:.2f} TB/s)"
        argmax = graph_ms([partial(torch.argmax, x, -1) for x in logits]) / len(logits) * 1e3
        print(f"{line}  torch.argmax {argmax:.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--models", nargs="*", default=["Qwen3-0.6B", "Qwen2-7B"], choices=MODELS)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=100, help="for --tune")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    with torch.inference_mode():
        if args.tune:
            tune(args.models, args.rows, args.out, args.seconds)
            return
        time_others()
        time_sampling()
        for model in args.models:
            time_step(model, args.rows)


if __name__ == "__main__":
    main()
