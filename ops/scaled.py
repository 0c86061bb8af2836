"""Matrices that are kept as a code of 8 bits for each weight, and scales in float32."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


class ScaledTensor(Tensor):
    """A matrix [rows, columns]: codes in e4m3, each times the scale of its block.

    As a tensor it is its codes. `scales`: [rows / block[0], columns / block[1]], rounded up, float32.
    `activations`: what many rows may be rounded to before they are multiplied: "none"; "token", e4m3 with a
    scale for each row; "tensor", e4m3 with the scale `input_scale` for all.
    """

    scales: Tensor
    block: tuple[int, int]
    activations: str
    input_scale: float

    # Codes have no arithmetic; what is made of them is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(
        codes: Tensor,
        scales: Tensor,
        block: tuple[int, int],
        activations: str = "none",
        input_scale: float = 1.0,
    ) -> ScaledTensor:
        """codes: [rows, columns] e4m3, contiguous; the rest as above."""
        tensor: ScaledTensor = Tensor._make_subclass(ScaledTensor, codes)
        tensor.scales, tensor.block = scales, block
        tensor.activations, tensor.input_scale = activations, input_scale
        return tensor

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix that it stands for, each product of code and scale rounded to `dtype`."""
        rows, columns = self.shape
        scales = expand(self.scales, self.block, rows, columns)
        return (self.as_subclass(Tensor).float() * scales).to(dtype)


def expand(scales: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """A scale for each element, or each row if a block has all columns: [rows, columns] or [rows, 1]."""
    found = scales.repeat_interleave(block[0], 0)[:rows]
    return found if block[1] >= columns else found.repeat_interleave(block[1], 1)[:, :columns]


def quantize(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Round a matrix [rows, columns] to codes and the scales of its blocks; 0 in `block` is all of it.

    The largest of a block becomes the largest code, as vLLM and llm-compressor round without calibration;
    the scale of a block of zeros is tiny.
    """
    rows, columns = weight.shape
    height, width = block[0] or rows, block[1] or columns
    down, across = -(-rows // height), -(-columns // width)
    padded = torch.nn.functional.pad(weight, (0, across * width - columns, 0, down * height - rows))
    largest = padded.view(down, height, across, width).abs().amax((1, 3)).float()
    scales = largest.clamp(min=1e-12) / E4M3_MAX
    codes = (weight.float() / expand(scales, (height, width), rows, columns)).clamp(-E4M3_MAX, E4M3_MAX)
    return codes.to(E4M3), scales
