"""Products with matrices that stay in 8-bit codes on the GPU (`ops.scaled.ScaledTensor`).

Few rows are multiplied with what the codes stand for, exactly, up to the order of float32 sums: bound by the
bytes of the codes, half of those in 16 bits. To widen codes takes time that more rows have none of; where the
checkpoint wants that, these are rounded to codes as well: by `ops.gpu.stream`, then by torch's `_scaled_mm`,
at twice the rate of 16 bits. Otherwise the matrix is widened for each product of many rows, and so are
matrices in blocks without `levers.block_w8a8`. `levers.w8a8` switches the rounding off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microvllm.ops.gpu.cublas import cublas_linear
from microvllm.ops.gpu.e4m3 import round_rows, widen
from microvllm.ops.gpu.levers import Levers
from microvllm.ops.gpu.product import Product
from microvllm.ops.gpu.scaled_gemv import scaled_gemv
from microvllm.ops.gpu.scaled_skinny import scaled_skinny
from microvllm.ops.gpu.tiling import (
    MAX_EXACT_ROWS,
    MAX_GEMV_ROWS,
    MAX_STREAMED_ROWS,
    rounded_stream_tiling,
    scaled_gemv_tiling,
    scaled_skinny_tiling,
    scaled_stream_tiling,
)
from microvllm.ops.scaled import ScaledTensor

MIN_BLOCK_K = 32  # columns that share a scale, for a step of a tensor core's product
GROUP = 128  # columns of a token that share a scale, of weights in blocks of as many
# Rows and blocks of columns that `_scaled_mm` takes with scales of blocks: cuBLAS reads scales 16 bytes at a
# time. Other numbers of rows are refused, other numbers of blocks gave wrong results in some versions.
# https://docs.nvidia.com/cuda/cublas/#scaling-factors-layouts, https://github.com/pytorch/pytorch/pull/166752
BLOCK_MULTIPLE = 4
BLOCK_CUDA = (12, 9)  # the first version that has such products


class ScaledProduct(Product):
    """A `Product` with a matrix in 8-bit codes."""

    _weight: ScaledTensor

    def __init__(
        self, weight: ScaledTensor, bias: Tensor | None, arrivals: Tensor, levers: Levers, **options: Any
    ) -> None:
        """options: those of `Product`."""
        super().__init__(weight, bias, arrivals, **options)
        gated, pdl = self._gated, self._pdl
        rows, k = weight.shape
        whole_rows = weight.block[1] >= k
        # The largest power of two that divides the columns of a block.
        self._step = 128 if whole_rows else min(weight.block[1] & -weight.block[1], 128)
        self._group = 0 if whole_rows else GROUP
        kinds = ("token", "tensor") if whole_rows else ("token",) if weight.block[1] == GROUP else ()
        self._rounds = levers.w8a8 and weight.activations in kinds and rows % 16 == k % 16 == 0
        self._ahead = levers.block_w8a8 and self._group > 0
        self._in_blocks = (
            levers.block_w8a8
            and weight.block == (GROUP, GROUP)
            and k % (GROUP * BLOCK_MULTIPLE) == 0
            and _cuda_version() >= BLOCK_CUDA
        )
        # With two sums of blocks and of all rows, more do not fit the registers.
        most = MAX_STREAMED_ROWS // 2 if gated and not whole_rows else MAX_STREAMED_ROWS
        self._few = most if self._step >= MIN_BLOCK_K else 0
        self._streamed = None
        if levers.stream and k % 16 == 0 and self._step >= 64:
            from microvllm.ops.gpu.stream import StreamedWeight

            self._streamed = StreamedWeight(weight, arrivals, {}, gated=gated, pdl=pdl, ahead=self._ahead)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [m, in] -> [m, out]; the residual may be overwritten by the result."""
        m = x.shape[0]
        if 0 < m <= self._few:
            return self._product_of_few(x, residual)
        if self._rounds and x.dtype == torch.bfloat16 and (not self._group or (self._in_blocks and m > 0)):
            y = self._product_in_blocks(x) if self._group else self._rounded_product(x)
            if residual is not None:
                y = residual.add_(y)
        else:
            weight = widen(self._weight, x.dtype, pdl=self._pdl)
            y = cublas_linear(self._normed(x), weight, self._bias, residual)
        return self._activated(y)

    def _product_of_few(self, x: Tensor, residual: Tensor | None) -> Tensor:
        m, k = x.shape
        n = self._weight.shape[0] // (1 + self._gated)
        gated, pdl = self._gated, self._pdl
        if m <= MAX_GEMV_ROWS:
            norm = self._norm
            if m > 1:  # each program would normalise all rows for itself
                x, norm = self._normed(x), None
            tiling = scaled_gemv_tiling(m, n, k, gated=gated)
            return scaled_gemv(
                x, self._weight, self._bias, norm, self._eps, residual, tiling, gated=gated, pdl=pdl
            )
        if self._streamed is not None and x.dtype.itemsize == 2:
            if self._rounds and m > MAX_EXACT_ROWS:
                codes, scales = self._rounded(x)
                tiling = rounded_stream_tiling(
                    m, n, k, gated=gated, whole_rows=not self._group, ahead=self._ahead
                )
                return self._streamed(codes, tiling, self._bias, residual, scales, x.dtype)
            tiling = scaled_stream_tiling(m, n, k, self._step, gated=gated)
            return self._streamed(self._normed(x), tiling, self._bias, residual)
        x = self._normed(x)
        tiling = scaled_skinny_tiling(m, n, self._step, x.dtype.itemsize, gated=gated)
        return scaled_skinny(
            x, self._weight, self._arrivals, self._bias, residual, tiling, gated=gated, pdl=pdl
        )

    def _rounded(self, x: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """The codes of norm(x), and the scale of each row, [m, 1], or of each of its groups."""
        scale = self._weight.input_scale if self._weight.activations == "tensor" else None
        return round_rows(
            x, scale, group=self._group, multiple=multiple, norm=self._norm, eps=self._eps, pdl=self._pdl
        )

    def _rounded_product(self, x: Tensor) -> Tensor:
        """norm(x) @ weight.T + bias, of codes on both sides."""
        weight = self._weight
        codes, scales = self._rounded(x)
        return torch._scaled_mm(
            codes,
            weight.as_subclass(Tensor).t(),
            scale_a=scales,
            scale_b=self._row_scales,
            bias=self._bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )

    def _product_in_blocks(self, x: Tensor) -> Tensor:
        """The same by groups of a row and blocks of the weight, whose sums are added up in float32."""
        codes, scales = self._rounded(x, BLOCK_MULTIPLE)
        weight = self._weight
        y = torch._scaled_mm(
            codes,
            weight.as_subclass(Tensor).t(),
            scale_a=scales,
            scale_b=weight.scales.t(),
            out_dtype=x.dtype,
        )[: x.shape[0]]
        return y if self._bias is None else y.add_(self._bias)

    @property
    def _row_scales(self) -> Tensor:
        """The scale of each row of the weight, [1, rows]."""
        scales, height = self._weight.scales, self._weight.block[0]
        if height > 1:
            scales = scales.repeat_interleave(height, 0)[: self._weight.shape[0]]
        return scales.view(1, -1)


def _cuda_version() -> tuple[int, ...]:
    """That of the CUDA that torch was built with; (0,) without."""
    return tuple(int(part) for part in (torch.version.cuda or "0").split("."))
