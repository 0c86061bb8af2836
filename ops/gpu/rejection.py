"""Draws under top-p and min-p by rejection: from all, and if that is outside, again from what is above it.

The winner of a Gumbel-max draw over all entries is the winner over every set that it belongs to. So whether
it is inside decides: the mass of what ranks above it has to be below top-p. If it is not, everything that
stays ranks above it, and the best score there is the next to try. The result is the best score of what stays,
whichever way it is found, and no sort or search for an edge is needed (a Gumbel-max form of the rejection in
FlashInfer's sampling, Ye et al., 2025, arXiv:2501.01005). A draw is inside with a probability of top-p or
more, and each that is not halves what is left outside, on average.

The mass is one pass over the row. A further draw is none: the best score of each block of entries is known,
and only a block whose best is outside, and better than any inside, is searched again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from microvllm.ops.gpu.gumbel import gumbel_block
from microvllm.ops.gpu.ranks import NOTHING, entry_of, from_rank, rank_of, token_of


@triton.jit
def best_of_block(
    logits,
    block,
    edge,
    last,
    temperature,
    seed,
    position,
    VOCAB: tl.constexpr,
    LANE: tl.constexpr,
):
    """Score entries [4 * LANE * block, 4 * LANE * (block + 1)) from the rank of `edge` and `last` on.

    -> [LANE] int64, by score: the best rank of each four that lie LANE apart.
    """
    numbers = gumbel_block(seed, position, block, LANE)
    best = tl.full((LANE,), NOTHING, tl.int64)
    for w in tl.static_range(4):
        entry = (block * 4 + w) * LANE + tl.arange(0, LANE)
        value = tl.load(logits + entry, entry < VOCAB, float("-inf")).to(tl.float32)
        score = value / temperature + numbers[w]
        best = tl.maximum(best, tl.where(from_rank(value, entry, edge, last), rank_of(score, entry), NOTHING))
    return best


@triton.jit
def _masses(logits, edge, last, floor, top, temperature, VOCAB: tl.constexpr, LANE: tl.constexpr):
    """The mass from the rank of `edge` and `last` on, and that of all that is not below `floor`."""
    BLOCK: tl.constexpr = 8 * LANE
    scale = 1.4426950408889634 / temperature
    above, total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, VOCAB, BLOCK, num_stages=4):
        entry = start + tl.arange(0, BLOCK)
        value = tl.load(logits + entry, entry < VOCAB, float("-inf")).to(tl.float32)
        mass = tl.where(value >= floor, tl.exp2((value - top) * scale), 0.0)
        total += mass
        above += tl.where(from_rank(value, entry, edge, last), mass, 0.0)
    return tl.sum(above, 0), tl.sum(total, 0)


@triton.jit
def draw_by_rejection(
    best,
    logits,
    top_p,
    floor,
    top,
    temperature,
    seed,
    position,
    VOCAB: tl.constexpr,
    LANE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The token of a row: the best score of the top-p of what is not below `floor`.

    best: [BLOCKS] int64, by score: the best rank of each block of 4 * LANE entries.
    """
    # What is left to choose from: the entries from this value on, of equal ones up to this entry.
    edge, last = floor, entry_of(tl.max(best, 0)) * 0 + VOCAB
    inside = last < 0
    while inside == 0:
        entry = entry_of(tl.max(best, 0))
        value = tl.load(logits + entry).to(tl.float32)
        while from_rank(value, entry, edge, last) == 0:
            block = entry // (4 * LANE)
            scores = best_of_block(logits, block, edge, last, temperature, seed, position, VOCAB, LANE)
            best = tl.where(tl.arange(0, BLOCKS) == block, tl.max(scores, 0), best)
            entry = entry_of(tl.max(best, 0))
            value = tl.load(logits + entry).to(tl.float32)
        edge, last = value, entry - 1
        inside = top_p >= 1
        if top_p < 1:
            above, total = _masses(logits, edge, last, floor, top, temperature, VOCAB, LANE)
            inside = (above < top_p * total) | (above == 0)
    return token_of(tl.max(best, 0))
