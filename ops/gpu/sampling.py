"""Tokens from logits in one pass, or a few for rows with top-k, top-p or min-p: never a sort, never the host.

A token is drawn by the Gumbel-max trick (Gumbel, 1954): the largest of logit / temperature + g, where the g
are independent standard Gumbel numbers, is distributed as softmax(logits / temperature). The g of an entry
of the vocabulary is a function of (seed, position, entry) alone: word w of Philox-4x32-7 (Salmon et al.,
2011) with the seed as key and (c, position's low half, its high half, 0) as counter, where
w = entry // 1024 % 4 and c = entry // 4096 * 1024 + entry % 1024.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.launch import follow, launch_options

NO_TOKEN = -1
WORDS = 4  # that one Philox gives
LANE = 1024  # entries between those whose numbers come from one Philox
_LOWEST = -(1 << 63)
_STEP = {torch.float32: 1, torch.bfloat16: 1 << 16, torch.float16: 1 << 13}


@triton.jit
def _ordered(value):
    """float32 -> int32 in the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(key):
    """The inverse of `_ordered`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _gumbel(word):
    """Standard Gumbel numbers, -log(-log(1 - v)), for v spread evenly over (0, 1) by 32 random bits."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # 1 - v loses small v, and those make the large numbers: the series there is exact to float32.
    return -tl.log(tl.where(v < 0.00390625, v * (1.0 + v * (0.5 + v * 0.33333334)), -tl.log(1.0 - v)))


@triton.jit
def _numbers(seed, position, block, LANE: tl.constexpr, ROUNDS: tl.constexpr = 7):
    """The Gumbel numbers of entries [4 * LANE * block, 4 * LANE * (block + 1)), in four tensors of LANE."""
    counter = (block * LANE + tl.arange(0, LANE)).to(tl.uint32)
    position = position.to(tl.uint64)
    low = position.to(tl.uint32) + tl.zeros_like(counter)
    high = (position >> 32).to(tl.uint32) + tl.zeros_like(counter)
    a, b, c, d = tl.philox(seed, counter, low, high, tl.zeros_like(counter), ROUNDS)
    return _gumbel(a), _gumbel(b), _gumbel(c), _gumbel(d)


@triton.jit
def _no_nan(value):
    """float32 with infinity for NaN, so that it is found as the largest."""
    return tl.where(value != value, float("inf"), value)


@triton.jit
def _rank(score, entry):
    """int64 in the order of the scores; of equal ones the lowest entry is first."""
    return (_ordered(score).to(tl.int64) << 32) | (0x7FFFFFFF - entry).to(tl.int64)


@triton.jit
def _first_of(largest, score, entry):
    """The lowest of the entries with the largest score, [n] each."""
    return tl.min(tl.where(score == largest, entry, 0x7FFFFFFF), 0)


@triton.jit
def _token(rank):
    """The entry of a rank, or -1 if its score is not finite."""
    score = _unordered((rank >> 32).to(tl.int32))
    finite = tl.abs(score) < float("inf")
    return tl.where(finite, 0x7FFFFFFF - (rank & 0x7FFFFFFF), -1)


@triton.jit
def _best_kernel(
    tokens,
    best,
    arrivals,
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
    PDL: tl.constexpr,
):
    """Program: 4 * LANE entries of one row. Greedy and filtered rows: the argmax; others: a draw."""
    follow(PDL)
    i = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = tl.load(rows + i)
    temperature = tl.load(temperatures + row)
    draws = temperature > 0
    if FILTERS:
        draws = draws & (tl.load(top_ks + row) <= 0)
        draws = draws & (tl.load(top_ps + row) >= 1) & (tl.load(min_ps + row) <= 0)
    entry = block * 4 * LANE + tl.arange(0, LANE)
    logits += i * VOCAB + entry
    # Entries past the end are below every finite score.
    a = tl.load(logits, entry < VOCAB, float("-inf")).to(tl.float32)
    b = tl.load(logits + LANE, entry + LANE < VOCAB, float("-inf")).to(tl.float32)
    c = tl.load(logits + 2 * LANE, entry + 2 * LANE < VOCAB, float("-inf")).to(tl.float32)
    d = tl.load(logits + 3 * LANE, entry + 3 * LANE < VOCAB, float("-inf")).to(tl.float32)
    if draws:
        ga, gb, gc, gd = _numbers(tl.load(seeds + row), tl.load(positions + i), block, LANE)
        a, b = a / temperature + ga, b / temperature + gb
        c, d = c / temperature + gc, d / temperature + gd
    a, b, c, d = _no_nan(a), _no_nan(b), _no_nan(c), _no_nan(d)
    largest = tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), 0)
    first = _first_of(largest, a, entry)
    first = tl.minimum(first, _first_of(largest, b, entry + LANE))
    first = tl.minimum(first, _first_of(largest, c, entry + 2 * LANE))
    first = tl.minimum(first, _first_of(largest, d, entry + 3 * LANE))
    tl.atomic_max(best + i, _rank(largest, first))
    if tl.atomic_add(arrivals + i, 1) == tl.num_programs(1) - 1:
        # The last one: nobody else touches this row any more, so it can be made ready for the next step.
        winner = tl.atomic_xchg(best + i, -9223372036854775808)
        tl.atomic_xchg(arrivals + i, 0)
        tl.store(tokens + i, _token(winner))


@triton.jit
def _weigh(logits, threshold, top, scale, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Of the entries from `threshold` on: their number, and the sum of 2 ** ((logit - top) * scale)."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, VOCAB, BLOCK, num_stages=4):
        entry = start + tl.arange(0, BLOCK)
        # NaN, which padding is, too, is not above anything.
        value = tl.load(logits + entry, entry < VOCAB, float("nan")).to(tl.float32)
        taken = value >= threshold
        count += taken.to(tl.int32)
        mass += tl.where(taken, tl.exp2((value - top) * scale), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _between(low, high, top, temperature):
    """Where to look next in [low, high): the middle; farther and farther down while there is no low."""
    down = high - tl.maximum(2.0 * (top - high), 16.0 * temperature)
    return tl.where(low < -3e38, down, low + (high - low) * 0.5)


@triton.jit
def _filter_kernel(
    tokens,
    logits,
    rows,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: one row. Draws again where the row has a filter; its token so far is the argmax.

    The entries that a filter keeps are those above a threshold and, of those at the threshold, the first
    few. Bisection finds it: [low, high) holds the threshold, until one entry, or one value, is left.
    Values are STEP apart at least, in the numbers of `_ordered`.
    """
    follow(PDL)
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row).to(tl.int32)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    token = tl.load(tokens + i)
    if (temperature > 0) & (token >= 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        logits += i * VOCAB
        top = tl.load(logits + token).to(tl.float32)
        # log(0) = -inf keeps all that is finite.
        floor = tl.maximum(top + temperature * tl.log(min_p), -3.4028234663852886e38)
        low, high = _ordered(floor), _ordered(top) + 1
        scale = 1.4426950408889634 / temperature
        low_count, low_mass = _weigh(logits, floor, top, scale, VOCAB, BLOCK)
        high_count, high_mass = low_count * 0, low_mass * 0.0
        kept = low_count  # how many of [low, high) stay; all from `high` on do
        total = low_mass
        # First by number, then by mass: each narrows what the one before it left.
        for by_mass in tl.static_range(2):
            if by_mass:
                active = top_p < 1
                wanted = top_p * total
            else:
                active = (top_k > 0) & (top_k < low_count)
                wanted = top_k.to(tl.float32)
            if active:
                high, high_count, high_mass = _ordered(top) + 1, low_count * 0, low_mass * 0.0
                while (low_count - high_count > 1) & (high.to(tl.int64) - low.to(tl.int64) > STEP):
                    middle = _ordered(_between(_unordered(low), _unordered(high), top, temperature))
                    middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
                    count, mass = _weigh(logits, _unordered(middle), top, scale, VOCAB, BLOCK)
                    enough = mass >= wanted if by_mass else count >= top_k
                    if enough:
                        low, low_count, low_mass = middle, count, mass
                    else:
                        high, high_count, high_mass = middle, count, mass
                each = (low_mass - high_mass) / tl.maximum(low_count - high_count, 1)
                if by_mass:
                    needed = tl.ceil((wanted - high_mass) / tl.maximum(each, 1e-38))
                    needed = tl.minimum(needed, (low_count - high_count).to(tl.float32)).to(tl.int32)
                    kept = tl.minimum(tl.maximum(needed, 1), kept)
                else:
                    kept = top_k - high_count
                    total = high_mass + kept * each
        first, above = _unordered(low), _unordered(high)
        seed, position = tl.load(seeds + row), tl.load(positions + i)
        best = tl.full((LANE,), -9223372036854775808, tl.int64)
        seen = low_count * 0
        ties = kept < low_count - high_count
        for block in range(0, tl.cdiv(VOCAB, 4 * LANE)):
            numbers = _numbers(seed, position, block, LANE)
            for w in tl.static_range(4):
                entry = (block * 4 + w) * LANE + tl.arange(0, LANE)
                value = tl.load(logits + entry, entry < VOCAB, float("nan")).to(tl.float32)
                stays = value >= first
                if ties:
                    between = (stays & (value < above)).to(tl.int32)
                    place = seen + tl.cumsum(between, 0)
                    seen += tl.sum(between, 0)
                    stays = (value >= above) | (stays & (place <= kept))
                score = tl.where(stays, value / temperature + numbers[w], float("-inf"))
                best = tl.maximum(best, _rank(score, entry))
        tl.store(tokens + i, _token(tl.max(best, 0)))


class TokenSampler:
    """Samples up to `max_rows` rows at a time; holds what the programs of a row tell each other.

    One of its calls has to end before the next begins, as on one stream they do.
    """

    def __init__(self, max_rows: int, device: torch.device, *, pdl: bool = False) -> None:
        self._best = torch.full((max_rows,), _LOWEST, dtype=torch.int64, device=device)
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
        out: Tensor | None = None,
    ) -> Tensor:
        """The token of each row of logits, [m] int64; -1 where no logit is finite, or one is NaN.

        logits: [m, vocab] float32, bfloat16 or float16, contiguous; rows: [m], where in the tables each
        request's parameters are; positions: [m] int64, the index in its sequence of the token to be drawn.
        The tables: temperature (0 is greedy), top_p (1 is off), min_p (0 is off) float32, top_k (0 is off)
        integers, seed int64 (the bits of the unsigned seed). Without `filters` the last three that filter
        are not looked at. Order: temperature, min-p, top-k, top-p; a tie at the edge goes to the lower id.
        Raises `ValueError` for more than `max_rows` rows.
        """
        m, vocab = logits.shape
        tokens = torch.empty(m, dtype=torch.int64, device=logits.device) if out is None else out
        if m == 0:
            return tokens
        if m > len(self._best):
            raise ValueError(f"{m} rows of logits for a sampler of {len(self._best)}")
        _best_kernel[(m, triton.cdiv(vocab, WORDS * LANE))](
            tokens,
            self._best,
            self._arrivals,
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
            num_warps=4,
            **self._options,
        )
        if filters:
            _filter_kernel[(m,)](
                tokens,
                logits,
                rows,
                temperature,
                top_k,
                top_p,
                min_p,
                seed,
                positions,
                VOCAB=vocab,
                BLOCK=8 * LANE,
                LANE=LANE,
                STEP=_STEP[logits.dtype],
                num_warps=16,
                **self._options,
            )
        return tokens
