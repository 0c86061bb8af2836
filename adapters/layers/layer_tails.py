"""What Gemma 4's layers do behind their MLP, as data: an input of the token to each layer, and a scale.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from microvllm.adapters.tensors import WHOLE, LayerWeights, Shard, Slot, matrix_slots, vector_slot

if TYPE_CHECKING:
    from torch import Tensor

    from microvllm.ops.operators import DecoderLayer, Operator, Operators


class LayerTails(msgspec.Struct, frozen=True, kw_only=True):
    """hidden = (hidden + norm(project(act(gate(hidden)) * input))) * scale, a number for each layer.

    `input_size` is the width of a token's input to each layer (per-layer embeddings): of none there is only
    the scale. Inputs are rows of a table, added to a projection of the token's embedding.
    """

    input_size: int = 0
    activation: str = "gelu_tanh"

    def num_products(self, hidden_size: int) -> int:
        """Multiplications with weights that one token takes for a layer."""
        return 3 * hidden_size * self.input_size

    def slots(self, vocab_size: int, hidden_size: int, num_layers: int, shard: Shard) -> Iterator[Slot]:
        """`inputs_embed` [V, L P], `inputs_projection` [L P, h], `inputs_norm` [P], and those of each layer.

        A shard has some rows of the table, and all of the others.
        """
        for index in range(num_layers):
            for slot in self._layer_slots(hidden_size):
                yield slot._replace(name=f"layers.{index}.{slot.name}", layer=index)
        if not self.input_size:
            return
        width, hidden = WHOLE.share(num_layers * self.input_size), WHOLE.share(hidden_size)
        yield from matrix_slots("inputs_embed", {"inputs_embed": shard.share(vocab_size)}, width)
        yield from matrix_slots("inputs_projection", {"inputs_projection": width}, hidden)
        yield vector_slot("inputs_norm", self.input_size)

    def _layer_slots(self, hidden_size: int) -> Iterator[Slot]:
        """`input_gate` [P, h], `input_projection` [h, P], `input_post_norm` [h], `layer_scale` [1]."""
        if self.input_size:
            size, hidden = WHOLE.share(self.input_size), WHOLE.share(hidden_size)
            yield from matrix_slots("input_gate", {"input_gate": size}, hidden)
            yield from matrix_slots("input_projection", {"input_projection": hidden}, size)
            yield vector_slot("input_post_norm", hidden_size)
        yield vector_slot("layer_scale", 1)

    def build(
        self,
        embed: Operator,
        layers: Sequence[DecoderLayer],
        weights: LayerWeights,
        layer_weights: Sequence[LayerWeights],
        operators: Operators,
        table: Callable[[Tensor, float], Operator],
    ) -> tuple[Operator, list[DecoderLayer]]:
        """The embedding and the layers with their tails.

        weights: what `slots` names; layer_weights: the same of each layer. table: makes the operator of
        the rows of a table, scaled.
        """
        from microvllm.ops.layer_tails import GatedInput, Tail, TokenInputs

        inputs, norm = None, weights.norm("inputs_norm")
        if norm is not None:
            lookup = table(weights.matrix("inputs_embed")[0], self.input_size**0.5)
            projection = operators.linear(*weights.matrix("inputs_projection"))
            inputs = TokenInputs(
                embed, lookup, projection, operators.norm(norm), len(layers), self.input_size
            )

        def gated(own: LayerWeights) -> GatedInput | None:
            if not self.input_size:
                return None
            gate, project = (
                operators.linear(*own.matrix(f"input_{name}")) for name in ("gate", "projection")
            )
            return GatedInput(gate, project, operators.norm(own.norm("input_post_norm")))

        tails = []
        for index, (layer, own) in enumerate(zip(layers, layer_weights, strict=True)):
            scale = own.matrix("layer_scale")[0].to(operators.activation_dtype)
            tail = Tail(layer.down, scale, index, inputs, gated(own), self.activation)
            tails.append(layer._replace(down=tail))
        return inputs or embed, tails
