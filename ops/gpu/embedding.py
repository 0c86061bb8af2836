"""The input embedding: one row of the table for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.launch import follow, launch_options


@triton.jit
def _gather_kernel(y, table, token_ids, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program: one token."""
    follow(PDL)
    at = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + at).to(tl.int64)
    d = tl.arange(0, BLOCK)
    tl.store(y + at * D + d, tl.load(table + token * D + d, d < D, 0.0), d < D)


def gather_rows(table: Tensor, token_ids: Tensor, *, pdl: bool = False) -> Tensor:
    """table: [vocab, d]; token_ids: [n] int32 or int64, each in [0, vocab) -> [n, d]."""
    n, d = token_ids.shape[0], table.shape[1]
    y = torch.empty(n, d, dtype=table.dtype, device=table.device)
    if n:
        _gather_kernel[(n,)](
            y, table, token_ids, D=d, BLOCK=triton.next_power_of_2(d), num_warps=4, **launch_options(pdl)
        )
    return y
