"""Mixtures of experts on a GPU; the reference is `ops.experts.ComposedExperts`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from microvllm.ops.activation import ACTIVATIONS, gate_and_mul
from microvllm.ops.experts import ExpertWeights
from microvllm.ops.gpu.expert_gemv import expert_gemv
from microvllm.ops.gpu.grouped import GroupedTiling, grouped_product, sum_choices
from microvllm.ops.gpu.norm import rms_norm
from microvllm.ops.gpu.routing import choose, sort_choices
from microvllm.ops.operators import Norm, Operator
from microvllm.ops.routing import Routing

# By the number of rows of a tile; of float32 with half the terms at a time.
TILINGS = {
    16: GroupedTiling(16, 64, 128, 4, 4),
    32: GroupedTiling(32, 64, 128, 4, 4),
    64: GroupedTiling(64, 128, 64, 4, 3),
    128: GroupedTiling(128, 128, 64, 8, 3),
}
FIXED_ORDER = GroupedTiling(64, 64, 64, 4, 4)


MAX_GEMV_TOKENS = 4  # more have experts in common, whose weights are then read once


class GpuExperts:
    """residual + the weighted sum of what a token's experts give to norm(x).

    Sums are taken in float32 and rounded after each product. router: the norm and the product, [n, h] ->
    [n, E].

    `fixed_order`: a row has the same bits whatever is computed with it: one tiling for any number of rows, so
    that sums over terms have one order; those over a token's experts always have.
    """

    def __init__(
        self,
        norm: Norm | None,
        router: Operator,
        weights: ExpertWeights,
        routing: Routing,
        activation: str,
        *,
        fixed_order: bool,
        pdl: bool,
    ) -> None:
        self._norm: Tensor | None = None
        self._eps = 0.0
        if norm is not None:
            self._norm, self._eps = norm
        self._router, self._routing, self._activation = router, routing, activation
        self._gate_up, self._down = weights.gate_up.contiguous(), weights.down.contiguous()
        self._correction = weights.correction
        self._count = len(weights.router)
        self._fixed_order, self._pdl = fixed_order, pdl

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [n, h] -> [n, h]; the residual, which may be x, may be overwritten by the result."""
        n, hidden = x.shape
        if n == 0:
            return torch.empty_like(x)
        k, pdl = self._routing.num_chosen, self._pdl
        weights, chosen = choose(self._router(x), self._routing, self._correction, pdl=pdl)
        if n <= MAX_GEMV_TOKENS and self._activation == "silu" and not self._fixed_order:
            matrices = self._gate_up, self._down
            return expert_gemv(x, *matrices, weights, chosen, residual, self._norm, self._eps, pdl=pdl)
        if self._norm is not None:
            x = rms_norm(x, self._norm, self._eps, pdl=pdl)
        tiling = self._tiling(n * k, x.dtype.itemsize)
        choices = sort_choices(chosen, self._count, tiling.rows, pdl=pdl)
        width = self._down.shape[1]
        if self._activation == "silu":
            inner = grouped_product(x, self._gate_up, choices, k, tiling, columns=width, gated=True, pdl=pdl)
        else:
            both = grouped_product(x, self._gate_up, choices, k, tiling, columns=2 * width, pdl=pdl)
            inner = gate_and_mul(both, ACTIVATIONS[self._activation])
        parts = grouped_product(
            inner, self._down, choices, k, tiling, columns=hidden, scales=weights, pdl=pdl
        )
        return sum_choices(parts, k, residual, pdl=pdl)

    def _tiling(self, num_choices: int, itemsize: int) -> GroupedTiling:
        """Room for twice the choices that an expert has on average."""
        if self._fixed_order:
            tiling = FIXED_ORDER
        else:
            rows = triton.next_power_of_2(triton.cdiv(2 * num_choices, self._count))
            tiling = TILINGS[min(max(rows, 16), 128)]
        if itemsize == 2:
            return tiling
        return GroupedTiling(min(tiling.rows, 64), 64, 32, 4, 2)
