"""Weights that stay in the block formats of a GGUF file."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class QuantizedRows(NamedTuple):
    """Rows of a matrix in one format: ggml's number of it, how many they are, and the bytes of each."""

    format: int
    rows: int
    row_bytes: int


class QuantizedTensor(Tensor):
    """A matrix in ggml's block formats, its rows one after another as a GGUF file has them.

    As a tensor it is these bytes: [n] uint8. `parts` are the matrices of the file that it is made of, below
    each other; each row has `columns` weights.
    """

    columns: int
    parts: tuple[QuantizedRows, ...]
    packed: Tensor | None  # what operators that pack their weights made of it: a tied matrix is used twice

    # Bytes have no arithmetic; what is made of them is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(data: Tensor, columns: int, parts: tuple[QuantizedRows, ...]) -> QuantizedTensor:
        """data: [n] uint8, the bytes of all parts."""
        tensor: QuantizedTensor = Tensor._make_subclass(QuantizedTensor, data)
        tensor.columns, tensor.packed = columns, None
        tensor.parts = parts
        return tensor

    def split_parts(self, each: int = 1) -> list[QuantizedTensor]:
        """Every `each` parts as a tensor of their own."""
        if len(self.parts) == each:
            return [self]  # with what was packed of it
        groups = [self.parts[i : i + each] for i in range(0, len(self.parts), each)]
        sizes = [sum(part.rows * part.row_bytes for part in group) for group in groups]
        pairs = zip(torch.split(self, sizes), groups, strict=True)
        return [QuantizedTensor.of(data, self.columns, group) for data, group in pairs]
