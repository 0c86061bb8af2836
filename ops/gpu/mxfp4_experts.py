"""As `ops.gpu.expert_gemv`, of experts in MXFP4 (`ops.mxfp4.Mxfp4Tensor`): few tokens, choices not sorted.

A token of gpt-oss-20b reads 4 experts of a layer: 4 * 5760 rows of gate and up and 4 * 2880 of down, of 2880
codes in 12 runs of 128 bytes with 8 scales each. That is 56.4 MB, of which 52.9 MB would be 4.25 bits a
weight: 12.3 and 11.5 us at the 4.594 TB/s of an H200.

At that rate a multiprocessor has 40 codes to widen in a clock, and issues 128 lanes' instructions. By plain
multiply and add a code takes 5: two shifts and a mask into float32, the product, and half each for x and the
scale. With a tensor core it takes 3.7, by count of the compiled loop: codes are widened and scaled in pairs,
and x comes in its operand's layout. So rows of weights are the left operand, as in `ops.gpu.mxfp4`, 16 at
least, as they lie together. The right operand's 8 columns are 8 rows of x, of which each row of weights needs
one: those of a token's other experts, and of other parts of the same sum. A program thus takes 16 rows of
several matrices, cut into parts along k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.coded import BLOCK, PLANE
from microvllm.ops.experts import NO_BIASES, ExpertBiases
from microvllm.ops.gpu.activation import gated_unit
from microvllm.ops.gpu.coded_skinny import ROW_BLOCK, in_rows
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.mxfp4 import WIDTH, multiply_mxfp4
from microvllm.ops.gpu.tiling import mxfp4_expert_tiling
from microvllm.ops.mxfp4 import Mxfp4Tensor


@triton.jit
def _products(
    words, scales, block, part, x_row, x_part, K: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr
):  # fmt: skip
    """Products of 16 rows of each block with each row of x, [blocks * 16, x's], over STEPS runs of words.

    block: numbers; x_row: pointers; part, x_part: which STEPS runs they are of.
    """
    DTYPE: tl.constexpr = x_row.dtype.element_ty
    PLACES: tl.constexpr = 8  # codes of a word, each of WIDTH columns with a scale
    STEP: tl.constexpr = PLACES * WIDTH
    SPAN: tl.constexpr = 8
    RUNS: tl.constexpr = (K + STEP - 1) // STEP
    run = block.to(tl.int64) * RUNS + part * STEPS
    # [WIDTH / 8, blocks, 128]: a warp's threads have 16 bytes each of a block, so many times.
    eighth = tl.arange(0, WIDTH // 8)[:, None, None] * 128 + tl.arange(0, 128)[None, None, :]
    word_at = words + run[None, :, None] * (ROW_BLOCK * WIDTH) + eighth
    scale_at = scales + run[:, None] * 32 + tl.arange(0, 32)[None, :]
    column = x_part[None, :] * (STEPS * STEP) + tl.arange(0, SPAN * WIDTH)[:, None]
    x_at = x_row[None, :] + column
    sums = tl.zeros([block.shape[0] * ROW_BLOCK, x_row.shape[0]], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        codes = in_rows(tl.load(word_at + step * (ROW_BLOCK * WIDTH)))
        right = ()
        for i in tl.static_range(PLACES // SPAN):
            k = step * STEP + i * (SPAN * WIDTH)
            if K % STEP == 0:
                right += (tl.load(x_at + k),)
            else:
                right += (tl.load(x_at + k, k + column < K, 0.0),)
        sums = multiply_mxfp4(sums, codes, tl.load(scale_at + step * 32), right, SPAN, DTYPE)
    return sums


@triton.jit
def _inner_kernel(
    y, x, words, scales, bias, chosen,
    N: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, CLAMPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: 16 columns of one choice: as many rows of its expert's gate and up."""
    COLUMNS: tl.constexpr = 8 if PARTS < 8 else PARTS
    follow(PDL)
    tile, choice = tl.program_id(0), tl.program_id(1)
    expert = tl.load(chosen + choice)
    # Rows: of each part 16 of gate and 16 of up.
    r = tl.arange(0, PARTS * 2 * ROW_BLOCK)
    b = tl.arange(0, PARTS * 2)
    first = expert * (2 * N) + tile * ROW_BLOCK
    block = first // ROW_BLOCK + b % 2 * (N // ROW_BLOCK)
    x_part = tl.minimum(tl.arange(0, COLUMNS), PARTS - 1)
    x_row = x + (choice // CHOICES * K + x_part * 0)
    sums = _products(words, scales, block, b // 2, x_row, x_part, K, STEPS, STAGES)
    own = (r // (2 * ROW_BLOCK))[:, None] == tl.arange(0, COLUMNS)[None, :]
    each = tl.sum(tl.where(own, sums, 0.0), 1)
    both = tl.sum(tl.reshape(each, [PARTS, 2, ROW_BLOCK]), 0)
    gate, up = tl.split(tl.trans(both))
    n = tile * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    if bias is not None:
        gate += tl.load(bias + expert * (2 * N) + n).to(tl.float32)
        up += tl.load(bias + expert * (2 * N) + N + n).to(tl.float32)
    tl.store(y + choice * N + n, gated_unit(gate, up, CLAMPED))


@triton.jit
def _outer_kernel(
    y, x, words, scales, bias, weights, chosen, residual,
    N: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, PLACES_OF_CHOICES: tl.constexpr,
    PARTS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: 16 columns of one token: as many rows of the matrices of all its experts."""
    C: tl.constexpr = PLACES_OF_CHOICES
    COLUMNS: tl.constexpr = 8 if PARTS * C < 8 else PARTS * C
    follow(PDL)
    tile, token = tl.program_id(0), tl.program_id(1)
    first_choice = token * CHOICES
    # Rows: of each part 16 of every choice; places that there are no choices for repeat the last.
    r = tl.arange(0, PARTS * C * ROW_BLOCK)
    b = tl.arange(0, PARTS * C)
    of_block = tl.load(chosen + first_choice + tl.minimum(b % C, CHOICES - 1))
    block = of_block * (N // ROW_BLOCK) + tile
    column = tl.arange(0, COLUMNS)
    x_row = x + (first_choice + tl.minimum(column % C, CHOICES - 1)) * K
    x_part = tl.minimum(column // C, PARTS - 1)
    sums = _products(words, scales, block, b // C, x_row, x_part, K, STEPS, STAGES)
    each = tl.sum(tl.where((r // ROW_BLOCK)[:, None] == column[None, :], sums, 0.0), 1)
    one = tl.sum(tl.reshape(each, [PARTS, C, ROW_BLOCK]), 0)
    n = tile * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    c = tl.arange(0, C)
    there = c < CHOICES
    expert = tl.load(chosen + first_choice + c, there, 0)
    if bias is not None:
        one += tl.load(bias + expert[:, None] * N + n[None, :]).to(tl.float32)
    weight = tl.load(weights + first_choice + c, there, 0.0)
    total = tl.sum(tl.where(there[:, None], one * weight[:, None], 0.0), 0)
    if residual is not None:
        total += tl.load(residual + token * N + n).to(tl.float32)
    tl.store(y + token * N + n, total)


def mxfp4_experts(
    x: Tensor,
    gate_up: Mxfp4Tensor,
    down: Mxfp4Tensor,
    weights: Tensor,
    chosen: Tensor,
    residual: Tensor | None,
    biases: ExpertBiases = NO_BIASES,
    *,
    clamped: bool = False,
    pdl: bool = False,
) -> Tensor:
    """x through its experts + residual; the arguments are `expert_gemv.expert_gemv`'s -> [n, h].

    Sums are taken in float32, in one order for any number of tokens.
    """
    (n, hidden), width, k = x.shape, down.columns, chosen.shape[1]
    between = torch.empty(n * k, width, dtype=x.dtype, device=x.device)
    steps = triton.cdiv(hidden, 8 * PLANE)
    tiling = mxfp4_expert_tiling(steps, 2)
    _inner_kernel[(width // BLOCK, n * k)](
        between, x, gate_up.as_subclass(Tensor), gate_up.scales.view(torch.int32), biases.gate_up, chosen,
        N=width, K=hidden, CHOICES=k, PARTS=tiling.splits, STEPS=steps // tiling.splits, STAGES=tiling.stages,
        CLAMPED=clamped, num_warps=tiling.warps, **launch_options(pdl),
    )  # fmt: skip
    y = torch.empty_like(x) if residual is None else residual
    places, steps = triton.next_power_of_2(k), triton.cdiv(width, 8 * PLANE)
    tiling = mxfp4_expert_tiling(steps, places)
    _outer_kernel[(hidden // BLOCK, n)](
        y, between, down.as_subclass(Tensor), down.scales.view(torch.int32), biases.down, weights, chosen,
        residual, N=hidden, K=width, CHOICES=k, PLACES_OF_CHOICES=places, PARTS=tiling.splits,
        STEPS=steps // tiling.splits, STAGES=tiling.stages, num_warps=tiling.warps, **launch_options(pdl),
    )  # fmt: skip
    return y
