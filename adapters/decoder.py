"""Builds the decoder of every family from the data of its `ModelSpec`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from microvllm.adapters.head import make_head
from microvllm.adapters.layers.dense_and_experts import norm_behind
from microvllm.adapters.layers.nothing import Nothing
from microvllm.adapters.spec import LayerSpec, Mixer, MLPKind, ModelSpec
from microvllm.adapters.taken_weights import TakenWeights
from microvllm.ops.attention import AttentionBackend, BackendConfig, StepAttention
from microvllm.ops.attention.mixed import MixedAttention
from microvllm.ops.attention.pages import CachePages, LayerPages
from microvllm.ops.attention.shared import sharing
from microvllm.ops.embedding import token_rows
from microvllm.ops.operators import DecoderLayer, LinearOperator, NormedLinear, Operator, Operators
from microvllm.ops.sharding import Ranks, SummedLinear


class DecoderModel:
    """A transformer of residual branches: attention, then an MLP, in every layer.

    `weights` are those of `load_weights`, all of one dtype; each is taken out of the dictionary as it is
    packed, so that plain and packed copies of the whole model never exist together. A shard's `spec` is
    `ModelSpec.sharded`, and `ranks` connects it with the others, which make the same calls in the same order.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, Tensor],
        operators: Operators,
        ranks: Ranks | None = None,
    ) -> None:
        self.spec = spec
        self._operators = operators
        embed = weights.pop("embed")
        head = weights.pop("lm_head", embed)
        norm = TakenWeights(spec, weights, operators, "").norm("norm")
        rows = partial(token_rows, operators, spec.vocab_size, ranks)
        self.embed = rows(embed, spec.embedding_scale)
        # [m, hidden] -> [m, vocab] in the activations' dtype, for a sampler that reads that.
        self.head = make_head(spec, head, norm, operators, ranks)
        layers = [
            TakenWeights(spec, weights, operators, f"layers.{i}.", ranks) for i in range(spec.num_layers)
        ]
        built = [_build_layer(*each, operators, ranks) for each in zip(spec.layers, layers, strict=True)]
        if spec.tails is not None:
            own = TakenWeights(spec, weights, operators, "")
            self.embed, built = spec.tails.build(self.embed, built, own, layers, operators, rows)
        self._layers = operators.layers(built)
        self._kept: list[Any] = [  # of the type that the layer's mixer takes
            layer.mixer.kept(each) for layer, each in zip(spec.layers, layers, strict=True)
        ]

    def forward(self, input_ids: Tensor, attention: StepAttention, needed: Tensor | None = None) -> Tensor:
        """input_ids: [n] int64, the tokens of a step in its attention batch's order -> [n, hidden].

        The attention backend has to be one of this model's `attention`. needed: [m] int64, rising, the tokens
        whose hidden states are returned; those of all if there are none.
        """
        return self._layers(self.embed(input_ids), attention, needed)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [m, hidden], the rows to predict from -> [m, vocab] float32.

        With `spec.pooling` there is only the last norm: -> [m, hidden] float32.
        """
        logits = self.head(hidden)
        # An operator that does nothing takes 20 us of a step on a CPU.
        return logits if logits.dtype == torch.float32 else logits.float()

    def attention(
        self,
        num_blocks: int,
        block_size: int,
        max_position: int,
        dtype: torch.dtype,
        device: torch.device,
        rows: int = 0,
    ) -> AttentionBackend:
        """The attention of all layers, with a KV cache of `dtype`: one backend for each kind of layer.

        num_blocks: pages, see `CachePlan`. Layers with a state keep those of so many rows.
        """
        plan = self.spec.cache_plan
        pages = CachePages(num_blocks, block_size, plan.page_size, plan.is_uniform, dtype, device)

        def backend(mixer: Mixer, indices: list[int]) -> AttentionBackend:
            slot, places = plan.slots[plan.groups[indices[0]]], [plan.places[index] for index in indices]
            config = BackendConfig(
                LayerPages(pages, slot, places), max_position, rows, self.spec.rms_norm_eps
            )
            return mixer.backend([self._kept[index] for index in indices], config, self._operators)

        kinds: dict[Mixer, list[int]] = {}
        for index, layer in enumerate(self.spec.layers):
            if layer.mixer.source is None:
                kinds.setdefault(layer.mixer, []).append(index)
        backends = [(backend(kind, own), own) for kind, own in kinds.items()]
        is_one_kind = len(backends) == len(plan.windows) == 1
        made = backends[0][0] if is_one_kind else MixedAttention(backends, plan.groups)
        return sharing(made, [layer.mixer.source for layer in self.spec.layers])


def _build_layer(
    layer: LayerSpec, weights: TakenWeights, operators: Operators, ranks: Ranks | None
) -> DecoderLayer:
    def branch(kind: str, part: Mixer | MLPKind) -> tuple[Operator, LinearOperator]:
        first, last = part.build(weights, weights.norm(f"{kind}_norm"), operators)
        if ranks is not None and not isinstance(part, Nothing):
            last = SummedLinear(last, ranks)
        post_norm = weights.norm(f"{kind}_post_norm")
        if post_norm is None:
            return first, last
        return first, NormedLinear(last, norm_behind(part, post_norm, weights, operators))

    return DecoderLayer(*branch("mixer", layer.mixer), *branch("mlp", layer.mlp))
