"""Weights in the block formats of a GGUF file: gathered and multiplied from that form; see quantized.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microvllm.ops.operators import LinearOperator
from microvllm.ops.quantized import QuantizedTensor

if TYPE_CHECKING:
    from microvllm.ops.cpu.operators import CpuOperators


class QuantizedEmbedding:
    """[n] int64 row numbers -> those rows of the weight, [n, columns] float32."""

    def __init__(self, operators: CpuOperators, weight: QuantizedTensor) -> None:
        self._kernels, self._packed = operators.kernels, operators.pack(weight)

    def __call__(self, token_ids: Tensor) -> Tensor:
        data, number, _, columns = self._packed
        y = torch.empty(len(token_ids), columns)
        self._kernels.library.gather_quantized(
            self._kernels.pool,
            number,
            data.data_ptr(),
            token_ids.contiguous().data_ptr(),
            y.data_ptr(),
            len(token_ids),
            columns,
        )
        return y


class StackedLinear:
    """What `CpuLinear` computes, for a weight whose parts are of different formats."""

    def __init__(
        self,
        operators: CpuOperators,
        weight: QuantizedTensor,
        bias: Tensor | None,
        norm: Tensor | None,
        eps: float,
        gated: bool,
    ) -> None:
        self._operators = operators
        self._norm, self._eps, self._gated = norm, eps, gated
        self._bias = None if bias is None else bias.float()
        self._products: list[LinearOperator] = [operators.linear(part) for part in weight.split_parts()]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._norm is not None:
            x = self._operators.rms_norm(x, self._norm, self._eps)
        y = torch.cat([product(x) for product in self._products], dim=1)
        if self._bias is not None:
            y += self._bias
        if self._gated:
            y = self._operators.silu_and_mul(y)
        return y if residual is None else residual.add_(y)
