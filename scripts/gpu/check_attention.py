"""Times the decode attention backends on one GPU and prints microseconds per layer and KV bytes per second.

    python scripts/gpu/check_attention.py [--out FILE.json] [--tilings] [--only TEXT]

Each shape is timed as a CUDA graph of many calls over a KV cache larger than the second-level cache; the
figure is the median of the replays. `--tilings` tries other tilings of the Triton kernel, too; "fp8" is a
cache of e4m3, whose bytes a second count half. Correctness is the business of tests/gpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, AttentionConfig, AttentionShape, QKNorms, SegmentTable
from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.attention.flash_backend import FlashAttention
from microvllm.ops.attention.triton_backend import TritonAttention
from microvllm.ops.attention.triton_decode import DecodeTiling
from microvllm.ops.attention.triton_prefill import PrefillTiling
from microvllm.ops.gpu.levers import Levers

MODELS = {"28/4x128": AttentionShape(1, 28, 4, 128), "16/8x128 norms": AttentionShape(1, 16, 8, 128)}
WORK = [
    (1, 64),
    (1, 600),
    (1, 8000),
    (35, 600),
    (64, 850),
    (256, 850),
    (8, 8000),
]  # sequences, tokens of context
PREFILL = [(1, 512), (8, 1024), (1, 8192)]  # segments, new tokens of each
TILINGS = {
    "64x3 4w 3p": DecodeTiling(64, 3, 4, 3),
    "64x3 4w 4p": DecodeTiling(64, 3, 4, 4),
    "64x5 4w 2p": DecodeTiling(64, 5, 4, 2),
    "32x5 4w 3p": DecodeTiling(32, 5, 4, 3),
    "128x5 8w 1p": DecodeTiling(128, 5, 8, 1),
    "64x3 4w 4p boxes": DecodeTiling(64, 3, 4, 4, boxes=True),
    "64x5 4w 4p boxes": DecodeTiling(64, 5, 4, 4, boxes=True),
}
PREFILL_TILINGS = {
    "64x64x3 4w": PrefillTiling(64, 64, 3, 4),
    "64x64x5 4w": PrefillTiling(64, 64, 5, 4),
    "128x64x5 8w": PrefillTiling(128, 64, 5, 8),
}
CACHE_BYTES = 256 << 20  # of keys and values behind one graph: five times an H100's second-level cache
MAX_POSITION = 32768  # block tables are as wide as the longest sequence that a server may meet
REPLAYS = 25
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Variant:
    """One way to attend: "flash" or "triton", the block size, and what else may differ."""

    backend: str
    block: int
    tiling: str | None = None
    pdl: bool = True
    own_splits: bool = True
    fp8: bool = False

    @property
    def name(self) -> str:
        parts = [self.backend, f"b{self.block}", "fp8" * self.fp8, self.tiling]
        parts += ["no pdl"] * (not self.pdl) + ["its own splits"] * (not self.own_splits)
        return " ".join(part for part in parts if part)

    @property
    def cached(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.fp8 else DTYPE


def variants(with_tilings: bool) -> list[Variant]:
    found = [Variant("triton", 64), Variant("triton", 64, pdl=False), Variant("triton", 16)]
    found += [Variant("triton", 256), Variant("triton", 64, fp8=True)]
    if with_tilings:
        for fp8 in (False, True):
            found += [Variant("triton", 64, name, fp8=fp8) for name in (*TILINGS, *PREFILL_TILINGS)]
    if importlib.util.find_spec("flash_attn"):
        found.insert(0, Variant("flash", 256, pdl=False))
        found.insert(1, Variant("flash", 256, pdl=False, own_splits=False))
    return found


def make_backend(
    variant: Variant, shape: AttentionShape, device: torch.device
) -> TritonAttention | FlashAttention:
    norms = None
    if shape.num_kv_heads == 8:
        weight = torch.ones(shape.head_dim, dtype=DTYPE, device=device)
        norms = QKNorms(((weight, weight),) * 1000, 1e-6)
    inv_freq = 1e6 ** -(torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    scales = (KVScales(),) * 1000
    config = AttentionConfig(shape, 1, variant.block, inv_freq, MAX_POSITION, variant.cached, norms, scales)
    if variant.backend == "flash":
        flash = FlashAttention(config)
        if not variant.own_splits:
            flash.num_splits = lambda *_: 0
        return flash
    name = variant.tiling or ""
    return TritonAttention(
        config,
        pdl=variant.pdl,
        levers=Levers.of(device) if variant.pdl else None,
        decode_tiling=TILINGS.get(name),
        prefill_tiling=PREFILL_TILINGS.get(name),
    )


def put_cache(
    backend: TritonAttention | FlashAttention, random: Tensor, layers: int, num_blocks: int, block: int
) -> None:
    """Give the backend views of random keys and values, so that variants need not fill them anew."""
    kv_heads, dim = backend.shape.num_kv_heads, backend.shape.head_dim
    if isinstance(backend, FlashAttention):
        size = (layers, 2, num_blocks + 1, block, kv_heads, dim)
        backend.num_blocks = num_blocks
    else:
        size = (layers, 2, num_blocks, kv_heads, block, dim)
    cached = random.view(backend.cache.dtype)
    backend.cache = cached[: torch.Size(size).numel()].view(size)


def decode_batch(
    sequences: int, context: int, block: int, num_blocks: int, device: torch.device
) -> AttentionBatch:
    blocks_each = -(-context // block)
    generator = torch.Generator(device="cpu").manual_seed(0)
    table = torch.randperm(num_blocks, generator=generator)[: sequences * blocks_each]
    table = table.view(sequences, blocks_each).int().to(device)
    last = context - 1
    return AttentionBatch(
        torch.full((sequences,), last, dtype=torch.int32, device=device),
        table[:, last // block] * block + last % block,
        sequences,
        torch.nn.functional.pad(table, (0, MAX_POSITION // block - blocks_each)),
        torch.full((sequences,), context, dtype=torch.int32, device=device),
    )


def prefill_batch(
    segments: int, new: int, block: int, num_blocks: int, device: torch.device
) -> AttentionBatch:
    each = new // block
    table = torch.randperm(num_blocks)[: segments * each].view(segments, each).int().to(device)
    positions = torch.arange(new, dtype=torch.int32, device=device).repeat(segments)
    slots = (table[:, :, None] * block + torch.arange(block, device=device)).view(-1).int()
    starts = torch.arange(segments + 1, dtype=torch.int32, device=device) * new
    lens = torch.full((segments,), new, dtype=torch.int32, device=device)
    empty = torch.empty(0, dtype=torch.int32, device=device)
    return AttentionBatch(
        positions, slots, 0, empty.view(0, 0), empty, SegmentTable(starts, lens, table, new)
    )


def seconds_a_call(calls: Callable[[], None], count: int) -> float:
    """`calls` makes `count` calls. The median of a graph's replays, a call."""
    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / count)
    return statistics.median(times)


def layers_for(shape: AttentionShape, sequences: int, context: int, cached: torch.dtype = DTYPE) -> int:
    """How many layers a graph goes through, so that none finds its keys in the second-level cache."""
    layer_bytes = 2 * shape.num_kv_heads * shape.head_dim * cached.itemsize * sequences * context
    return min(200, max(8, -(-CACHE_BYTES // layer_bytes)))


def time_decode(
    variant: Variant, shape: AttentionShape, sequences: int, context: int, random: Tensor
) -> float:
    device = random.device
    layers = layers_for(shape, sequences, context, variant.cached)
    num_blocks = sequences * -(-context // variant.block)
    backend = make_backend(variant, shape, device)
    put_cache(backend, random, layers, num_blocks, variant.block)
    batch = decode_batch(sequences, context, variant.block, num_blocks, device)
    qkv = torch.randn(sequences, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, device=device)
    qkv = qkv.to(DTYPE)
    step = backend.begin_step(batch)

    def calls() -> None:
        for layer in range(layers):
            step(layer, qkv)

    return seconds_a_call(calls, layers)


def time_prefill(variant: Variant, shape: AttentionShape, segments: int, new: int, random: Tensor) -> float:
    device = random.device
    backend = make_backend(variant, shape, device)
    num_blocks = segments * new // variant.block
    put_cache(backend, random, 1, num_blocks, variant.block)
    step = backend.begin_step(prefill_batch(segments, new, variant.block, num_blocks, device))
    qkv = torch.randn(
        segments * new, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, device=device
    )
    qkv = qkv.to(DTYPE)

    def calls() -> None:
        for _ in range(5):
            step(0, qkv)

    return seconds_a_call(calls, 5)


def warm(arguments: list[str]) -> None:
    """Compile one variant's kernels for one model into Triton's cache."""
    model, variant = arguments[0], Variant(**json.loads(arguments[1]))
    random = torch.zeros(1 << 26, dtype=DTYPE, device="cuda")
    step = make_backend(variant, MODELS[model], random.device)
    put_cache(step, random, 1, 16, variant.block)
    width = (MODELS[model].num_heads + 2 * MODELS[model].num_kv_heads) * MODELS[model].head_dim
    batches = []
    if variant.tiling not in PREFILL_TILINGS:
        batches.append(decode_batch(1, 600, variant.block, 16 * 256 // variant.block, random.device))
    if variant.tiling not in TILINGS:
        batches.append(prefill_batch(1, 512, variant.block, 512 // variant.block, random.device))
    for batch in batches:
        put_cache(step, random, 1, 16 * 256 // variant.block, variant.block)
        step.begin_step(batch)(0, torch.zeros(len(batch.positions), width, dtype=DTYPE, device="cuda"))
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="write all figures to this JSON file")
    parser.add_argument("--tilings", action="store_true", help="also time other tilings of the decode kernel")
    parser.add_argument("--only", default="", help="only variants with this text in their names")
    parser.add_argument("--warm", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warm:
        return warm(options.warm)
    chosen = [variant for variant in variants(options.tilings) if options.only in variant.name]
    # Compiling takes seconds a kernel: all at once, in processes of their own.
    with ThreadPoolExecutor(16) as pool:
        jobs = [
            [sys.executable, __file__, "--warm", model, json.dumps(asdict(variant))]
            for model in MODELS
            for variant in chosen
        ]
        for job in pool.map(lambda job: subprocess.run(job, capture_output=True, text=True), jobs):
            if job.returncode:
                print(job.args[-1], job.stderr.strip().splitlines()[-1], sep=": ", flush=True)
    device = torch.device("cuda")
    largest = max(
        layers_for(shape, b, n) * (b * (n + 256) + 256) * 2 * shape.num_kv_heads * shape.head_dim
        for shape in MODELS.values()
        for b, n in WORK
    )
    # Bytes of e4m3 near 1, which as bfloat16 are ordinary numbers as well.
    random = torch.empty(2 * largest, device=device, dtype=torch.uint8).random_(0x30, 0x40)
    random |= torch.empty_like(random).random_(0, 2) << 7
    random = random.view(DTYPE)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    rows = []
    for model, shape in MODELS.items():
        print(f"\ndecode {model}: us (TB/s)  " + "  ".join(f"{b}x{n}" for b, n in WORK))
        for variant in (v for v in chosen if v.tiling not in PREFILL_TILINGS):
            cells = []
            for sequences, context in WORK:
                try:
                    seconds = time_decode(variant, shape, sequences, context, random)
                except Exception as error:
                    cells.append(f"{type(error).__name__}: {str(error)[:60]}")
                    continue
                token_bytes = 2 * shape.num_kv_heads * shape.head_dim * variant.cached.itemsize
                rate = sequences * context * token_bytes / seconds / 1e12
                cells.append(f"{seconds * 1e6:6.1f} ({rate:.2f})")
                rows.append([model, variant.name, sequences, context, seconds * 1e6, rate])
            print(f"{variant.name:32s}", "  ".join(cells), flush=True)
        print(f"prefill {model}: us (TFLOP/s)  " + "  ".join(f"{s}x{n}" for s, n in PREFILL))
        for variant in (v for v in chosen if v.tiling not in TILINGS):
            cells = []
            for segments, new in PREFILL:
                try:
                    seconds = time_prefill(variant, shape, segments, new, random)
                except Exception as error:
                    cells.append(f"{type(error).__name__}: {str(error)[:60]}")
                    continue
                rate = 2 * segments * new * new * shape.num_heads * shape.head_dim / seconds / 1e12
                cells.append(f"{seconds * 1e6:7.1f} ({rate:.0f})")
                rows.append([model, f"prefill {variant.name}", segments, new, seconds * 1e6, rate])
            print(f"{variant.name:32s}", "  ".join(cells), flush=True)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main()
