"""The operators of a decoder on an NVIDIA GPU, fused, behind the interface of `ops.operators`.

All of them launch on the current stream, wait for nothing, and choose their grids by shapes alone, so that a
step of them can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from microvllm.ops.attention import AttentionBackend, AttentionConfig
from microvllm.ops.attention.latent import LatentConfig
from microvllm.ops.experts import ExpertWeights, with_shared
from microvllm.ops.gpu.activation import gelu_and_mul
from microvllm.ops.gpu.cublas import cublas_linear
from microvllm.ops.gpu.embedding import gather_rows
from microvllm.ops.gpu.experts import GpuExperts
from microvllm.ops.gpu.fixed_order import FixedOrderProduct
from microvllm.ops.gpu.launch import can_launch_early, shared_memory
from microvllm.ops.gpu.levers import Levers
from microvllm.ops.gpu.norm import norm_heads, norm_two_parts, rms_norm
from microvllm.ops.gpu.packed import KINDS, packed_kinds
from microvllm.ops.gpu.product import Product
from microvllm.ops.gpu.recurrences import RECURRENCES
from microvllm.ops.gpu.skinny import MAX_SPLIT_TILES, skinny_linear
from microvllm.ops.gpu.tiling import MAX_SKINNY_ROWS
from microvllm.ops.gpu.tunings import guessed_tilings, stream_tilings
from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators
from microvllm.ops.routing import Routing
from microvllm.ops.row_states import Recurrence

if TYPE_CHECKING:
    from microvllm.ops.gpu.stream import StreamedWeight


class GpuOperators(Operators):
    """See `ops.operators.Operators`. Activations are of the model's dtype: float32, bfloat16 or float16.

    attention: "triton" or "flash_attn". Sums are taken in float32, and each fused operator rounds once.
    batch_invariant: a row has the same bits whatever is computed with it; by "triton" alone.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, attention: str, batch_invariant: bool = False
    ) -> None:
        self.activation_dtype = dtype
        self.pdl = can_launch_early(device)
        self.levers = Levers.of(device)
        # The products of packed matrices have no fixed order yet.
        self.packed = packed_kinds(device) if self.levers.packed and not batch_invariant else ()
        self._attention = attention
        self._batch_invariant = batch_invariant
        self._arrivals = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)

    def embedding(self, weight: Tensor) -> Operator:
        return partial(gather_rows, weight, pdl=self.pdl)

    def embedding_part(self, weight: Tensor, first: int, stop: int) -> Operator:
        return partial(gather_rows, weight, first=first, pdl=self.pdl)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOperator:
        return self._product(weight, bias)

    def norm_linear(
        self, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> Operator:
        return self._product(weight, bias, norm=norm_weight, eps=eps)

    def norm_gate_up(
        self, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> Operator:
        return self._product(weight, bias, norm=norm_weight, eps=eps, gated=True)

    def _product(
        self, weight: Tensor, bias: Tensor | None, *, gated: bool = False, **norm: Any
    ) -> LinearOperator:
        if kind := KINDS.get(type(weight)):
            return kind.product(weight, bias, self._arrivals, self.levers, gated=gated, pdl=self.pdl, **norm)
        weight = weight.contiguous()
        if self._batch_invariant:
            return FixedOrderProduct(weight, bias, self._arrivals, gated=gated, pdl=self.pdl, **norm)
        streamed = None
        if self.levers.stream and weight.dtype.itemsize == 2 and weight.shape[1] % 8 == 0:
            rows, k = weight.shape
            n = rows // 2 if gated else rows
            tilings = stream_tilings(weight.device, n, k, gated=gated)
            if not tilings and self.levers.more_streams:
                tilings = guessed_tilings(n, k, gated=gated)
            if tilings:
                from microvllm.ops.gpu.stream import StreamedWeight

                streamed = StreamedWeight(weight, self._arrivals, tilings, gated=gated, pdl=self.pdl)
        return GpuProduct(weight, bias, self._arrivals, streamed, gated=gated, pdl=self.pdl, **norm)

    def experts(
        self, norm: Norm | None, weights: ExpertWeights, routing: Routing, activation: str
    ) -> tuple[Operator, LinearOperator]:
        # The shared expert has the norm in common with the others, which else is a part of their kernels.
        outside, inside = (None, norm) if weights.shared is None else (norm, None)
        chosen = GpuExperts(
            inside,
            self.linear(weights.router, weights.biases.router),
            weights,
            routing,
            activation,
            self._arrivals,
            fixed_order=self._batch_invariant,
            boxes=self.levers.boxes,
            few_mxfp4=self.levers.few_mxfp4,
            shared_memory=shared_memory(self._arrivals.device),
            pdl=self.pdl,
        )
        return self.norm(outside), with_shared(self, chosen, weights, activation)

    def mlp_input(
        self, norm: Norm | None, weight: Tensor, bias: Tensor | None, activation: str, gated: bool
    ) -> Operator:
        if norm is None and gated and activation == "silu":
            return self._product(weight, bias, gated=True)
        if gated and activation == "gelu_tanh":
            product = self.product(weight, bias, norm=norm)
            return lambda x: gelu_and_mul(product(x), pdl=self.pdl)
        return super().mlp_input(norm, weight, bias, activation, gated)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps, pdl=self.pdl)

    def norm_parts(self, x: Tensor, norms: Sequence[Norm]) -> Tensor:
        (first, eps), (second, other) = norms
        if eps != other:
            return super().norm_parts(x, norms)
        return norm_two_parts(x, first, second, eps, pdl=self.pdl)

    def norm_heads(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm_heads(x, weight, eps, pdl=self.pdl)

    def recurrence(self, config: Recurrence) -> AttentionBackend:
        return RECURRENCES[type(config)](config, self.activation_dtype, pdl=self.pdl)

    def attention(self, config: AttentionConfig) -> AttentionBackend:
        if config.shape.softcap is not None:
            raise ValueError(f"--attention-backend {self._attention} does not cap attention scores")
        if config.sinks and self._attention == "flash_attn":
            raise ValueError("--attention-backend flash_attn does not compute attention sinks: triton does")
        if config.dtype == torch.float8_e4m3fn and config.inv_freq.device.type == "cuda":
            capability = torch.cuda.get_device_capability(config.inv_freq.device)
            if capability < (8, 9):
                version = ".".join(map(str, capability))
                raise ValueError(f"--kv-cache-dtype fp8: a GPU of compute capability {version} has no e4m3")
        if self._attention == "flash_attn":
            from microvllm.ops.attention.flash_backend import FlashAttention

            return FlashAttention(config)
        from microvllm.ops.attention.triton_backend import TritonAttention

        fixed = self._batch_invariant
        return TritonAttention(config, pdl=self.pdl, levers=self.levers, fixed_order=fixed)

    def latent_attention(self, config: LatentConfig) -> AttentionBackend:
        if self._attention != "triton":
            raise ValueError(
                f"--attention-backend {self._attention} does not attend to latent keys and values"
            )
        if self._batch_invariant:
            raise ValueError("--batch-invariant: there is no such kernel for latent keys and values")
        from microvllm.ops.attention.triton_latent import TritonLatentAttention

        return TritonLatentAttention(config, pdl=self.pdl)


class GpuProduct(Product):
    """A `Product` by own kernels for few rows, by cuBLAS between two for many.

    `streamed` is the same weight with tilings for the numbers of rows that it is fastest for.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        arrivals: Tensor,
        streamed: StreamedWeight | None,
        **options: Any,
    ) -> None:
        """options: those of `Product`."""
        super().__init__(weight, bias, arrivals, **options)
        self._streamed = streamed

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [m, in] -> [m, out]; the residual may be overwritten by the result."""
        if self._streamed is not None and (tiling := self._streamed.tiling(x.shape[0])):
            return self._streamed(self._normed(x), tiling, self._bias, residual)
        if 0 < x.shape[0] <= MAX_SKINNY_ROWS:
            return skinny_linear(
                x,
                self._weight,
                self._arrivals,
                self._bias,
                norm=self._norm,
                eps=self._eps,
                residual=residual,
                gated=self._gated,
                pdl=self._pdl,
            )
        return self._activated(cublas_linear(self._normed(x), self._weight, self._bias, residual))
