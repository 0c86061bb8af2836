"""A layer's MLP as a mixture of experts, as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import msgspec

from microvllm.adapters.tensors import (
    WHOLE,
    Cut,
    LayerWeights,
    Part,
    Shard,
    Slot,
    matrix_slots,
    vector_slot,
)
from microvllm.ops.routing import Routing

if TYPE_CHECKING:
    from torch import Tensor

    from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators


class Experts(msgspec.Struct, frozen=True, kw_only=True, tag="experts"):
    """A weighted sum of some of `count` gated MLPs of inner width `size`, which a router chooses by token.

    Of `shared_size` > 0 there is one more, which every token goes to; with `shared_gate` it is multiplied by
    a sigmoid of the token. `correction`: see `Routing`.
    """

    count: int
    size: int
    routing: Routing
    activation: str = "silu"
    correction: bool = False
    correction_in_row: bool = False  # stored as [1, E]
    shared_size: int = 0
    shared_gate: bool = False

    def num_products(self, hidden_size: int) -> int:
        """Multiplications with weights that one token takes."""
        inner = self.routing.num_chosen * self.size + self.shared_size
        return hidden_size * (self.count + self.shared_gate + 3 * inner)

    def sharded(self, size: int) -> Experts:
        """A part of the width of every expert. Raises ValueError if it does not divide evenly."""
        for width in (self.size, self.shared_size):
            if width % size:
                raise ValueError(f"experts of a width of {width} do not divide into {size} shards")
        return msgspec.structs.replace(self, size=self.size // size, shared_size=self.shared_size // size)

    def slots(self, hidden_size: int, names: Mapping[str, str], shard: Shard) -> Iterator[Slot]:
        """`router` [E, h], `experts_gate_up` [E 2 I, h], `experts_down` [E h, I]: one expert after another.

        And `correction` [E], `shared_gate_up` [2 S, h], `shared_down` [h, S], `shared_scale` [1, h].
        """
        inner, hidden = shard.share(self.size), WHOLE.share(hidden_size)
        yield from matrix_slots("router", {"router": WHOLE.share(self.count)}, hidden)
        if self.correction:
            yield from self._correction()
        gate_up = self._parts({"expert_gate": inner, "expert_up": inner}, names)
        yield Slot("experts_gate_up", gate_up, hidden)
        yield Slot("experts_down", self._parts({"expert_down": hidden}, names), inner)
        if self.shared_size:
            width = shard.share(self.shared_size)
            both = {"shared_gate": width, "shared_up": width}
            yield from matrix_slots("shared_gate_up", both, hidden)
            yield from matrix_slots("shared_down", {"shared_down": hidden}, width)
            if self.shared_gate:
                yield from matrix_slots("shared_scale", {"shared_scale": WHOLE.share(1)}, hidden)

    def _correction(self) -> Iterator[Slot]:
        row = {"correction": WHOLE.share(1)}
        slots = [vector_slot("correction", self.count)]
        if self.correction_in_row:
            slots = list(matrix_slots("correction", row, WHOLE.share(self.count)))
        yield from (slot._replace(is_wide=True) for slot in slots)

    def _parts(self, rows: Mapping[str, Cut], names: Mapping[str, str]) -> tuple[Part, ...]:
        """These rows of every expert. A name without an expert's number is of one tensor with all of them."""
        return tuple(
            Part(role, False, cut, expert)
            if "{e}" in names[role]
            else Part(role, False, cut.in_stack(expert, self.count), expert, self.count)
            for expert in range(self.count)
            for role, cut in rows.items()
        )

    def build(
        self, weights: LayerWeights, norm: Norm | None, operators: Operators
    ) -> tuple[Operator, LinearOperator]:
        """The norm, then everything else."""
        from microvllm.ops.experts import ExpertWeights, SharedExpert

        def matrix(name: str) -> Tensor:
            return weights.matrix(name)[0]

        shared = None
        if self.shared_size:
            gate = matrix("shared_scale") if self.shared_gate else None
            shared = SharedExpert(matrix("shared_gate_up"), matrix("shared_down"), gate)
        correction = matrix("correction").float().flatten() if self.correction else None
        matrices = matrix("router"), matrix("experts_gate_up"), matrix("experts_down")
        return operators.experts(
            norm, ExpertWeights(*matrices, correction, shared), self.routing, self.activation
        )
