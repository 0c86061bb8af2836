"""Tokens from logits in one pass, or few for rows with top-k, top-p or min-p: never a sort, never the host.

A token is drawn by the Gumbel-max trick (Gumbel, 1954): the largest of logit / temperature + g, where the g
are independent standard Gumbel numbers, is distributed as softmax(logits / temperature). The g of an entry
of the vocabulary is a function of (seed, position, entry) alone: see `gumbel`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.filters import CAPACITY, GROUP, deliver, filter_kernel, is_filtered, store_largest
from microvllm.ops.gpu.gumbel import LANE, WORDS, gumbel_block
from microvllm.ops.gpu.launch import follow, launch_options
from microvllm.ops.gpu.ranks import NOTHING, UNUSED_BITS, rank_of, token_of

NO_TOKEN = -1
MAX_REGISTERS = 96  # five programs a multiprocessor


@triton.jit
def _no_nan(value):
    """float32 with infinity for NaN, so that it is found as the largest."""
    return tl.where(value != value, float("inf"), value)


@triton.jit
def _first_of(largest, score, entry):
    """The lowest of the entries with the largest score, [n] each."""
    return tl.min(tl.where(score == largest, entry, 0x7FFFFFFF), 0)


@triton.jit
def _best_kernel(
    tokens,
    newest,
    sent,
    places,
    best,
    arrivals,
    group_largest,
    block_best,
    logits,
    rows,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    VOCAB: tl.constexpr,
    LANE: tl.constexpr,
    FILTERS: tl.constexpr,
    DELIVERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: 4 * LANE entries of one row. Greedy rows and those with top-k: the argmax; others: a draw.

    newest, sent, places: see `deliver`, if DELIVERS; group_largest, block_best: with FILTERS, where filtered
    rows leave what `filter_kernel` begins with.
    """
    follow(PDL)
    i = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = tl.load(rows + i)
    temperature = tl.load(temperatures + row)
    draws = temperature > 0
    if FILTERS:
        top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
        filtered = is_filtered(temperature, top_k, top_p, min_p)
        draws = draws & (top_k <= 0)
    entry = block * 4 * LANE + tl.arange(0, LANE)
    logits += i * VOCAB + entry
    # Entries past the end are below every finite score.
    a = tl.load(logits, entry < VOCAB, float("-inf")).to(tl.float32)
    b = tl.load(logits + LANE, entry + LANE < VOCAB, float("-inf")).to(tl.float32)
    c = tl.load(logits + 2 * LANE, entry + 2 * LANE < VOCAB, float("-inf")).to(tl.float32)
    d = tl.load(logits + 3 * LANE, entry + 3 * LANE < VOCAB, float("-inf")).to(tl.float32)
    if FILTERS and filtered:  # of rows with a NaN nothing is drawn
        columns = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
        store_largest(group_largest + (i * tl.num_programs(1) + block) * (LANE // 8), columns, LANE)
    if draws:
        ga, gb, gc, gd = gumbel_block(tl.load(seeds + row), tl.load(positions + i), block, LANE)
        a, b = a / temperature + ga, b / temperature + gb
        c, d = c / temperature + gc, d / temperature + gd
    a, b, c, d = _no_nan(a), _no_nan(b), _no_nan(c), _no_nan(d)
    largest = tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), 0)
    first = _first_of(largest, a, entry)
    first = tl.minimum(first, _first_of(largest, b, entry + LANE))
    first = tl.minimum(first, _first_of(largest, c, entry + 2 * LANE))
    first = tl.minimum(first, _first_of(largest, d, entry + 3 * LANE))
    if FILTERS and filtered:
        tl.store(block_best + i * tl.num_programs(1) + block, rank_of(largest, first))
    tl.atomic_max(best + i, rank_of(largest, first))
    if tl.atomic_add(arrivals + i, 1) == tl.num_programs(1) - 1:
        # The last one: nobody else touches this row any more, so it can be made ready for the next step.
        token = token_of(tl.atomic_xchg(best + i, NOTHING))
        tl.atomic_xchg(arrivals + i, 0)
        tl.store(tokens + i, token)
        if DELIVERS:
            if FILTERS:
                if filtered == 0:
                    deliver(newest, sent, places, i, row, token)
            else:
                deliver(newest, sent, places, i, row, token)


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where chosen tokens go besides the result, without a kernel or a copy of their own.

    newest: [rows] int64, by the request's row, with 0 for a row that has no token; sent: int64 in pinned
    memory of the host; places: [m] int32, where in it each token goes, or -1.
    """

    newest: Tensor
    sent: Tensor
    places: Tensor


class TokenSampler:
    """Samples up to `max_rows` rows at a time; holds what the programs of a row tell each other.

    One of its calls has to end before the next begins, as on one stream they do.
    """

    def __init__(self, max_rows: int, device: torch.device, *, pdl: bool = False) -> None:
        self._best = torch.full((max_rows,), NOTHING.value, dtype=torch.int64, device=device)
        self._arrivals = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._options = launch_options(pdl)

    def __call__(
        self,
        logits: Tensor,
        rows: Tensor,
        positions: Tensor,
        *,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
        filters: bool,
        delivery: Delivery | None = None,
    ) -> Tensor:
        """The token of each row of logits, [m] int64; -1 where no logit is finite, or one is NaN.

        logits: [m, vocab] float32, bfloat16 or float16, contiguous; rows: [m], where in the tables each
        request's parameters are; positions: [m], the index in its sequence of the token to be drawn.
        The tables: temperature (0 is greedy), top_p (1 is off), min_p (0 is off) float32, top_k (0 is off)
        integers, seed int64 (the bits of the unsigned seed). Without `filters` the last three that filter
        are not looked at. Order: temperature, min-p, top-k, top-p; a tie at the edge goes to the lower id.
        Raises `ValueError` for more than `max_rows` rows.
        """
        m, vocab = logits.shape
        tokens = torch.empty(m, dtype=torch.int64, device=logits.device)
        if m == 0:
            return tokens
        if m > len(self._best):
            raise ValueError(f"{m} rows of logits for a sampler of {len(self._best)}")
        blocks = triton.cdiv(vocab, WORDS * LANE)
        groups = blocks * WORDS * LANE // GROUP.value
        largest = torch.empty(m, groups, device=logits.device) if filters else None
        block_best = torch.empty(m, blocks, dtype=torch.int64, device=logits.device) if filters else None
        given = (delivery.newest, delivery.sent, delivery.places) if delivery else (tokens, tokens, tokens)
        _best_kernel[(m, blocks)](
            tokens,
            *given,
            self._best,
            self._arrivals,
            largest,
            block_best,
            logits,
            rows,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            positions,
            VOCAB=vocab,
            LANE=LANE,
            FILTERS=filters,
            DELIVERS=delivery is not None,
            num_warps=4,
            maxnreg=MAX_REGISTERS,
            **self._options,
        )
        if filters:
            filter_kernel[(m,)](
                tokens,
                *given,
                torch.empty(m, CAPACITY, dtype=torch.int64, device=logits.device),
                torch.empty(m, groups, dtype=torch.int32, device=logits.device),
                largest,
                block_best,
                logits,
                rows,
                temperature,
                top_k,
                top_p,
                min_p,
                seed,
                positions,
                VOCAB=vocab,
                LANE=LANE,
                UNUSED=UNUSED_BITS[logits.dtype],
                CAPACITY=CAPACITY,
                NUM_BLOCKS=blocks,
                BLOCKS=triton.next_power_of_2(blocks),
                NUM_GROUPS=groups,
                GROUPS=triton.next_power_of_2(groups),
                DELIVERS=delivery is not None,
                num_warps=16,
                **self._options,
            )
        return tokens
