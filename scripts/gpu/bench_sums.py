#!/usr/bin/env python3
"""Measures the sum over two GPUs that tensor parallelism takes twice a layer: NCCL's, and the own kernel's.

    python scripts/gpu/bench_sums.py --width 3584 --rows 1 8 35 64 128 256

Each figure is of one of many sums in a CUDA graph, each with a residual, in microseconds. Every result is
compared with the sum that one GPU computes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch._C._distributed_c10d import FileStore

from microvllm.ops.gpu.levers import VARIABLE
from microvllm.runtime.worker.parallel.groups import TorchRanks

SUMS, REPLAYS, ROOM = 56, 20, 1 << 19


def timed(step: Callable[[], object], ranks: TorchRanks) -> float:
    """Microseconds of a call, captured SUMS times in a graph."""
    step()
    torch.cuda.synchronize()
    ranks.smallest(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(SUMS):
            step()
    graph.replay()
    torch.cuda.synchronize()
    ranks.smallest(0)
    start = time.perf_counter()
    for _ in range(REPLAYS):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / REPLAYS / SUMS * 1e6


def run(rank: int, folder: str, width: int, rows: list[int]) -> None:
    os.environ[VARIABLE] = "peers"
    ranks = TorchRanks(rank, 2, "cuda", folder)
    own = None
    try:
        from microvllm.ops.gpu.launch import can_launch_early
        from microvllm.ops.gpu.peers import PeerExchange, box_bytes
        from microvllm.runtime.worker.parallel.peer_memory import PeerMemory

        device = torch.device("cuda", rank)
        store = FileStore(f"{folder}/memory", 2)
        memory = PeerMemory(rank, 2, box_bytes(2, ROOM), store)
        own = PeerExchange(rank, memory.addresses, ROOM, device, pdl=can_launch_early(device))
    except Exception:
        traceback.print_exc()
    for dtype, counts in ((torch.bfloat16, rows), (torch.float32, rows[:1])):
        for m in counts:
            parts = [torch.randn(m, width, generator=torch.Generator().manual_seed(r)) for r in range(3)]
            first, second, residual = (part.to("cuda", dtype) for part in parts)
            want = (first.float() + second.float() + residual.float()).to(dtype)
            part = (first, second)[rank]
            got = ranks.sum(part.clone(), residual.clone())
            line = f"{str(dtype)[6:]} {m:4d} rows: NCCL off by {float((got - want).abs().max()):.4f}"
            # NCCL sums in place, again and again.
            nccl = timed(partial(ranks.sum, part.clone(), residual.clone()), ranks)
            line += f", {nccl:6.2f} us"
            if own is not None and own.fits(part):
                alike = True
                for _ in range(3):
                    got = own.sum(part.clone(), residual.clone())
                    torch.cuda.synchronize()
                    alike = alike and bool(got.equal(want))
                line += f"; own {'equal' if alike else f'OFF by {float((got - want).abs().max())}'}"
                line += f", {timed(partial(own.sum, part, residual.clone()), ranks):6.2f} us"
            if rank == 0:
                print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 35, 64, 128, 256])
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        run(args.rank, args.folder, args.width, args.rows)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--folder", folder, "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
        try:
            codes = [each.wait(120) for each in ranks]
        finally:
            for each in ranks:
                each.kill()
        sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
