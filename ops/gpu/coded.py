"""Products with matrices that stay in codes of 4 or 8 bits on the GPU (`ops.coded.CodedTensor`).

Few rows are multiplied with what the codes stand for, exactly, up to the order of float32 sums: bound by the
bytes of the codes. For many rows the matrix is widened to the activations' type, in memory that the next
product uses again, and multiplied by cuBLAS.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microvllm.ops.coded import CodedTensor
from microvllm.ops.gpu.coded_gemv import coded_gemv
from microvllm.ops.gpu.coded_skinny import coded_skinny, widened
from microvllm.ops.gpu.cublas import cublas_linear
from microvllm.ops.gpu.launch import shared_memory
from microvllm.ops.gpu.levers import Levers
from microvllm.ops.gpu.product import Product
from microvllm.ops.gpu.tiling import (
    EARLY_CODED_GROUP,
    MAX_CODED_ROWS,
    MAX_EARLY_CODED_ROWS,
    MAX_GATED_CODED_ROWS,
    MAX_WIDE_CODED_ROWS,
    coded_gemv_tiling,
    coded_tiling,
)


class CodedProduct(Product):
    """A `Product` with a matrix in codes."""

    _weight: CodedTensor

    def __init__(
        self, weight: CodedTensor, bias: Tensor | None, arrivals: Tensor, levers: Levers, **options: Any
    ) -> None:
        """options: those of `Product`."""
        super().__init__(weight, bias, arrivals, **options)
        self._shared_memory = shared_memory(arrivals.device)
        self._fetch = levers.early_zeros
        early = levers.early_codes and weight.bits == 4 and weight.zeros is None
        self._early = MAX_EARLY_CODED_ROWS if early and weight.group >= EARLY_CODED_GROUP else 0

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [m, in] -> [m, out]; the residual may be overwritten by the result."""
        weight, gated, pdl = self._weight, self._gated, self._pdl
        x = self._normed(x)
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        m, rows = x.shape[0], weight.shape[0]
        if 0 < m <= self._early and x.dtype.itemsize == 2:
            early = coded_gemv_tiling(m, weight.shape[1] // weight.plane, gated=gated)
            return coded_gemv(x, weight, self._bias, residual, early, gated=gated, pdl=pdl)
        if 0 < m <= (MAX_CODED_ROWS if x.dtype.itemsize == 2 else MAX_WIDE_CODED_ROWS):
            fused = gated and m <= MAX_GATED_CODED_ROWS
            sizes = m, rows // (1 + fused), weight.columns, weight.step
            tiling = coded_tiling(*sizes, self._shared_memory, gated=fused)
            options = {"gated": fused, "pdl": pdl, "fetch": self._fetch}
            y = coded_skinny(x, weight, self._arrivals, self._bias, residual, tiling, **options)
            return y if fused else self._activated(y)
        wide = torch.empty(rows, weight.columns, dtype=x.dtype, device=x.device)
        y = cublas_linear(x, widened(weight, wide, pdl=pdl), self._bias, residual)
        return self._activated(y)
