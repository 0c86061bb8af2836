"""Matrices that are kept as codes of 4 or 8 bits, with a scale and a zero point for each group of columns."""

from __future__ import annotations

import torch
from torch import Tensor

PLANE = 32  # neighbouring columns, whose codes have the same place in as many words
NARROW_PLANE = 16  # of groups that are no multiple of PLANE: the fewest that a tensor core multiplies
BLOCK = 16  # rows whose words lie together


class CodedTensor(Tensor):
    """A matrix [rows, columns] of values (code - zero) * scale, or code * scale + offset.

    As a tensor it is its words, [rows, words] int32. A run of `plane` words of a row holds the next 32 / bits
    runs of `plane` columns, the first run in the lowest bits: a kernel that shifts and masks a tile of words
    finds neighbouring columns, as it reads x. Behind the last column the codes are 0. Rows are a multiple of
    BLOCK; the runs of a block's rows lie in the order in which the threads of a warp have the left operand of
    a tensor core's product (`in_fragments`), so that each loads 16 bytes that follow each other.

    bits: 4 or 8; group: columns that share a scale. scales: [groups, rows] of a floating-point dtype; zeros:
    [groups, rows], zero points in uint8, or offsets in a floating-point dtype, or None where the zero points
    are half the codes' range. order: [columns] int64, the column of x that each column of codes is multiplied
    with, or None: act-order quantises columns in another order. plane: PLANE or NARROW_PLANE.
    """

    bits: int
    plane: int
    columns: int
    group: int
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    # Codes have no arithmetic; what is made of them is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(
        words: Tensor,
        bits: int,
        columns: int,
        group: int,
        scales: Tensor,
        zeros: Tensor | None = None,
        order: Tensor | None = None,
        plane: int = PLANE,
    ) -> CodedTensor:
        """words: as `pack` makes them; the rest as above."""
        tensor: CodedTensor = Tensor._make_subclass(CodedTensor, words)
        tensor.bits, tensor.columns, tensor.group = bits, columns, group
        tensor.scales, tensor.zeros, tensor.order, tensor.plane = scales, zeros, order, plane
        return tensor

    @property
    def step(self) -> int:
        """Columns of a run of words."""
        return self.plane * 32 // self.bits

    @property
    def has_offsets(self) -> bool:
        """Whether `zeros` are offsets."""
        return self.zeros is not None and self.zeros.is_floating_point()

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix that it stands for, each value rounded once to `dtype`: [rows, columns]."""
        words, per = in_rows(self.as_subclass(Tensor), self.plane), 32 // self.bits
        shifts = torch.arange(per, dtype=torch.int32, device=words.device) * self.bits
        runs = words.view(words.shape[0], -1, 1, self.plane) >> shifts.view(-1, 1) & (1 << self.bits) - 1
        codes = runs.view(words.shape[0], -1)[:, : self.columns]
        of_column = torch.arange(self.columns, device=words.device) // self.group
        scales = self.scales.float().T[:, of_column]
        if self.zeros is None:
            values = (codes - (1 << self.bits - 1)).float() * scales
        elif self.has_offsets:
            values = codes.float() * scales + self.zeros.float().T[:, of_column]
        else:
            values = (codes - self.zeros.int().T[:, of_column]).float() * scales
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order, values)
        return values.to(dtype)


def pack(codes: Tensor, bits: int, plane: int = PLANE) -> Tensor:
    """[rows, columns] uint8, rows a multiple of BLOCK -> the words of a `CodedTensor`."""
    rows, columns = codes.shape
    per = 32 // bits
    steps = -(-columns // (plane * per))
    padded = torch.nn.functional.pad(codes, (0, steps * plane * per - columns))
    runs = padded.view(rows, steps, per, plane)
    words = torch.zeros(rows, steps, plane, dtype=torch.int32, device=codes.device)
    for place in range(per):
        words |= runs[:, :, place].int() << bits * place
    return in_fragments(words.view(rows, -1), plane)


def in_fragments(words: Tensor, plane: int = PLANE) -> Tensor:
    """[rows, words] row by row -> the same in the order of a `CodedTensor`.

    Of a block's rows [2, 8] and a run's words [plane / 8, 4, 2] the order is [plane / 8, 8, 4, 2, 2]: each
    thread, 8 rows by 4 pairs of words, has two rows 8 apart and a pair of words, plane / 8 times.
    """
    rows, count = words.shape
    parts = words.view(rows // BLOCK, 2, 8, count // plane, plane // 8, 4, 2)
    return parts.permute(0, 3, 4, 2, 5, 1, 6).reshape(rows, count)


def in_rows(words: Tensor, plane: int) -> Tensor:
    """The reverse of `in_fragments`."""
    rows, count = words.shape
    parts = words.view(rows // BLOCK, count // plane, plane // 8, 8, 4, 2, 2)
    return parts.permute(0, 5, 3, 1, 2, 4, 6).reshape(rows, count)
