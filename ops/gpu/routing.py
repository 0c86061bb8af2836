"""Chooses each token's experts, and sorts the choices by expert; the reference is `ops.experts.route`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.experts import route
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.routing import Routing

ROUTER_ROWS = tl.constexpr(2)  # of the router's weight that a program multiplies
SORT_BLOCK = 4096  # choices that a program looks at together


@triton.jit
def _choose(
    weights, chosen, row, logit, correction, scales, scale, smallest, E: tl.constexpr, K: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZED: tl.constexpr
):  # fmt: skip
    """Store what a row's logits choose: of equal scores the first, and last what is no number."""
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    if SIGMOID:
        scores = tl.where(e < E, 1.0 / (1.0 + tl.exp(-logit)), 0.0)
    else:
        powers = tl.exp(logit - tl.max(logit, 0))
        scores = powers / tl.sum(powers, 0)
    ranked = scores
    if correction is not None:
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
    if scales is not None:
        values *= tl.load(scales + numbers, k < K, 0.0)
    tl.store(weights + row * K + k, values * scale, k < K)
    tl.store(chosen + row * K + k, numbers, k < K)


@triton.jit
def _choose_kernel(
    weights, chosen, logits, correction, scales, scale, smallest,
    E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one token."""
    follow(PDL)
    row, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    logit = tl.load(logits + row.to(tl.int64) * E + e, e < E, float("-inf")).to(tl.float32)
    _choose(
        weights, chosen, row, logit, correction, scales, scale, smallest, E, K, BLOCK_E, BLOCK_K, SIGMOID,
        NORMALIZED
    )  # fmt: skip


@triton.jit
def _route_kernel(
    weights, chosen, logits, x, router, bias, norm, correction, scales, arrivals, eps, scale, smallest,
    D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: the logits of ROUTER_ROWS experts for one token; the token's last program makes the choice."""
    n = tl.program_id(0) * ROUTER_ROWS + tl.arange(0, ROUTER_ROWS)
    row = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    tile = tl.load(router + n[:, None] * D + d[None, :], (n < E)[:, None] & (d < D)[None, :], 0.0)
    if norm is not None:
        gain = tl.load(norm + d, d < D, 0.0).to(tl.float32)
    follow(PDL)
    wide = tl.load(x + row * D + d, d < D, 0.0).to(tl.float32)
    factor = 1.0
    if norm is not None:
        factor = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
        wide *= gain
    found = tl.sum(tile.to(tl.float32) * wide[None, :], 1) * factor
    if bias is not None:
        found += tl.load(bias + n, n < E, 0.0).to(tl.float32)
    tl.store(logits + row * E + n, found, n < E)
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(arrivals + row, 1) == tl.num_programs(0) - 1:
        tl.atomic_xchg(arrivals + row, 0)
        e = tl.arange(0, BLOCK_E)
        # Past the L1 cache, which other multiprocessors do not write through.
        logit = tl.load(logits + row * E + e, e < E, float("-inf"), cache_modifier=".cg").to(tl.float32)
        _choose(
            weights, chosen, row, logit, correction, scales, scale, smallest, E, K, BLOCK_E, BLOCK_K, SIGMOID,
            NORMALIZED
        )  # fmt: skip


def route_few(
    x: Tensor,
    router: Tensor,
    routing: Routing,
    correction: Tensor | None,
    norm: Tensor | None,
    eps: float,
    arrivals: Tensor,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """`choose` for the logits norm(x) @ router.T + bias of a few tokens, in the kernel that computes them.

    x: [n, h]; router: [E, h] of x's dtype; norm: [h], the weight of an RMSNorm, or None; arrivals: at least n
    int32 zeros, and zeros again afterwards, for one call at a time; scales: [E] float32, by which the chosen
    experts' weights are multiplied. `routing` is without groups.
    """
    (n, hidden), count, k = x.shape, len(router), routing.num_chosen
    logits = torch.empty(n, count, dtype=x.dtype, device=x.device)
    weights = torch.empty(n, k, dtype=torch.float32, device=x.device)
    chosen = torch.empty(n, k, dtype=torch.int32, device=x.device)
    _route_kernel[(triton.cdiv(count, ROUTER_ROWS.value), n)](
        weights, chosen, logits, x, router, bias, norm, correction, scales, arrivals, eps, routing.scale,
        routing.smallest_sum, D=hidden, E=count, K=k, BLOCK_D=triton.next_power_of_2(hidden),
        BLOCK_E=triton.next_power_of_2(count), BLOCK_K=triton.next_power_of_2(k), SIGMOID=routing.sigmoid,
        NORMALIZED=routing.normalized, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return weights, chosen


def choose(
    logits: Tensor,
    routing: Routing,
    correction: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """logits: [n, E] contiguous; correction, scales: [E] float32 -> weights [n, k] float32, experts int32."""
    n, count = logits.shape
    if routing.num_groups > 1:
        weights, chosen = route(logits, routing, correction, scales)
        return weights, chosen.int()
    weights = torch.empty(n, routing.num_chosen, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(n, routing.num_chosen, dtype=torch.int32, device=logits.device)
    _choose_kernel[(n,)](
        weights, chosen, logits, correction, scales, routing.scale, routing.smallest_sum, E=count,
        K=routing.num_chosen, BLOCK_E=triton.next_power_of_2(count),
        BLOCK_K=triton.next_power_of_2(routing.num_chosen), SIGMOID=routing.sigmoid,
        NORMALIZED=routing.normalized, num_warps=1 if count <= 256 else 4, **launch_options(pdl),
    )  # fmt: skip
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
    order, experts, starts, stops, chosen, A, NUM_TILES,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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
        order, experts, starts, stops, chosen, count, tiles, E=num_experts, ROWS=rows,
        BLOCK_E=triton.next_power_of_2(num_experts), BLOCK=min(SORT_BLOCK, triton.next_power_of_2(count)),
        num_warps=4 if count <= 2048 else 8, **launch_options(pdl),
    )  # fmt: skip
    return SortedChoices(order, experts, starts, stops)
