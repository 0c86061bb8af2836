"""Computes the rotary frequencies of a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from microvllm.adapters.rope_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Angle a position for each pair of a head: [head_dim / 2] float32, 0 for pairs that are not rotated.

    "linear" is position interpolation (Chen et al., 2023, arXiv:2306.15595); "llama3" is the scheme of
    Llama 3.1's reference code: wavelengths shorter than original / high_freq_factor are kept, those
    longer than original / low_freq_factor are divided by `factor`, those between are blended; "yarn" is
    Peng et al., 2023 (arXiv:2309.00071), "longrope" Ding et al., 2024 (arXiv:2402.13753); "proportional" is
    Gemma 4's, which turns a part of the pairs, at the frequencies that they have in a whole head.
    "dynamic" and "longrope" are taken as for a text of the original length, unless `RopeSpec.at_length` was.
    """
    dim = head_dim if rope.rotary_dim is None else rope.rotary_dim
    return pad(_frequencies(rope, dim), (0, (head_dim - dim) // 2)) if dim else torch.zeros(head_dim // 2)


def _frequencies(rope: RopeSpec, dim: int) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    inv_freq = 1.0 / rope.theta**exponents
    if rope.scaling == "proportional":
        inv_freq[int(rope.proportion * dim // 2) :] = 0.0
        return inv_freq / rope.factor
    if rope.scaling == "linear":
        return inv_freq / rope.factor
    if rope.scaling == "longrope":
        return inv_freq / torch.tensor(rope.short_factors)
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / inv_freq
        ramp = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        return _blend(inv_freq, rope.factor, ramp.clamp(0.0, 1.0))
    if rope.scaling == "yarn":
        # Pairs that turn beta_fast times or more over the original context are kept, those that turn
        # beta_slow times or less are interpolated; pairs are counted as dimensions, as in the authors' code.
        low, high = (
            dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2) - low) / (high - low if high != low else 0.001)
        return _blend(inv_freq, rope.factor, 1 - ramp.clamp(0.0, 1.0))
    return inv_freq


def _blend(inv_freq: Tensor, factor: float, keep: Tensor) -> Tensor:
    """keep: [pairs], 1 where the frequency is kept and 0 where it is divided by `factor`."""
    return keep * inv_freq + (1 - keep) * inv_freq / factor
