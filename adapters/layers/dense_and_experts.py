"""An MLP and experts beside each other in one layer (Gemma 4), as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import msgspec

from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.tensors import LayerWeights, Shard, Slot, vector_slot

if TYPE_CHECKING:
    from torch import Tensor

    from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators


class DenseAndExperts(msgspec.Struct, frozen=True, kw_only=True, tag="dense_and_experts"):
    """norm(mlp(x)) + norm(experts(x)): all three norms in front and the two behind have weights of their own.

    The router has a norm in front as well, and the weights of the experts that it chooses are multiplied by
    a number for each expert.
    """

    dense: MLP
    experts: Experts

    def num_products(self, hidden_size: int) -> int:
        """Multiplications with weights that one token takes."""
        return self.dense.num_products(hidden_size) + self.experts.num_products(hidden_size)

    def sharded(self, size: int) -> DenseAndExperts:
        """A part of the width of both. Raises ValueError if one does not divide evenly."""
        return DenseAndExperts(dense=self.dense.sharded(size), experts=self.experts.sharded(size))

    def slots(self, hidden_size: int, names: Mapping[str, str], shard: Shard) -> Iterator[Slot]:
        """Those of both, `dense_post_norm`, `experts_norm`, `experts_post_norm` and `router_scale`, each [h].

        And `expert_scale` [E].
        """
        yield from self.dense.slots(hidden_size, names, shard)
        yield from self.experts.slots(hidden_size, names, shard)
        for name in ("dense_post_norm", "experts_norm", "experts_post_norm", "router_scale"):
            yield vector_slot(name, hidden_size)
        yield vector_slot("expert_scale", self.experts.count)

    def build(
        self, weights: LayerWeights, norm: Norm | None, operators: Operators
    ) -> tuple[Operator, LinearOperator]:
        """Nothing, then both side by side: [n, h] -> [n, 2 h], which `joined` is for. norm: the MLP's."""
        import torch

        inner, down = self.dense.build(weights, norm, operators)
        scale, own = weights.matrix("router_scale")[0].float(), weights.norm("experts_norm")
        loaded = self.experts.loaded(weights)._replace(
            # Tokens are divided by the root of their width on the way to the router.
            router_norm=scale * len(scale) ** -0.5,
            scales=weights.matrix("expert_scale")[0].float(),
        )
        routing, activation = self.experts.routing, self.experts.activation
        first, chosen = operators.experts(own, loaded, routing, activation)

        def both(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return torch.cat((down(inner(x)), chosen(first(x))), 1)

        return operators.norm(None), both

    def joined(self, weights: LayerWeights, norm: Operator, operators: Operators) -> Operator:
        """[n, 2 h] -> [n, h]: the norms of the two, and `norm` over their sum."""
        dense, experts = (operators.norm(weights.norm(f"{part}_post_norm")) for part in ("dense", "experts"))

        def join(y: Tensor) -> Tensor:
            first, second = y.chunk(2, 1)
            return norm(dense(first.contiguous()).add_(experts(second.contiguous())))

        return join


def norm_behind(part: object, norm: Norm, weights: LayerWeights, operators: Operators) -> Operator:
    """The norm behind a part of a layer, which also brings together what `DenseAndExperts` computes."""
    behind = operators.norm(norm)
    return part.joined(weights, behind, operators) if isinstance(part, DenseAndExperts) else behind
