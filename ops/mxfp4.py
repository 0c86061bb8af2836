"""MXFP4: numbers of 4 bits (e2m1), of which 32 share a power of two.

Defined by the OCP Microscaling Formats specification 1.0, and as gpt-oss stores its experts.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 32  # columns that share a scale
NAN_SCALE = 255
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; those of 8 to 15 are negative
LARGEST = MAGNITUDES[-1]
BIAS = 127


def values(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for: [rows, columns].

    codes: [rows, columns / 2] uint8, the first of two columns in the lower half; scales: [rows, columns / 32]
    uint8, e for a factor of 2 ** (e - 127). Exact in float32 and bfloat16, where its smallest numbers end.
    """
    numbers = torch.tensor(MAGNITUDES, device=codes.device)
    numbers = torch.cat((numbers, -numbers))
    code = torch.arange(256, device=codes.device)
    pairs = torch.stack((numbers[code & 15], numbers[code >> 4]), -1)
    found = pairs[codes.int()].view(len(codes), -1, BLOCK) * powers(scales)[:, :, None]
    return found.view(len(codes), -1).to(dtype)


def powers(scales: Tensor) -> Tensor:
    """2 ** (e - 127) in float32, of any shape; 255 is a NaN."""
    bits = scales.int()
    found = torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)
    return found.masked_fill_(bits == NAN_SCALE, torch.nan)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix [rows, columns] to codes and scales, by the nearest number; see `values`.

    As the specification has it, the largest of a block gets the largest exponent of e2m1; what is then beyond
    6 becomes 6. columns are a multiple of 32.
    """
    blocks = weight.float().view(len(weight), -1, BLOCK)
    _, exponents = blocks.abs().amax(2).frexp()  # of numbers in [0.5, 1)
    scales = (exponents - 1 - 2 + BIAS).clamp(0, NAN_SCALE - 1).to(torch.uint8)
    scaled = blocks / powers(scales)[:, :, None]
    borders = torch.tensor([(a + b) / 2 for a, b in pairwise(MAGNITUDES)])
    codes = torch.bucketize(scaled.abs(), borders.to(weight.device)) + 8 * (scaled < 0)
    codes = codes.to(torch.uint8).view(len(weight), -1, 2)
    return codes[:, :, 0] | codes[:, :, 1] << 4, scales
