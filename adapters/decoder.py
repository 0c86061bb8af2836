"""One dense decoder for every family: what differs between them is data in `ModelSpec`."""

from __future__ import annotations

import torch
from torch import Tensor

from microvllm.adapters.spec import ModelSpec
from microvllm.ops.attention import QKNorms, StepAttention
from microvllm.ops.operators import DecoderLayer, Operators


class DecoderModel:
    """Pre-norm transformer with grouped-query attention and SwiGLU.

    `weights` are those of `load_weights`, all of one dtype; each is taken out of the dictionary as it is
    packed, so that plain and packed copies of the whole model never exist together.
    """

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor], operators: Operators) -> None:
        self.spec = spec
        dtype = operators.activation_dtype
        embed = weights.pop("embed")
        head = weights.pop("lm_head", embed)
        self.embed = operators.embedding(embed)
        # [m, hidden] -> [m, vocab] in the activations' dtype, for a sampler that reads that.
        self.head = operators.norm_linear(weights.pop("norm").to(dtype), spec.rms_norm_eps, head)
        self._layers = operators.layers(
            [_take_layer(spec, i, weights, operators) for i in range(spec.num_layers)]
        )
        self.qk_norms = _take_qk_norms(spec, weights, dtype)

    def forward(self, input_ids: Tensor, attention: StepAttention) -> Tensor:
        """input_ids: [n] int64, the tokens of a step in its attention batch's order -> [n, hidden].

        The attention backend has to have this model's `qk_norms`.
        """
        return self._layers(self.embed(input_ids), attention)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [m, hidden], the rows to predict from -> [m, vocab] float32."""
        logits = self.head(hidden)
        # An operator that does nothing takes 20 us of a step on a CPU.
        return logits if logits.dtype == torch.float32 else logits.float()


def _take_layer(
    spec: ModelSpec, index: int, weights: dict[str, Tensor], operators: Operators
) -> DecoderLayer:
    def take(name: str) -> tuple[Tensor, Tensor | None]:
        """A weight and its bias."""
        weight = weights.pop(f"layers.{index}.{name}")
        return weight, weights.pop(f"layers.{index}.{name}_bias", None)

    def norm(name: str) -> tuple[Tensor, float]:
        weight = weights.pop(f"layers.{index}.{name}")
        return weight.to(operators.activation_dtype), spec.rms_norm_eps

    return DecoderLayer(
        operators.norm_linear(*norm("input_norm"), *take("qkv")),
        operators.linear(*take("o")),
        operators.norm_gate_up(*norm("post_norm"), *take("gate_up")),
        operators.linear(*take("down")),
    )


def _take_qk_norms(spec: ModelSpec, weights: dict[str, Tensor], dtype: torch.dtype) -> QKNorms | None:
    if not spec.qk_norm:
        return None

    def take(layer: int, name: str) -> Tensor:
        return weights.pop(f"layers.{layer}.{name}").to(dtype)

    pairs = ((take(i, "q_norm"), take(i, "k_norm")) for i in range(spec.num_layers))
    return QKNorms(tuple(pairs), spec.rms_norm_eps)
