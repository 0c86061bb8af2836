"""Mixtures of experts on a GPU; the reference is `ops.experts.ComposedExperts`."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from microvllm.ops.activation import ACTIVATIONS, CLAMPED, gated_unit
from microvllm.ops.coded import CodedTensor
from microvllm.ops.experts import ExpertWeights
from microvllm.ops.gpu.activation import gelu_and_mul
from microvllm.ops.gpu.coded_expert_gemv import coded_expert_gemv
from microvllm.ops.gpu.coded_grouped import CodedGroupedWeight
from microvllm.ops.gpu.expert_gemv import expert_gemv
from microvllm.ops.gpu.grouped import GroupedTiling, GroupedWeight, sum_choices
from microvllm.ops.gpu.mxfp4 import Mxfp4Weight
from microvllm.ops.gpu.mxfp4_experts import mxfp4_experts
from microvllm.ops.gpu.norm import rms_norm
from microvllm.ops.gpu.routing import choose, route_few, sort_choices
from microvllm.ops.gpu.tiling import MAX_MXFP4_CHOICES, MAX_MXFP4_TOKENS
from microvllm.ops.mxfp4 import Mxfp4Tensor
from microvllm.ops.operators import Norm, Operator
from microvllm.ops.routing import Routing
from microvllm.ops.scaled import ScaledTensor

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
# Rows of a tile in MXFP4, by the most choices that an expert has on average: measured at 4.4, 8 and 32.
MXFP4_ROWS = {5: 8, 8: 16, 32: 32}
MOST_MXFP4_ROWS = 64
FIXED_ORDER = GroupedTiling(64, 64, 64, 4, 4)
MAX_GEMV_TOKENS = 4  # more have experts in common, whose weights are then read once


def mxfp4_tiling(choices: float, *, gated: bool) -> GroupedTiling:
    """Of experts that have so many choices on average; gated: of the first of the two products.

    A tile has 64 rows of the weight, as more would be widened by the same threads. The terms are those of a
    plain matrix beside it, where a shard cuts the blocks of one of the two. Of gated products with two stages
    a multiprocessor holds more programs.
    """
    rows = next((rows for most, rows in MXFP4_ROWS.items() if choices <= most), MOST_MXFP4_ROWS)
    return GroupedTiling(rows, 64, 64, 4, 2 if gated and rows > 8 else 3, swapped=True)


class GpuExperts:
    """residual + the weighted sum of what a token's experts give to norm(x).

    Sums are taken in float32 and rounded after each product. router: the product with its weight, [n, h] ->
    [n, E]; arrivals: see `routing.route_few`; boxes: whether the device has TMA; shared_memory: of a
    multiprocessor, in bytes.

    `fixed_order`: a row has the same bits whatever is computed with it: one tiling for any number of rows, so
    that sums over terms have one order; those over a token's experts always have. few_mxfp4: whether a few
    tokens' experts in MXFP4 are multiplied without sorting.
    """

    def __init__(
        self,
        norm: Norm | None,
        router: Operator,
        weights: ExpertWeights,
        routing: Routing,
        activation: str,
        arrivals: Tensor,
        *,
        fixed_order: bool,
        boxes: bool,
        few_mxfp4: bool,
        shared_memory: int,
        pdl: bool,
    ) -> None:
        self._norm: Tensor | None = None
        self._eps = 0.0
        if norm is not None:
            self._norm, self._eps = norm
        self._router, self._routing, self._activation = router, routing, activation
        self._router_weight, self._arrivals = weights.router.contiguous(), arrivals
        self._correction, self._scales = weights.correction, weights.scales
        self._router_norm = weights.router_norm
        (self._count, hidden), dtype = weights.router.shape, weights.router.dtype
        self._biases, self._clamped = weights.biases, activation == CLAMPED
        gated = self._fuses = weights.gated and activation in ("silu", CLAMPED)
        self._plain = None if weights.gated else ACTIVATIONS[activation]
        columns, biases = weights.gate_up.shape[0] // self._count // (2 if gated else 1), weights.biases

        def grouped(
            weight: Tensor, columns: int, bias: Tensor | None, **gate: bool
        ) -> GroupedWeight | CodedGroupedWeight | Mxfp4Weight:
            if isinstance(weight, Mxfp4Tensor):
                return Mxfp4Weight(weight, columns, bias, **gate)
            if isinstance(weight, CodedTensor):
                return CodedGroupedWeight(weight, columns, bias, **gate)
            return GroupedWeight(weight, columns, dtype, bias, boxes=boxes, **gate)

        self._gate_up = grouped(weights.gate_up, columns, biases.gate_up, gated=gated, clamped=self._clamped)
        self._down = grouped(weights.down, hidden, biases.down)
        kinds = {type(each.matrix) for each in (self._gate_up, self._down)}
        self._is_coded = not kinds.isdisjoint((ScaledTensor, CodedTensor))
        self._is_mxfp4 = Mxfp4Tensor in kinds
        # The largest number of tokens that are multiplied without sorting.
        fits = gated and routing.num_groups == 1 and len(kinds) == 1 and weights.router_norm is None
        most = MAX_GEMV_TOKENS
        if self._is_mxfp4:
            most = MAX_MXFP4_TOKENS if few_mxfp4 and routing.num_chosen <= MAX_MXFP4_CHOICES else 0
        self._few = most if fits and not fixed_order and CodedTensor not in kinds else 0
        self._fixed_order, self._shared_memory, self._pdl = fixed_order, shared_memory, pdl

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [n, h] -> [n, h]; the residual, which may be x, may be overwritten by the result."""
        n, pdl = x.shape[0], self._pdl
        if n == 0:
            return torch.empty_like(x)
        if n <= self._few:
            return self._compute_few(x, residual)
        routed = None if self._router_norm is None else self._normed(x, self._router_norm)
        x = self._normed(x, self._norm)
        logits = self._router(x if routed is None else routed)
        weights, chosen = choose(logits, self._routing, self._correction, scales=self._scales, pdl=pdl)
        k, sizes = self._routing.num_chosen, (chosen.numel(), x.dtype.itemsize)
        tiling = self.tiling(*sizes)
        choices = sort_choices(chosen, self._count, tiling.rows, pdl=pdl)
        inner = self._gate_up(x, choices, k, self.tiling(*sizes, gated=True), pdl=pdl)
        if self._plain is not None:
            inner = self._plain(inner)
        elif not self._fuses:
            gelu = self._activation == "gelu_tanh"
            inner = gelu_and_mul(inner, pdl=pdl) if gelu else gated_unit(inner, self._activation)
        parts = self._down(inner, choices, k, tiling, scales=weights, pdl=pdl)
        return sum_choices(parts, k, residual, pdl=pdl)

    def _compute_few(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Without sorting; one token's norm is a part of each kernel that reads it."""
        norm, eps, pdl = self._norm, self._eps, self._pdl
        if x.shape[0] > 1 or self._is_coded or self._is_mxfp4:
            x, norm = self._normed(x, norm), None
        weights, chosen = route_few(
            x,
            self._router_weight,
            self._routing,
            self._correction,
            norm,
            eps,
            self._arrivals,
            self._biases.router,
            scales=self._scales,
            pdl=pdl,
        )
        gate_up, down = self._gate_up.matrix, self._down.matrix
        if isinstance(gate_up, ScaledTensor) and isinstance(down, ScaledTensor):
            return coded_expert_gemv(
                x, gate_up, down, weights, chosen, residual, self._biases, clamped=self._clamped, pdl=pdl
            )
        if isinstance(gate_up, Mxfp4Tensor) and isinstance(down, Mxfp4Tensor):
            return mxfp4_experts(
                x, gate_up, down, weights, chosen, residual, self._biases, clamped=self._clamped, pdl=pdl
            )
        return expert_gemv(
            *(x, gate_up, down, weights, chosen, residual, norm, eps, self._biases),
            clamped=self._clamped,
            pdl=pdl,
        )

    def _normed(self, x: Tensor, norm: Tensor | None) -> Tensor:
        return x if norm is None else rms_norm(x, norm, self._eps, pdl=self._pdl)

    def tiling(self, num_choices: int, itemsize: int, *, gated: bool = False) -> GroupedTiling:
        """With room for twice the choices that an expert has on average, or by `mxfp4_tiling`.

        itemsize: bytes of a number of x. gated: of the first product, whose rows are those of the second.
        """
        if self._fixed_order:
            tiling = FIXED_ORDER
        elif self._is_mxfp4:
            tiling = mxfp4_tiling(num_choices / self._count, gated=gated)
        else:
            rows = triton.next_power_of_2(triton.cdiv(2 * num_choices, self._count))
            tilings = CODED if self._is_coded else TILINGS
            most = min(max(tilings), self._gate_up.max_rows)
            tiling = tilings[min(max(rows, min(tilings)), most)]
        if itemsize == 4:
            tiling = GroupedTiling(min(tiling.rows, 64), 64, 32, 4, 2)
        steps = [weight.step for weight in (self._gate_up, self._down) if weight.step is not None]
        tiling = replace(tiling, block_k=min([tiling.block_k, *steps]))
        if self._is_mxfp4:  # whose steps have as many terms as eight places of the words
            stages = replace(tiling, block_k=256).within(self._shared_memory, itemsize, 1).stages
            return replace(tiling, stages=stages)
        return tiling.within(self._shared_memory, itemsize, 1 if self._is_coded else itemsize)
