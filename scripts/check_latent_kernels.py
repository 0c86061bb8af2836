#!/usr/bin/env python3
"""Check and time attention over latent keys and values (MLA) on this CPU, beside plain torch.

    python scripts/check_latent_kernels.py [--threads N] [--heads 20] [--turns 6]

Prints Markdown: a layer of GLM-4.7-Flash, decodes and a prompt, from caches in float32 and bfloat16. The two
take turns, and of each the turn with the least processor time counts, all threads together: other work on the
machine adds less to that than to time on the clock. Ends with 1 if their results differ.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from microvllm.ops.attention import AttentionBatch, SegmentTable
from microvllm.ops.attention.latent import LatentConfig, LatentShape, TorchLatentAttention
from microvllm.ops.backends import make_operators
from microvllm.ops.cpu.calibration import processor_name

RANK, ROPE, BLOCK = 512, 64, 16
# name: (decodes, context); the last is a prompt.
STEPS = {
    "1 decode at 1,000": (1, 1000),
    "8 decodes at 1,000": (8, 1000),
    "1 decode at 8,000": (1, 8000),
    "8 decodes at 8,000": (8, 8000),
    "a prompt of 1,000": (0, 1000),
}
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def batch_of(decodes: int, context: int) -> AttentionBatch:
    """Sequences in blocks one after the other."""
    width, sequences = -(-context // BLOCK), max(decodes, 1)
    blocks = torch.arange(sequences * width).view(sequences, width)
    if not decodes:
        at = torch.arange(context)
        table = SegmentTable(torch.tensor([0, context]), torch.tensor([context]), blocks, context)
        return AttentionBatch(at, at, 0, blocks[:0], at[:0], table)
    positions, slots = torch.full((decodes,), context - 1), blocks[:, 0] * BLOCK + context - 1
    return AttentionBatch(positions, slots, decodes, blocks, positions + 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--turns", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = LatentShape(1, args.heads, RANK, ROPE, 256**-0.5)
    inv_freq, wrong = 1e6 ** -(torch.arange(0, ROPE, 2) / ROPE), False
    print(f"{processor_name()}, threads: {args.threads}, heads: {args.heads}\n")
    print("| step | cache | kernels, ms | torch, ms | torch / kernels | differ by |")
    print("|---|---|---:|---:|---:|---:|")
    for name, (decodes, context) in STEPS.items():
        batch = batch_of(decodes, context)
        blocks = max(decodes, 1) * -(-context // BLOCK)
        for dtype, limit in MAX_ERROR.items():
            config = LatentConfig(shape, blocks, BLOCK, inv_freq, context, dtype)
            backends = (
                make_operators("cpu", torch.float32, args.threads).latent_attention(config),
                TorchLatentAttention(config, torch.float32),
            )
            backends[1].cache.normal_()
            backends[0].cache.copy_(backends[1].cache)  # type: ignore[attr-defined]
            steps = [backend.begin_step(batch) for backend in backends]
            qkv = torch.randn(len(batch.positions), (args.heads + 1) * shape.key_dim)
            times: tuple[list[float], ...] = ([], [])
            for _ in range(args.turns + 1):
                outs = []
                for step, taken in zip(steps, times, strict=True):
                    x = qkv.clone()
                    begin = time.process_time()
                    outs.append(step(0, x))
                    taken.append(time.process_time() - begin)
            error = float((outs[0] - outs[1]).norm() / outs[1].norm())
            wrong |= not error < limit
            ours, theirs = (1e3 * min(taken[1:]) for taken in times)
            cells = f"{ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} | {error:.0e}"
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {cells} |", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
