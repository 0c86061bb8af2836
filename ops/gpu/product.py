"""What the GPU's products of a matrix have in common, whatever the matrix is stored as."""

from __future__ import annotations

from torch import Tensor

from microvllm.ops.gpu.activation import silu_and_mul
from microvllm.ops.gpu.norm import rms_norm


class Product:
    """act(norm(x) @ weight.T + bias) + residual, which subclasses compute when they are called.

    norm is RMSNorm, or nothing without its weight; act is SwiGLU if `gated`, else nothing. arrivals: see
    `skinny.skinny_linear`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        arrivals: Tensor,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        gated: bool = False,
        pdl: bool,
    ) -> None:
        self._weight, self._bias, self._arrivals = weight, bias, arrivals
        self._norm, self._eps = norm, eps
        self._gated, self._pdl = gated, pdl

    def _normed(self, x: Tensor) -> Tensor:
        return x if self._norm is None else rms_norm(x, self._norm, self._eps, pdl=self._pdl)

    def _activated(self, y: Tensor) -> Tensor:
        return silu_and_mul(y, pdl=self._pdl) if self._gated else y
