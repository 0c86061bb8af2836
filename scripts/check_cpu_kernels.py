#!/usr/bin/env python3
"""Check and time the CPU kernels on this machine: every instruction-set level, then the costs of a step.

    python scripts/check_cpu_kernels.py [--threads N] [--model smollm2-135m-instruct] [--steps 60]

Prints Markdown. The matrix products are those of SmolLM2-135M in bfloat16, each layer with its own weights;
the floor is the time to read them once at the bandwidth that a plain loop in C reaches. Attention of a prompt
is beside what one thread multiplies in float32 (AVX-512 only), in processor time, of which the least counts.
The last table is of real decode steps: what part of the time is spent outside the kernels. Ends with 1 if a
kernel is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from microvllm.ops.attention import AttentionBatch, AttentionConfig, AttentionShape, SegmentTable
from microvllm.ops.cpu import build, isa, operators
from microvllm.ops.cpu.build import find_compiler, load_kernels
from microvllm.ops.cpu.calibration import calibrate, calibrated, processor_name
from microvllm.ops.cpu.operators import CpuOperators
from microvllm.ops.norm import rms_norm
from microvllm.runtime import machine
from microvllm.runtime.engine import InferenceEngine

HIDDEN, INNER, LAYERS = 576, 1536, 30
ROWS = (1, 2, 4, 8, 12, 16, 32, 64, 256, 1024)
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 16
PROMPTS = ((512, 0), (512, 1000), (512, 3500))  # new tokens, and those in the cache
TURNS = 5
TURNS_IN_TURN = 40
MAX_ERROR = 1e-5
MAX_ERROR_IN_TWO_PARTS = 3e-5  # activations as two numbers of bfloat16, on the matrix unit
WEIGHTS = {"bfloat16": {"dtype": "bfloat16", "gguf_weights": "dequantized"}, "as in the file": {}}
THRESHOLD = operators.MAX_KERNEL_ROWS_BF16

# Each thread reads its share with four sums, so that only memory is waited for.
STREAM = r"""
#include <pthread.h>
typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef struct { const char *begin; long bytes; float sum; } Part;
static void *read_part(void *argument)
{
    Part *part = argument;
    vec sum[4] = {};
    for (long i = 0; i + 128 <= part->bytes; i += 128)
        for (int j = 0; j < 4; j++) sum[j] += *(const vec *)(part->begin + i + 32 * j);
    part->sum = sum[0][0] + sum[1][1] + sum[2][2] + sum[3][3];
    return 0;
}
float read_all(const char *data, long bytes, int threads)
{
    pthread_t ids[1024];
    Part parts[1024];
    float sum = 0;
    for (int i = 0; i < threads; i++) {
        parts[i] = (Part){data + bytes / threads * i, bytes / threads, 0};
        pthread_create(&ids[i], 0, read_part, &parts[i]);
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], 0);
        sum += parts[i].sum;
    }
    return sum;
}
"""

# Products of numbers that one instruction of AVX-512 adds up, the feature it needs, and its code.
INSTRUCTIONS = {
    "vfmadd231ps (float32)": (16, "avx512f", "vfmadd231ps {x}, {x}, {sum}"),
    "vdpbf16ps (bfloat16)": (32, "avx512_bf16", "vdpbf16ps {x}, {x}, {sum}"),
    "vpdpbusd (8 bits)": (64, "avx512_vnni", "vpdpbusd {x}, {x}, {sum}"),
    "vpmaddubsw, vpaddw (8 bits)": (
        *(64, "avx512bw"),
        "vpmaddubsw {x}, {x}, %%zmm31; vpaddw %%zmm31, {sum}, {sum}",
    ),
}
# Twelve sums, so that none is waited for.
SUMS = 12
REPEAT = f"""
typedef float vec __attribute__((vector_size(64)));
float repeat(long count)
{{
    vec x = {{}}, {", ".join(f"a{i} = {{}}" for i in range(SUMS))};
    while (count--)
        __asm__ volatile(CODES : {", ".join(f'"+v"(a{i})' for i in range(SUMS))} : "v"(x) : "zmm31");
    return {" + ".join(f"a{i}[0]" for i in range(SUMS))};
}}
"""


def best_time(action: Callable[[], object], turns: int = TURNS) -> float:
    """Seconds of the fastest of several turns, the first of which does not count."""
    times = []
    for _ in range(turns + 1):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def compiled(source: str, flag: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        file, library = Path(folder) / "source.c", Path(folder) / "library.so"
        file.write_text(source)
        command = [*(find_compiler() or "cc").split(), "-O3", "-shared", "-fPIC", "-pthread", flag]
        subprocess.run([*command, str(file), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read from memory."""
    data = torch.ones(64 << 20)
    read = compiled(STREAM, "-march=native").read_all
    read.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    size = data.numel() * 4
    return size / best_time(lambda: read(data.data_ptr(), size, threads))


def repetition(code: str) -> Callable[[int], object]:
    """A function that runs the code SUMS times for each of so many turns."""
    codes = "; ".join(code.format(x=f"%{SUMS}", sum=f"%{i}") for i in range(SUMS))
    repeat = compiled(REPEAT.replace("CODES", f'"{codes}"'), "-mavx512f").repeat
    repeat.argtypes = [ctypes.c_long]
    return repeat


def products_per_second(products: int, code: str) -> float:
    """That one thread multiplies and adds up in registers."""
    repeat, count = repetition(code), 2_000_000
    return count * SUMS * products / best_time(lambda: repeat(count))


def prompt_attention(library: ctypes.CDLL, new: int, cached: int) -> tuple[float, float]:
    """Of a layer of SmolLM2-135M on one thread: seconds, and its products as part of those of the peak."""
    tokens, shape = new + cached, AttentionShape(1, HEADS, KV_HEADS, HEAD_DIM)
    table = torch.arange(-(-tokens // BLOCK))[None]
    sizes = table.numel(), BLOCK, torch.zeros(HEAD_DIM // 2), tokens, torch.bfloat16
    attention = CpuOperators(library, 1).attention(AttentionConfig(shape, *sizes))
    attention.cache.copy_(torch.randn(attention.cache.shape))
    at = torch.arange(cached, tokens)
    segments = SegmentTable(torch.tensor([0, new]), torch.tensor([tokens]), table, new)
    step = attention.begin_step(AttentionBatch(at, at, 0, table[:0], at[:0], segments))
    qkv = torch.randn(new, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    products, _, code = INSTRUCTIONS["vfmadd231ps (float32)"]
    repeat, count, times = repetition(code), 20_000, [float("inf")] * 2
    actions: tuple[Callable[[], object], ...] = (lambda: step(0, qkv), lambda: repeat(count))
    for _ in range(TURNS_IN_TURN):
        for i in (0, *[1] * 8):  # the clock rises while the loop runs
            begin = time.thread_time()
            actions[i]()
            times[i] = min(times[i], time.thread_time() - begin)
    work = 2 * HEADS * HEAD_DIM * float((at + 1).sum())
    return times[0], work / times[0] / (count * SUMS * products / times[1])


def loaded(library: Path) -> ctypes.CDLL:
    """The library, once the system has let it have the processor's registers: see isa.c."""
    kernels = ctypes.CDLL(str(library))
    if not kernels.runs_here():
        raise SystemExit(f"{library} does not run on this processor")
    return kernels


def registers(library: Path) -> str:
    """How often the code of a library names registers of each width."""
    if shutil.which("objdump") is None:
        return "no objdump"
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    return ", ".join(f"{len(re.findall(f'%{name}', code))} {name}" for name in ("zmm", "ymm", "xmm"))


def largest_error(ours: CpuOperators) -> float:
    """Of products with norm and SwiGLU, against float64, relative to the largest result."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for m in (1, 2, 3, 5, 6, 7, 12, 13, 30):
        for n, k in ((1, 1), (33, 70), (96, 577), (300, 1500)):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(m, k, generator=generator)
                weight = torch.randn(2 * n, k, generator=generator).to(dtype)
                norm = torch.randn(k, generator=generator)
                normed = rms_norm(x.double(), norm.double(), 1e-5)
                gate, up = (normed @ weight.double().t()).chunk(2, -1)
                expected = silu(gate) * up
                actual = ours.norm_gate_up(norm, 1e-5, weight)(x)
                worst = max(worst, float((actual - expected).abs().max() / expected.abs().max()))
    return worst


class Products:
    """The matrix products of the layers of SmolLM2-135M."""

    def __init__(self, ours: CpuOperators) -> None:
        def weight(n: int, k: int) -> Tensor:
            return torch.randn(n, k).mul_(0.02).bfloat16()

        norm = torch.ones(HIDDEN)
        self.all: list[tuple[Callable[[Tensor], Tensor], int]] = []
        for _ in range(LAYERS):
            self.all += [
                (ours.norm_linear(norm, 1e-5, weight(960, HIDDEN)), HIDDEN),
                (ours.linear(weight(HIDDEN, HIDDEN)), HIDDEN),
                (ours.norm_gate_up(norm, 1e-5, weight(2 * INNER, HIDDEN)), HIDDEN),
                (ours.linear(weight(HIDDEN, INNER)), INNER),
            ]
        self.weights = LAYERS * (960 * HIDDEN + HIDDEN**2 + 3 * HIDDEN * INNER)

    def seconds(self, m: int) -> float:
        inputs = {k: torch.randn(m, k) for k in (HIDDEN, INNER)}
        return best_time(lambda: [product(inputs[k]) for product, k in self.all])


class TimedFunction:
    """A function of the library that adds up the time of its calls."""

    def __init__(self, function: Any, spent: list[float]) -> None:
        self.__dict__.update(function=function, spent=spent)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.function, name, value)  # argtypes, restype

    def __call__(self, *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = self.function(*arguments)
        self.spent[0] += time.perf_counter() - begin
        self.spent[1] += 1
        return result


class TimedLibrary:
    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.spent = library, [0.0, 0.0]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.library, name)
        return found if name.startswith("_") else TimedFunction(found, self.spent)


def step_profile(
    model: str, weights: dict[str, str], streams: int, steps: int, threads: int
) -> tuple[float, float, float]:
    """Of the decode step of median length: seconds, those outside the kernels, and calls of them."""
    timed = TimedLibrary(load_kernels())
    build.load_kernels = lambda *_: timed  # type: ignore[assignment, return-value]
    try:
        engine = InferenceEngine(
            model,
            16,
            device="cpu",
            **weights,
            cpu_threads=threads,
            max_model_len=1024,
            num_gpu_blocks_override=256,
        )
    finally:
        build.load_kernels = load_kernels
    params = engine.sampling_params(max_tokens=steps + 8, temperature=0.0, ignore_eos=True)
    for i in range(streams):
        prompt = engine.processor.tokenize_prompt(f"{i} " + "The sea and the wind. " * 25)
        engine.core.add(engine.processor.requests(prompt, params)[0])
    for _ in range(5):
        engine.core.step()
    found = []
    for _ in range(steps):
        spent, calls, begin = *timed.spent, time.perf_counter()
        engine.core.step()
        whole = time.perf_counter() - begin
        found.append((whole, whole - (timed.spent[0] - spent), timed.spent[1] - calls))
    return sorted(found)[len(found) // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    parser.add_argument("--model", default="smollm2-135m-instruct", help="for the profile of whole steps")
    parser.add_argument("--steps", type=int, default=60, help="of that profile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    print(f"{processor_name()}, {args.threads} threads of {machine.usable_cores()} cores\n")
    rates = {threads: bandwidth(threads) for threads in sorted({1, args.threads})}
    print(", ".join(f"{rate / 1e9:.1f} GB/s on {threads} threads" for threads, rate in rates.items()))

    features = isa.cpu_features() or frozenset()
    if "avx512f" in features:
        print("\n| instruction | products, 10^9/s on 1 thread |\n|---|---|")
        for name, (products, feature, code) in INSTRUCTIONS.items():
            if feature in features:
                print(f"| {name} | {products_per_second(products, code) / 1e9:.0f} |")

    print("\n| level | registers named in its code | largest relative error |\n|---|---|---|")
    operators.MAX_KERNEL_ROWS_BF16 = 1 << 30
    usable, wrong = list(isa.usable_levels()), False
    for level in isa.levels():
        library = build.build_kernels(level)
        error = largest_error(CpuOperators(loaded(library), args.threads)) if level in usable else None
        text = "does not run here" if error is None else f"{error:.1e}"
        limit = MAX_ERROR_IN_TWO_PARTS if level.name == "amx" else MAX_ERROR
        wrong |= error is not None and not error < limit
        print(f"| {level.name} | {registers(library)} | {text} |")

    library = load_kernels()
    kept = calibrated(library)
    again = calibrate(library)
    print("\n| choice | default, other, turns that the other won: when it was kept | now |\n|---|---|---|")
    for what in {**kept.comparisons, **again.comparisons}:
        cells = (str(one.comparisons.get(what, "")) for one in (kept, again))
        print(f"| {what} | " + " | ".join(cells) + " |")
    print(f"| load of other processes | {kept.load:.0%} | {again.load:.0%} |")
    print(f"\nChosen at try {kept.tries}: {kept.tuning}; now it would be {again.tuning}.")

    has_library = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    names = [level.name for level in usable] + ["oneDNN"] * has_library
    print("\n| rows | floor | " + " | ".join(f"{name}, ms (GFLOP/s)" for name in names) + " |")
    print("|---" * (len(names) + 2) + "|")
    kernels = [
        Products(CpuOperators(loaded(build.build_kernels(level)), args.threads, tuning=kept.tuning))
        for level in usable
    ]
    # Kernels that multiply bfloat16 by themselves leave nothing to the library.
    by_library = next(
        one for one, level in zip(kernels, usable, strict=True) if "avx512_bf16" not in level.features
    )
    for m in ROWS:
        operators.MAX_KERNEL_ROWS_BF16 = 1 << 30
        times = [products.seconds(m) for products in kernels]
        if has_library:
            operators.MAX_KERNEL_ROWS_BF16 = 0
            times.append(by_library.seconds(m))
        work = 2 * m * kernels[0].weights
        cells = " | ".join(f"{1e3 * t:.2f} ({work / t / 1e9:.0f})" for t in times)
        print(f"| {m} | {1e3 * 2 * kernels[0].weights / max(rates.values()):.2f} ms | {cells} |", flush=True)
    operators.MAX_KERNEL_ROWS_BF16 = THRESHOLD

    if "avx512f" in features:
        print("\n| prompt attention | ms a layer | of the peak |\n|---|---|---|")
        for new, cached in PROMPTS:
            seconds, part = prompt_attention(library, new, cached)
            print(f"| {new} tokens behind {cached} | {1e3 * seconds:.2f} | {100 * part:.0f} % |", flush=True)

    print("\n| weights | streams | ms a step | outside the kernels | calls of kernels |")
    print("|---" * 5 + "|")
    for name, weights in WEIGHTS.items():
        for streams in (1, 8):
            whole, outside, calls = step_profile(args.model, weights, streams, args.steps, args.threads)
            share = f"{1e3 * outside:.2f} ms, {100 * outside / whole:.1f} %"
            print(f"| {name} | {streams} | {1e3 * whole:.2f} | {share} | {calls:.0f} |", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
