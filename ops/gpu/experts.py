"""Mixtures of experts on a GPU; the reference is `ops.experts.ComposedExperts`."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from microvllm.ops.activation import ACTIVATIONS, gate_and_mul
from microvllm.ops.experts import ExpertWeights
from microvllm.ops.gpu.expert_gemv import expert_gemv
from microvllm.ops.gpu.grouped import GroupedTiling, GroupedWeight, sum_choices
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
# Codes are widened in registers, from where only a left operand is read.
CODED = {
    16: GroupedTiling(16, 64, 128, 4, 4, swapped=True, boxes=True),
    32: GroupedTiling(32, 64, 128, 4, 4, swapped=True, boxes=True),
    64: GroupedTiling(64, 128, 128, 8, 3, swapped=True, boxes=True),
}
FIXED_ORDER = GroupedTiling(64, 64, 64, 4, 4)
MAX_GEMV_TOKENS = 4  # more have experts in common, whose weights are then read once


class GpuExperts:
    """residual + the weighted sum of what a token's experts give to norm(x).

    Sums are taken in float32 and rounded after each product. routers: the products with the router's weight,
    [n, h] -> [n, E], with the norm before them and without. boxes: whether the device has TMA.

    `fixed_order`: a row has the same bits whatever is computed with it: one tiling for any number of rows, so
    that sums over terms have one order; those over a token's experts always have.
    """

    def __init__(
        self,
        norm: Norm | None,
        routers: tuple[Operator, Operator],
        weights: ExpertWeights,
        routing: Routing,
        activation: str,
        dtype: torch.dtype,
        *,
        fixed_order: bool,
        boxes: bool,
        pdl: bool,
    ) -> None:
        self._norm: Tensor | None = None
        self._eps = 0.0
        if norm is not None:
            self._norm, self._eps = norm
        self._normed_router, self._router = routers
        self._routing, self._activation = routing, activation
        self._correction = weights.correction
        (self._count, hidden), width, gated = (
            weights.router.shape,
            weights.down.shape[1],
            activation == "silu",
        )
        self._gate_up = GroupedWeight(
            weights.gate_up, width if gated else 2 * width, dtype, gated=gated, boxes=boxes
        )
        self._down = GroupedWeight(weights.down, hidden, dtype, boxes=boxes)
        # The matrices for few tokens.
        self._matrices: tuple[Tensor, Tensor] | None = None
        if gated and not fixed_order and type(weights.gate_up) is type(weights.down) is Tensor:
            self._matrices = weights.gate_up.contiguous(), weights.down.contiguous()
        self._fixed_order, self._pdl = fixed_order, pdl

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [n, h] -> [n, h]; the residual, which may be x, may be overwritten by the result."""
        n, pdl = x.shape[0], self._pdl
        if n == 0:
            return torch.empty_like(x)
        norm = self._norm if n == 1 and self._matrices is not None else None
        if norm is None and self._norm is not None:
            x = rms_norm(x, self._norm, self._eps, pdl=pdl)
        logits = self._router(x) if norm is None else self._normed_router(x)
        weights, chosen = choose(logits, self._routing, self._correction, pdl=pdl)
        if n <= MAX_GEMV_TOKENS and self._matrices is not None:
            return expert_gemv(x, *self._matrices, weights, chosen, residual, norm, self._eps, pdl=pdl)
        k, tiling = self._routing.num_chosen, self._tiling(chosen.numel(), x.dtype.itemsize)
        choices = sort_choices(chosen, self._count, tiling.rows, pdl=pdl)
        inner = self._gate_up(x, choices, k, tiling, pdl=pdl)
        if self._activation != "silu":
            inner = gate_and_mul(inner, ACTIVATIONS[self._activation])
        parts = self._down(inner, choices, k, tiling, scales=weights, pdl=pdl)
        return sum_choices(parts, k, residual, pdl=pdl)

    def _tiling(self, num_choices: int, itemsize: int) -> GroupedTiling:
        """Room for twice the choices that an expert has on average."""
        if self._fixed_order:
            tiling = FIXED_ORDER
        else:
            rows = triton.next_power_of_2(triton.cdiv(2 * num_choices, self._count))
            tilings = CODED if self._gate_up.is_coded else TILINGS
            tiling = tilings[min(max(rows, 16), max(tilings))]
        if itemsize == 4:
            tiling = GroupedTiling(min(tiling.rows, 64), 64, 32, 4, 2)
        steps = [weight.step for weight in (self._gate_up, self._down) if weight.step is not None]
        return replace(tiling, block_k=min(tiling.block_k, *steps)) if steps else tiling
