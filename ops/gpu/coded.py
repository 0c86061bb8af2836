"""Products with matrices that stay in codes of 4 or 8 bits on the GPU (`ops.coded.CodedTensor`).

Few rows are multiplied with what the codes stand for, exactly, up to the order of float32 sums: bound by the
bytes of the codes. For many rows the matrix is widened to the activations' type, in memory that the next
product uses again, and multiplied by cuBLAS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microvllm.ops.coded import CodedTensor
from microvllm.ops.gpu.activation import silu_and_mul
from microvllm.ops.gpu.coded_skinny import coded_skinny, widened
from microvllm.ops.gpu.cublas import cublas_linear
from microvllm.ops.gpu.levers import Levers
from microvllm.ops.gpu.norm import rms_norm
from microvllm.ops.gpu.tiling import (
    MAX_CODED_ROWS,
    MAX_GATED_CODED_ROWS,
    MAX_WIDE_CODED_ROWS,
    coded_tiling,
)


class CodedProduct:
    """act(norm(x) @ weight.T + bias) + residual, as `ops.gpu.operators.GpuProduct`."""

    def __init__(
        self,
        weight: CodedTensor,
        bias: Tensor | None,
        arrivals: Tensor,
        levers: Levers,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        gated: bool = False,
        pdl: bool,
    ) -> None:
        self._weight, self._bias, self._arrivals = weight, bias, arrivals
        self._norm, self._eps = norm, eps
        self._gated, self._pdl = gated, pdl

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [m, in] -> [m, out]; the residual may be overwritten by the result."""
        weight, gated, pdl = self._weight, self._gated, self._pdl
        if self._norm is not None:
            x = rms_norm(x, self._norm, self._eps, pdl=pdl)
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        m, rows = x.shape[0], weight.shape[0]
        if 0 < m <= (MAX_CODED_ROWS if x.dtype.itemsize == 2 else MAX_WIDE_CODED_ROWS):
            fused = gated and m <= MAX_GATED_CODED_ROWS
            tiling = coded_tiling(m, rows // (1 + fused), weight.columns, weight.step, gated=fused)
            y = coded_skinny(x, weight, self._arrivals, self._bias, residual, tiling, gated=fused, pdl=pdl)
            return silu_and_mul(y, pdl=pdl) if gated and not fused else y
        wide = torch.empty(rows, weight.columns, dtype=x.dtype, device=x.device)
        y = cublas_linear(x, widened(weight, wide, pdl=pdl), self._bias, residual)
        return silu_and_mul(y, pdl=pdl) if gated else y
