"""A layer's gated or plain MLP, as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import msgspec

from microvllm.adapters.tensors import WHOLE, LayerWeights, Shard, Slot, fused, matrix_slots

if TYPE_CHECKING:
    from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators


class MLP(msgspec.Struct, frozen=True, kw_only=True, tag="mlp"):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) if not `gated`; see `ops.activation` for the names."""

    size: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False

    def num_products(self, hidden_size: int) -> int:
        """Multiplications with weights that one token takes."""
        return hidden_size * self.size * (2 + self.gated)

    def sharded(self, size: int) -> MLP:
        """What one of `size` shards computes of it. Raises ValueError if it does not divide evenly."""
        if self.size % size:
            raise ValueError(f"an MLP's width of {self.size} does not divide into {size} shards")
        return msgspec.structs.replace(self, size=self.size // size)

    def slots(self, hidden_size: int, names: Mapping[str, str], shard: Shard) -> Iterator[Slot]:
        """`gate_up` [2 I, h], or `up` [I, h] if not gated, and `down` [h, I]."""
        inner, hidden = shard.share(self.size), WHOLE.share(hidden_size)
        rows = {"gate": inner, "up": inner} if self.gated else {"up": inner}
        yield from matrix_slots(self._first, fused(rows, names, "gate_up"), hidden, bias=self.bias)
        bias = self.bias and shard.rank == 0  # as that of Attention's `o`
        yield from matrix_slots("down", {"down": hidden}, inner, bias=bias)

    def build(
        self, weights: LayerWeights, norm: Norm | None, operators: Operators
    ) -> tuple[Operator, LinearOperator]:
        """Everything up to the activation, then the product with `down`."""
        first = operators.mlp_input(norm, *weights.matrix(self._first), self.activation, self.gated)
        return first, operators.linear(*weights.matrix("down"))

    @property
    def _first(self) -> str:
        return "gate_up" if self.gated else "up"
