"""Applies the bitmasks of a `TokenMask` to logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def take_out(logits: Tensor, masked: Sequence[int], bits: np.ndarray) -> None:
    """Set logits[masked[i], token] to -inf where bit `token` of bits[i] is 0.

    logits: [n, vocab] float32, changed in place; bits: [m, ceil(vocab / 32)] int32.
    """
    if not masked:
        return
    words, at = torch.from_numpy(bits), torch.tensor(masked)
    if logits.is_cuda:  # a machine without a GPU need not have Triton
        from microvllm.ops.gpu.bitmask import apply_bitmask

        words, at = (each.pin_memory().to(logits.device, non_blocking=True) for each in (words, at))
        apply_bitmask(logits, words, at)
        return
    shifts = torch.arange(32, dtype=torch.int32)
    allowed = (words[:, :, None] >> shifts & 1).bool().flatten(1)[:, : logits.shape[1]]
    logits[at] = logits[at].masked_fill(~allowed, -torch.inf)
