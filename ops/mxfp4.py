"""MXFP4: numbers of 4 bits (e2m1), of which 32 share a power of two.

Defined by the OCP Microscaling Formats specification 1.0, and as gpt-oss stores its experts.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from microvllm.ops.coded import BLOCK as ROW_BLOCK
from microvllm.ops.coded import PLANE, in_rows, pack

BLOCK = 32  # columns that share a scale
PLACES = 8  # codes of a word, and so the scales of a run of words
NAN_SCALE = 255
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; those of 8 to 15 are negative
LARGEST = MAGNITUDES[-1]
BIAS = 127
MAX_SCALE = BIAS + 1  # of an `Mxfp4Tensor`: 2, so that kernels build a factor from the exponent's bits


class Mxfp4Tensor(Tensor):
    """A matrix [rows, columns] in MXFP4, as a GPU's products of experts take it.

    As a tensor it is its words, [rows, words] int32: those of a `CodedTensor` of 4 bits, with codes of e2m1.
    scales: [rows, 8 * runs of a row's words] uint8, none above `MAX_SCALE`, in the order of `scales_of`. Rows
    are a multiple of 16.
    """

    columns: int
    scales: Tensor

    # Codes have no arithmetic; what is made of them is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(words: Tensor, columns: int, scales: Tensor) -> Mxfp4Tensor:
        """words, scales: as `words_of` and `scales_of` make them; the rest as above."""
        tensor: Mxfp4Tensor = Tensor._make_subclass(Mxfp4Tensor, words)
        tensor.columns, tensor.scales = columns, scales
        return tensor

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix that it stands for: [rows, columns]."""
        words = in_rows(self.as_subclass(Tensor), PLANE)
        shifts = torch.arange(8, dtype=torch.int32, device=words.device) * 4
        runs = words.view(len(words), -1, 1, PLANE) >> shifts.view(-1, 1) & 15
        pairs = runs.view(len(words), -1)[:, : self.columns].to(torch.uint8).view(len(words), -1, 2)
        of_blocks = self.scales.view(len(words) // ROW_BLOCK, -1, ROW_BLOCK // 2, 2, PLACES)
        scales = of_blocks.permute(0, 3, 2, 1, 4).reshape(len(words), -1)[:, : self.columns // BLOCK]
        return values(pairs[:, :, 0] | pairs[:, :, 1] << 4, scales, dtype)


def words_of(codes: Tensor) -> Tensor:
    """codes: see `values`, rows a multiple of 16 -> the words of an `Mxfp4Tensor`."""
    return pack(torch.stack((codes & 15, codes >> 4), -1).flatten(1), 4)


def scales_of(scales: Tensor) -> Tensor:
    """scales: see `values` -> those of an `Mxfp4Tensor`: a block's lie together, run by run, as its words do.

    Of a block's rows [2, 8] and a run's scales the order is [8, 2, 8]: 16 bytes for a thread's two rows.
    """
    rows, groups = scales.shape
    runs = -(-groups // PLACES)
    padded = torch.nn.functional.pad(scales, (0, runs * PLACES - groups))
    parts = padded.view(rows // ROW_BLOCK, 2, ROW_BLOCK // 2, runs, PLACES)
    return parts.permute(0, 3, 2, 1, 4).reshape(rows, -1)


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
