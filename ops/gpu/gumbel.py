"""Random numbers for sampling, as a function of (seed, position, entry of the vocabulary) alone.

They are words of Philox-4x32-7 (Salmon et al., 2011) with the seed as key and (c, position's low half, its
high half, 0) as counter, where c = entry // 4096 * 1024 + entry % 1024, and the word is entry // 1024 % 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORDS = 4  # that one Philox gives
LANE = 1024  # entries between those whose numbers come from one Philox


@triton.jit
def _gumbel(word):
    """Standard Gumbel numbers, -log(-log(1 - v)), for v spread evenly over (0, 1) by 32 random bits."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # 1 - v loses small v, and those make the large numbers: the series there is exact to float32.
    return -tl.log(tl.where(v < 0.00390625, v * (1.0 + v * (0.5 + v * 0.33333334)), -tl.log(1.0 - v)))


@triton.jit
def _words(seed, position, counter, ROUNDS: tl.constexpr = 7):
    counter = counter.to(tl.uint32)
    position = position.to(tl.uint64)
    low = position.to(tl.uint32) + tl.zeros_like(counter)
    high = (position >> 32).to(tl.uint32) + tl.zeros_like(counter)
    return tl.philox(seed, counter, low, high, tl.zeros_like(counter), ROUNDS)


@triton.jit
def gumbel_block(seed, position, block, LANE: tl.constexpr):
    """The Gumbel numbers of entries [4 * LANE * block, 4 * LANE * (block + 1)), in four tensors of LANE."""
    a, b, c, d = _words(seed, position, block * LANE + tl.arange(0, LANE))
    return _gumbel(a), _gumbel(b), _gumbel(c), _gumbel(d)


@triton.jit
def gumbel_of(seed, position, entry, LANE: tl.constexpr):
    """The same numbers, of any entries: int32 [n] -> float32 [n], for four times the work."""
    a, b, c, d = _words(seed, position, entry // (4 * LANE) * LANE + entry % LANE)
    word = entry // LANE % 4
    return _gumbel(tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d)))
