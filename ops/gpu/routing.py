"""Chooses each token's experts, and sorts the choices by expert; the reference is `ops.experts.route`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.experts import SMALLEST_SUM, route
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.routing import Routing

SORT_BLOCK = 4096  # choices that a program looks at together


@triton.jit
def _route_kernel(
    weights,
    chosen,
    logits,
    correction,
    scale,
    smallest,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr,
    CORRECTION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: one token. Of equal scores the first is taken; what is not a number is taken last."""
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    follow(PDL)
    row = tl.program_id(0)
    logit = tl.load(logits + row.to(tl.int64) * E + e, e < E, float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.where(e < E, 1.0 / (1.0 + tl.exp(-logit)), 0.0)
    else:
        powers = tl.exp(logit - tl.max(logit, 0))
        scores = powers / tl.sum(powers, 0)
    ranked = scores
    if CORRECTION:
        ranked += tl.load(correction + e, e < E, 0.0)
    ranked = tl.where((e < E) & (ranked == ranked), ranked, float("-inf"))
    numbers = tl.zeros((BLOCK_K,), tl.int32)
    values = tl.zeros((BLOCK_K,), tl.float32)
    for place in tl.static_range(K):
        best = tl.argmax(ranked, 0, tie_break_left=True)
        numbers = tl.where(k == place, best, numbers)
        values = tl.where(k == place, tl.sum(tl.where(e == best, scores, 0.0), 0), values)
        ranked = tl.where(e == best, float("-inf"), ranked)
    if NORMALIZED:
        values = values / (tl.sum(values, 0) + smallest)
    tl.store(weights + row * K + k, values * scale, k < K)
    tl.store(chosen + row * K + k, numbers, k < K)


def choose(
    logits: Tensor, routing: Routing, correction: Tensor | None = None, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """logits: [n, E] contiguous; correction: [E] float32 -> weights [n, k] float32, experts [n, k] int32."""
    n, count = logits.shape
    if routing.num_groups > 1:
        weights, chosen = route(logits, routing, correction)
        return weights, chosen.int()
    weights = torch.empty(n, routing.num_chosen, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(n, routing.num_chosen, dtype=torch.int32, device=logits.device)
    _route_kernel[(n,)](
        weights,
        chosen,
        logits,
        correction,
        routing.scale,
        SMALLEST_SUM,
        E=count,
        K=routing.num_chosen,
        BLOCK_E=triton.next_power_of_2(count),
        BLOCK_K=triton.next_power_of_2(routing.num_chosen),
        SIGMOID=routing.sigmoid,
        NORMALIZED=routing.normalized,
        CORRECTION=correction is not None,
        num_warps=1 if count <= 256 else 4,
        **launch_options(pdl),
    )
    return weights, chosen


class SortedChoices(NamedTuple):
    """Choices (a token's number times k, plus a place) by their experts, and the tiles that they fill.

    order: [n * k] int32, the choices of the first expert, then of the second, ..., each in their order.
    experts, starts, stops: [tiles] int32, of each tile its expert and its run of `order`; empty runs of
    expert 0 behind the last. How many tiles there are depends on n alone.
    """

    order: Tensor
    experts: Tensor
    starts: Tensor
    stops: Tensor


@triton.jit(do_not_specialize=["A"])
def _sort_kernel(
    order,
    experts,
    starts,
    stops,
    chosen,
    A,
    NUM_TILES,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: one expert, which counts the choices of all."""
    follow(PDL)
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    i = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, A, BLOCK):
        numbers = tl.load(chosen + first + i, first + i < A, BLOCK_E)
        counts += tl.histogram(numbers, BLOCK_E, mask=numbers < E)
    tiles = (counts + ROWS - 1) // ROWS
    start = tl.sum(tl.where(e < expert, counts, 0), 0)
    own = tl.sum(tl.where(e == expert, counts, 0), 0)
    first_tile = tl.sum(tl.where(e < expert, tiles, 0), 0)
    place = start
    for first in range(0, A, BLOCK):
        numbers = tl.load(chosen + first + i, first + i < A, BLOCK_E)
        here = numbers == expert
        ranks = tl.cumsum(here.to(tl.int32), 0)
        tl.store(order + place + ranks - 1, first + i, here)
        place += tl.sum(here.to(tl.int32), 0)
    for tile in range(0, (own + ROWS - 1) // ROWS):
        tl.store(experts + first_tile + tile, expert)
        tl.store(starts + first_tile + tile, start + tile * ROWS)
        tl.store(stops + first_tile + tile, tl.minimum(start + (tile + 1) * ROWS, start + own))
    if expert == E - 1:
        for first in range(first_tile + (own + ROWS - 1) // ROWS, NUM_TILES, BLOCK):
            unused = first + i < NUM_TILES
            tl.store(experts + first + i, tl.zeros((BLOCK,), tl.int32), unused)
            tl.store(starts + first + i, tl.zeros((BLOCK,), tl.int32), unused)
            tl.store(stops + first + i, tl.zeros((BLOCK,), tl.int32), unused)


def sort_choices(chosen: Tensor, num_experts: int, rows: int, *, pdl: bool = False) -> SortedChoices:
    """chosen: [n, k] int32, expert numbers; tiles hold at most `rows` choices of one expert each."""
    count, device = chosen.numel(), chosen.device
    tiles = (count + min(num_experts, count) * (rows - 1)) // rows
    order = torch.empty(count, dtype=torch.int32, device=device)
    experts, starts, stops = torch.empty(3, tiles, dtype=torch.int32, device=device)
    _sort_kernel[(num_experts,)](
        order,
        experts,
        starts,
        stops,
        chosen,
        count,
        tiles,
        E=num_experts,
        ROWS=rows,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK=min(SORT_BLOCK, triton.next_power_of_2(count)),
        num_warps=4 if count <= 2048 else 8,
        **launch_options(pdl),
    )
    return SortedChoices(order, experts, starts, stops)
