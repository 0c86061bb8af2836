"""Takes tokens out of logits by a bitmask: m * vocab / 8 bytes read, 4 written for each token that is out."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WORDS = tl.constexpr(64)  # of 32 tokens, a program


@triton.jit
def _bitmask_kernel(logits, words, at, VOCAB: tl.constexpr, NUM_WORDS: tl.constexpr):
    """Program: WORDS words of one row of the mask."""
    i = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bits = tl.load(words + i * NUM_WORDS + word, word < NUM_WORDS, 0)
    bit = tl.arange(0, 32)
    entry = word[:, None] * 32 + bit[None, :]
    out = ((bits[:, None] >> bit[None, :]) & 1) == 0
    row = tl.load(at + i) * VOCAB
    tl.store(logits + row + entry, float("-inf"), out & (entry < VOCAB))


def apply_bitmask(logits: Tensor, words: Tensor, at: Tensor) -> None:
    """Set logits[at[i], token] to -inf where bit `token` of words[i] is 0.

    logits: [n, vocab] float32, contiguous, changed in place; words: [m, ceil(vocab / 32)] int32;
    at: [m] int64.
    """
    vocab = logits.shape[1]
    grid = (words.shape[0], triton.cdiv(words.shape[1], WORDS.value))
    _bitmask_kernel[grid](logits, words, at, VOCAB=vocab, NUM_WORDS=words.shape[1], num_warps=4)
