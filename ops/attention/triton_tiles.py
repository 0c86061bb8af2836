"""A tile of cached keys and values in a kernel: where it lies, and what it adds to a running softmax.

Beside a cache of e4m3 products are of float16, which has all of its numbers. The cache is read in int16 words
of two numbers; their lower bytes, the even columns, become one factor and their upper bytes another. So words
go to the threads as numbers of 16 bits do, by instructions that bytes do not have.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Two words of two e4m3 each: both lower bytes as float16, then both upper ones.
UNPACK_E4M3 = tl.constexpr("""{
    .reg .b16 first, second;
    .reg .b32 a, b;
    mov.b32 {first, second}, $2;
    cvt.rn.f16x2.e4m3x2 a, first;
    cvt.rn.f16x2.e4m3x2 b, second;
    prmt.b32 $0, a, b, 0x5410;
    prmt.b32 $1, a, b, 0x7632;
}""")


@triton.jit
def cached_rows(
    table, start, end, head, ROOM: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr
):
    """Where positions [start, start + TILE) lie in a layer's keys or values: [TILE] int64 elements.

    ROOM: see `room_of`. start is a multiple of TILE; positions from `end` on, which the table may not hold,
    get any row.
    """
    at = start + tl.arange(0, TILE)
    block = tl.load(table + start // PAGE) if TILE <= PAGE else tl.load(table + at // PAGE, at < end, 0)
    return ((block.to(tl.int64) * ROOM + head) * PAGE + at % PAGE) * D


def room_of(keys: Tensor) -> int:
    """Heads from a block to the next one: kv_heads, or more where a page holds other layers, too.

    keys: a layer's keys or values, [blocks, kv_heads, block, d].
    """
    return keys.stride(0) // (keys.shape[2] * keys.shape[3])


@triton.jit
def halves(x, FP8: tl.constexpr):
    """[n, d] as what one product takes, or, beside e4m3, as two of the even and of the odd columns."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])) if FP8 else (x,)


@triton.jit
def factors_of(tile, DTYPE: tl.constexpr, FP8: tl.constexpr):
    """Cached keys or values as a product takes them; of words of two e4m3 the lower bytes and the upper."""
    if not FP8:
        factors = (tile,)
    elif INTERPRETED:
        low = (tile & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        high = (tile >> 8 & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        factors = (low.to(DTYPE), high.to(DTYPE))
    else:
        low, high = tl.inline_asm_elementwise(
            UNPACK_E4M3, "=&r,=&r,r", [tile], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
        factors = (low.to(DTYPE), high.to(DTYPE))
    return factors


@triton.jit
def score_tile(q, k, scale):
    """[ROWS, TILE] scores in powers of two. q, k: their columns in one tensor or two."""
    scores = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    for i in tl.static_range(1, len(q)):
        scores = tl.dot(q[i], tl.trans(k[i]), scores, input_precision="ieee")
    return scores * scale


@triton.jit
def attend_tile(attended, highest, weight_sum, scores, v):
    """Take a tile into the running softmax. scores: [ROWS, TILE], in powers of two; v: [TILE, BLOCK_D]."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    kept = tl.exp2(highest - higher)
    weight_sum = weight_sum * kept + tl.sum(weights, 1)
    weights = weights.to(v[0].dtype)
    sums = ()
    for i in tl.static_range(len(v)):
        sums += (tl.dot(weights, v[i], attended[i] * kept[:, None], input_precision="ieee"),)
    return sums, higher, weight_sum
