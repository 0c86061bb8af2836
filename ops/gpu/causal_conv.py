"""Causal convolutions on a GPU, of single tokens and of prompts; the reference is `ops.causal_conv`."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, SegmentTable
from microvllm.ops.gpu.launch import follow, launch_options

DECODE_CHANNELS = tl.constexpr(512)  # of a program
TOKENS, CHANNELS = tl.constexpr(16), tl.constexpr(128)  # of a program, of prompts


class Convolution(NamedTuple):
    """A layer's: weight [channels, size], the newest token last, bias [channels] or None; what rows keep.

    kept: [rows, size - 1, channels], the newest last.
    """

    weight: Tensor
    bias: Tensor | None
    kept: Tensor


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def _decode_kernel(
    mixed, x, conv, weight, bias, rows, positions, lens,
    W: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: some channels of one token; the window of its row moves on by it."""
    follow(PDL)
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * DECODE_CHANNELS + tl.arange(0, DECODE_CHANNELS)
    own = (c < C) & (tl.load(lens + i) > 0)
    known = own & (tl.load(positions + i) > 0)
    window = conv + tl.load(rows + i).to(tl.int64) * (SIZE - 1) * C + c
    new = tl.load(x + i * W + c, c < C, 0.0)
    total = new.to(tl.float32) * tl.load(weight + c * SIZE + SIZE - 1, c < C, 0.0).to(tl.float32)
    for j in tl.static_range(SIZE - 1):
        old = tl.load(window + j * C, known, 0.0)
        total += old.to(tl.float32) * tl.load(weight + c * SIZE + j, c < C, 0.0).to(tl.float32)
        if j > 0:
            tl.store(window + (j - 1) * C, old, own)
    tl.store(window + (SIZE - 2) * C, new, own)
    if bias is not None:
        total += tl.load(bias + c, c < C, 0.0).to(tl.float32)
    tl.store(mixed + i * C + c, silu(total), c < C)


@triton.jit
def _prompt_kernel(
    mixed, x, conv, weight, bias, rows, positions, starts, decodes, segments,
    W: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, SEGMENTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: some channels of some tokens, counted from the first that is no decode."""
    follow(PDL)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    s = tl.arange(0, SEGMENTS)
    begin = tl.load(starts + s, s < segments, 2147483647)
    before = begin[None, :] <= t[:, None]
    owner = tl.sum(before.to(tl.int32), 1) - 1
    first = tl.max(tl.where(before, begin[None, :], 0), 1)
    live = t < tl.load(starts + segments)
    row = tl.load(rows + decodes + owner, live, 0).to(tl.int64)
    goes_on = live & (tl.load(positions + decodes + first, live, 0) > 0)
    inside = c[None, :] < C
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for j in tl.static_range(SIZE):
        at = t - (SIZE - 1) + j
        here = live & (at >= first)
        new = tl.load(x + (decodes + at).to(tl.int64)[:, None] * W + c[None, :], here[:, None] & inside, 0.0)
        kept = row * (SIZE - 1) + at - first + SIZE - 1
        old = (goes_on & (at < first))[:, None] & inside
        value = new + tl.load(conv + kept[:, None] * C + c[None, :], old, 0.0)
        w = tl.load(weight + c * SIZE + j, c < C, 0.0).to(tl.float32)
        total += value.to(tl.float32) * w[None, :]
    if bias is not None:
        total += tl.load(bias + c, c < C, 0.0).to(tl.float32)[None, :]
    target = mixed + (decodes + t).to(tl.int64)[:, None] * C + c[None, :]
    tl.store(target, silu(total), live[:, None] & inside)


@triton.jit
def _keep_kernel(
    x, conv, rows, positions, starts, decodes,
    W: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: some channels of the last tokens of one segment, which the next one of its row will see."""
    follow(PDL)
    s = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(starts + s)
    count = tl.load(starts + s + 1) - first
    if count > 0:
        row = tl.load(rows + decodes + s).to(tl.int64)
        goes_on = tl.load(positions + decodes + first) > 0
        window = conv + row * (SIZE - 1) * C + c
        for j in tl.static_range(SIZE - 1):
            at = count - (SIZE - 1) + j  # below 0: of the tokens that were kept, behind those stored so far
            new = tl.load(x + (decodes + first + at).to(tl.int64) * W + c, (c < C) & (at >= 0), 0.0)
            old = tl.load(window + (at + SIZE - 1) * C, (c < C) & (at < 0) & goes_on, 0.0)
            tl.store(window + j * C, new + old, c < C)


def convolve_decodes(by: Convolution, x: Tensor, batch: AttentionBatch, mixed: Tensor, *, pdl: bool) -> None:
    """x: [n, width], channels first, the decodes first -> mixed: [n, channels], of the decodes."""
    channels, size = by.weight.shape
    _decode_kernel[(batch.num_decodes, triton.cdiv(channels, DECODE_CHANNELS.value))](
        *(mixed, x, by.kept, by.weight, by.bias, batch.rows, batch.positions, batch.decode_lens),
        W=x.shape[1], C=channels, SIZE=size, num_warps=4, **launch_options(pdl),
    )  # fmt: skip


def convolve_prompts(
    by: Convolution, x: Tensor, batch: AttentionBatch, table: SegmentTable, mixed: Tensor, *, pdl: bool
) -> None:
    """The same of the tokens behind the decodes, with the batch's segments."""
    channels, size = by.weight.shape
    decodes, segments, count = batch.num_decodes, len(table.starts) - 1, len(x) - batch.num_decodes
    where, options = (batch.rows, batch.positions, table.starts, decodes), launch_options(pdl)
    sizes = {"W": x.shape[1], "C": channels, "SIZE": size}
    _prompt_kernel[(triton.cdiv(count, TOKENS.value), triton.cdiv(channels, CHANNELS.value))](
        *(mixed, x, by.kept, by.weight, by.bias, *where, segments), **sizes,
        SEGMENTS=triton.next_power_of_2(segments), **options,
    )  # fmt: skip
    block = 4 * CHANNELS.value
    _keep_kernel[(segments, triton.cdiv(channels, block))](
        *(x, by.kept, *where), **sizes, BLOCK=block, **options
    )
