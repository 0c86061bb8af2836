"""One dense decoder for every family: what differs between them is data in `ModelSpec`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding

from microvllm.adapters.spec import ModelSpec, RopeSpec
from microvllm.ops.attention import StepAttention
from microvllm.ops.operators import LinearOperator, Operators


class DecoderModel:
    """Pre-norm transformer with grouped-query attention and SwiGLU.

    `weights` are those of `load_weights`, all of one dtype; each is taken out of the dictionary as it is
    packed, so that plain and packed copies of the whole model never exist together.
    """

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor], operators: Operators) -> None:
        self.spec = spec
        self._ops = operators
        self._embed = weights.pop("embed")
        self._head = operators.linear(self._embed if spec.tie_embeddings else weights.pop("lm_head"), None)
        self._norm = weights.pop("norm").to(operators.activation_dtype)
        self._layers = [_Layer(spec, i, weights, operators) for i in range(spec.num_layers)]

    def forward(self, input_ids: Tensor, attention: StepAttention) -> Tensor:
        """input_ids: [n] int64, the tokens of a step in its attention batch's order -> [n, hidden]."""
        hidden = embedding(input_ids, self._embed).to(self._ops.activation_dtype)
        for layer in self._layers:
            hidden = layer.forward(hidden, attention)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [m, hidden], the rows to predict from -> [m, vocab] float32."""
        return self._head(self._ops.rms_norm(hidden, self._norm, self.spec.rms_norm_eps)).float()


class _Layer:
    def __init__(self, spec: ModelSpec, index: int, weights: dict[str, Tensor], operators: Operators) -> None:
        def linear(name: str) -> LinearOperator:
            weight = weights.pop(f"layers.{index}.{name}")
            return operators.linear(weight, weights.pop(f"layers.{index}.{name}_bias", None))

        def norm(name: str) -> Tensor:
            return weights.pop(f"layers.{index}.{name}").to(operators.activation_dtype)

        self._spec = spec
        self._ops = operators
        self._index = index
        self._qkv, self._o = linear("qkv"), linear("o")
        self._gate_up, self._down = linear("gate_up"), linear("down")
        self._input_norm, self._post_norm = norm("input_norm"), norm("post_norm")
        self._qk_norms = (norm("q_norm"), norm("k_norm")) if spec.qk_norm else None

    def forward(self, hidden: Tensor, attention: StepAttention) -> Tensor:
        spec, ops = self._spec, self._ops
        eps, heads, kv_heads = spec.rms_norm_eps, spec.num_heads, spec.num_kv_heads
        qkv = self._qkv(ops.rms_norm(hidden, self._input_norm, eps))
        qkv = qkv.view(-1, heads + 2 * kv_heads, spec.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self._qk_norms is not None:
            q_norm, k_norm = self._qk_norms
            qk = torch.cat(
                (ops.rms_norm(qk[:, :heads], q_norm, eps), ops.rms_norm(qk[:, heads:], k_norm, eps)), 1
            )
        hidden = self._o(attention(self._index, qk, v), hidden)
        gate_up = self._gate_up(ops.rms_norm(hidden, self._post_norm, eps))
        return self._down(ops.silu_and_mul(gate_up), hidden)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Angle a position for each pair of a head: [head_dim / 2] float32.

    "linear" is position interpolation (Chen et al., 2023, arXiv:2306.15595); "llama3" is the scheme of
    Llama 3.1's reference code: wavelengths shorter than original / high_freq_factor are kept, those
    longer than original / low_freq_factor are divided by `factor`, those between are blended.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / rope.theta**exponents
    if rope.scaling == "linear":
        return inv_freq / rope.factor
    if rope.scaling != "llama3":
        return inv_freq
    wavelength = 2 * math.pi / inv_freq
    ramp = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    keep = ramp.clamp(0.0, 1.0)
    return keep * inv_freq + (1 - keep) * inv_freq / rope.factor
