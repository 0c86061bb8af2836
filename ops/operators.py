"""The operators that a decoder is made of; `ops.backends` makes those of a device.

They are as coarse as a device may want to fuse them; `Operators` composes them for one that fuses nothing.
`torch` runs everywhere and is the reference; `cpu` is C compiled for this machine; on a GPU they are Triton
kernels and cuBLAS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from microvllm.ops.activation import activated, silu_and_mul
from microvllm.ops.attention import AttentionBackend, AttentionConfig, StepAttention
from microvllm.ops.attention.latent import LatentConfig, TorchLatentAttention
from microvllm.ops.attention.torch_backend import TorchAttention
from microvllm.ops.experts import ExpertWeights, composed
from microvllm.ops.linear import Linear
from microvllm.ops.norm import norm_heads, norm_parts, rms_norm
from microvllm.ops.routing import Routing
from microvllm.ops.row_states import Recurrence

Operator = Callable[[Tensor], Tensor]
Norm = tuple[Tensor, float]  # the weight of an RMSNorm, and its epsilon


class LinearOperator(Protocol):
    """A product with a weight matrix, to which a bias and a residual may be added."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [n, in] -> x @ weight.T + bias + residual: [n, out], in x's dtype; may be where residual was."""
        ...


class DecoderLayer(NamedTuple):
    """The operators of one layer: two in front of and behind its attention, two for its MLP."""

    qkv: Operator
    o: LinearOperator
    gate_up: Operator
    down: LinearOperator


class DecoderLayers:
    """The layers of a decoder, one operator after another."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self._layers = layers

    def __call__(self, hidden: Tensor, attention: StepAttention, needed: Tensor | None = None) -> Tensor:
        """hidden: [n, d] -> [n, d], perhaps where hidden was, or those of the rows that are `needed`.

        needed: [m] int64, rising.
        """
        for index, layer in enumerate(self._layers):
            hidden = layer.o(attention(index, layer.qkv(hidden)), hidden)
            hidden = layer.down(layer.gate_up(hidden), hidden)
        return hidden if needed is None else hidden[needed]


class NormedLinear:
    """residual + norm(product(x)): what a plain linear operator does not compute before it adds."""

    def __init__(self, product: LinearOperator, norm: Operator) -> None:
        self._product, self._norm = product, norm

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self._norm(self._product(x))
        return y if residual is None else residual.add_(y)


class Operators(ABC):
    """Makes operators on activations of `activation_dtype`; norm weights are of it, or float32.

    Other weights and the KV cache are of the model's dtype. A weight is [out, in], its bias [out]; an
    operator may keep a packed copy of it in its place, or is given one of the subclasses of `Tensor` that are
    `packed`. What a device does not fuse is composed here.
    """

    activation_dtype: torch.dtype
    packed: tuple[type[Tensor], ...] = ()

    @abstractmethod
    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOperator:
        """The matrix product, with or without a residual."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `ops.norm.rms_norm`."""

    def norm(self, norm: Norm | None) -> Operator:
        """`rms_norm` by this weight; without one x as it is."""
        return (lambda x: x) if norm is None else partial(self.rms_norm, weight=norm[0], eps=norm[1])

    def norm_parts(self, x: Tensor, norms: Sequence[Norm]) -> Tensor:
        """See `ops.norm.norm_parts`."""
        return norm_parts(x, norms, self.rms_norm)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See `ops.activation.silu_and_mul`."""
        return silu_and_mul(gate_up)

    def norm_heads(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `ops.norm.norm_heads`."""
        return norm_heads(x, weight, eps)

    @abstractmethod
    def attention(self, config: AttentionConfig) -> AttentionBackend:
        """An attention backend with a KV cache of its own."""

    def recurrence(self, config: Recurrence) -> AttentionBackend:
        """What layers with a state compute between their products, with the states of all rows."""
        return config.reference(self.activation_dtype)

    def latent_attention(self, config: LatentConfig) -> AttentionBackend:
        """Attention over latent keys and values. Raises ValueError for what it does not compute."""
        return TorchLatentAttention(config, self.activation_dtype)

    def embedding(self, weight: Tensor) -> Operator:
        """[vocab, d] -> the operator: [n] int64 token ids -> their rows of the weight, [n, d]."""
        return lambda token_ids: embedding(token_ids, weight).to(self.activation_dtype)

    def embedding_part(self, weight: Tensor, first: int, stop: int) -> Operator:
        """`embedding` of a weight that has the rows of the tokens [first, stop): zeros for all others."""
        lookup = self.embedding(weight)

        def rows(token_ids: Tensor) -> Tensor:
            outside = (token_ids < first) | (token_ids >= stop)
            found = lookup((token_ids - first).masked_fill(outside, 0))
            return found.masked_fill_(outside[:, None], 0.0)

        return rows

    def norm_linear(
        self, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> Operator:
        """`ops.norm.rms_norm`, then the product: [n, in] -> [n, out]."""
        product = self.linear(weight, bias)
        return lambda x: product(self.rms_norm(x, norm_weight, eps))

    def norm_gate_up(
        self, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> Operator:
        """`norm_linear` whose weight is [2 * i, in], gate before up, then SwiGLU: [n, in] -> [n, i]."""
        product = self.norm_linear(norm_weight, eps, weight, bias)
        return lambda x: self.silu_and_mul(product(x))

    def product(self, weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None) -> Operator:
        """`norm_linear`, or the product alone without a norm."""
        return self.linear(weight, bias) if norm is None else self.norm_linear(*norm, weight, bias)

    def mlp_input(
        self, norm: Norm | None, weight: Tensor, bias: Tensor | None, activation: str, gated: bool
    ) -> Operator:
        """`product`, then one of `ops.activation.ACTIVATIONS`; the fused operator for what has one."""
        if norm is not None and gated and activation == "silu":
            return self.norm_gate_up(*norm, weight, bias)
        return activated(self.product(weight, bias, norm=norm), activation, gated=gated)

    def experts(
        self, norm: Norm | None, weights: ExpertWeights, routing: Routing, activation: str
    ) -> tuple[Operator, LinearOperator]:
        """The norm and the weighted sum of a token's experts, [n, h] -> [n, h], in two parts.

        The second adds it to a residual, which may be what the first was given; the norm may be in either.
        """
        return composed(self, norm, weights, routing, activation)

    def layers(self, layers: Sequence[DecoderLayer]) -> DecoderLayers:
        """The layers whose operators were made here, to be run in this order."""
        return DecoderLayers(layers)


class TorchOperators(Operators):
    """Plain torch, in the model's dtype throughout."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.activation_dtype = dtype

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOperator:
        return Linear(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def attention(self, config: AttentionConfig) -> AttentionBackend:
        return TorchAttention(config, self.activation_dtype)
