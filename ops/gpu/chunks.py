"""Finds a chunk's tokens in kernels whose grid does not depend on the lengths of segments."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_tokens(chunk, starts, segments, BT: tl.constexpr, SEGMENTS: tl.constexpr):
    """The first token of a chunk, and how many its segment has from there on: none beyond the last chunk.

    Segments are cut into chunks of BT tokens, the last of which may be shorter, and these are counted through
    all segments. starts: [segments + 1], see `SegmentTable`. SEGMENTS: a power of two, not below `segments`.
    """
    s = tl.arange(0, SEGMENTS)
    begin = tl.load(starts + s, s < segments, 0)
    length = tl.load(starts + s + 1, s < segments, 0) - begin
    blocks = (length + BT - 1) // BT
    ends = tl.cumsum(blocks, 0)
    owner = tl.sum((ends <= chunk).to(tl.int32), 0)
    done = (chunk - tl.sum(tl.where(s == owner, ends - blocks, 0), 0)) * BT
    first = tl.sum(tl.where(s == owner, begin, 0), 0) + done
    return first, tl.sum(tl.where(s == owner, length, 0), 0) - done
