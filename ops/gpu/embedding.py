"""The input embedding: one row of the table for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.launch import follow, launch_options


@triton.jit
def _gather_kernel(y, table, token_ids, first, rows, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program: one token."""
    follow(PDL)
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(token_ids + at).to(tl.int64) - first
    d = tl.arange(0, BLOCK)
    here = (d < D) & (row >= 0) & (row < rows)
    tl.store(y + at * D + d, tl.load(table + row * D + d, here, 0.0), d < D)


def gather_rows(table: Tensor, token_ids: Tensor, first: int = 0, *, pdl: bool = False) -> Tensor:
    """table: [rows, d], of the tokens from `first` on; token_ids: [n] int32 or int64 -> [n, d].

    Zeros for a token that the table does not have.
    """
    n, d = token_ids.shape[0], table.shape[1]
    y = torch.empty(n, d, dtype=table.dtype, device=table.device)
    if n:
        _gather_kernel[(n,)](
            y, table, token_ids, first, len(table), D=d, BLOCK=triton.next_power_of_2(d), num_warps=4,
            **launch_options(pdl),
        )  # fmt: skip
    return y
