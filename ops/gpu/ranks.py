"""Integers in the order of an entry's value, and of equal values the lowest entry first: no two are equal."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NOTHING = tl.constexpr(-(1 << 63))  # below every rank
# How many low bits are zero in every number of a type, as a float32.
UNUSED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


@triton.jit
def key_of(value, UNUSED: tl.constexpr):
    """float32 -> int32 in the same order; neighbours among the numbers of a type have neighbouring keys."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> UNUSED


@triton.jit
def value_of(key, UNUSED: tl.constexpr):
    """The inverse of `key_of`."""
    bits = (key << UNUSED) ^ ((key >> 31) & 0x7FFFFFFF)
    return (bits & -(1 << UNUSED)).to(tl.float32, bitcast=True)


@triton.jit
def rank_of(value, entry, UNUSED: tl.constexpr = 0):
    """float32 and int32 -> int64: the key, then what falls as the entry rises."""
    return (key_of(value, UNUSED).to(tl.int64) << 32) | (0x7FFFFFFF - entry).to(tl.int64)


@triton.jit
def entry_of(rank):
    """Return the entry of a rank, int32."""
    return 0x7FFFFFFF - (rank & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def first_rank(value, UNUSED: tl.constexpr):
    """The lowest rank of what is not below `value`."""
    key = key_of(value, UNUSED)
    return (key + (value_of(key, UNUSED) < value).to(tl.int32)).to(tl.int64) << 32


@triton.jit
def from_rank(value, entry, edge, last):
    """Whether the rank is at least that of value `edge` and entry `last`: in less work than ranks take."""
    return (value > edge) | ((value == edge) & (entry <= last))


@triton.jit
def token_of(rank):
    """The entry of a score's rank, int64; -1 if the score is not finite."""
    finite = tl.abs(value_of((rank >> 32).to(tl.int32), 0)) < float("inf")
    return tl.where(finite, entry_of(rank), -1).to(tl.int64)
