"""A layer's MLP as a mixture of experts, as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import msgspec

from microvllm.adapters.tensors import (
    PAIRS,
    TRANSPOSED,
    WHOLE,
    Cut,
    LayerWeights,
    Part,
    Shard,
    Slot,
    fused,
    matrix_slots,
    vector_slot,
)
from microvllm.ops.routing import Routing

if TYPE_CHECKING:
    from torch import Tensor

    from microvllm.ops.experts import ExpertWeights
    from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators


MATRICES = "router", "experts_gate_up", "experts_down"


class Experts(msgspec.Struct, frozen=True, kw_only=True, tag="experts"):
    """A weighted sum of some of `count` MLPs of inner width `size`, which a router chooses by token.

    `gated`: as `MLP`'s are. Of `shared_size` > 0 there is one more, which every token goes to; with
    `shared_gate` it is multiplied by a sigmoid of the token. `correction`: see `Routing`. `bias`: the router
    and both products have one.
    """

    count: int
    size: int
    routing: Routing
    activation: str = "silu"
    gated: bool = True
    correction: bool = False
    correction_in_row: bool = False  # stored as [1, E]
    shared_size: int = 0
    shared_gate: bool = False
    bias: bool = False

    def num_products(self, hidden_size: int) -> int:
        """Multiplications with weights that one token takes."""
        inner = self.routing.num_chosen * self.size + self.shared_size
        return hidden_size * (self.count + self.shared_gate + (2 + self.gated) * inner)

    def sharded(self, size: int) -> Experts:
        """A part of the width of every expert. Raises ValueError if it does not divide evenly."""
        for width in (self.size, self.shared_size):
            if width % size:
                raise ValueError(f"experts of a width of {width} do not divide into {size} shards")
        return msgspec.structs.replace(self, size=self.size // size, shared_size=self.shared_size // size)

    def slots(self, hidden_size: int, names: Mapping[str, str], shard: Shard) -> Iterator[Slot]:
        """`router` [E, h], `experts_gate_up` [E 2 I, h], `experts_down` [E h, I]: one expert after another.

        And `correction` [E], `shared_gate_up` [2 S, h], `shared_down` [h, S], `shared_scale` [1, h], and the
        biases of the first three, one dimension less. If not `gated`, there is up alone: [E I, h], [S, h].
        """
        inner, hidden = shard.share(self.size), WHOLE.share(hidden_size)
        yield from matrix_slots("router", {"router": WHOLE.share(self.count)}, hidden, bias=self.bias)
        if self.correction:
            yield from self._correction()
        rows = fused(self._both("expert", inner), names, "expert_gate_up")
        if PAIRS in names:
            rows = {PAIRS: inner.of_runs(2)}
        rows = dict(fused(rows, names, "expert_gate_up"))
        yield Slot("experts_gate_up", self._parts(rows, names), hidden)
        yield Slot("experts_down", self._parts({"expert_down": hidden}, names), inner)
        if self.bias:
            yield Slot("experts_gate_up_bias", self._parts(rows, names, bias=True), None)
            if shard.rank == 0:  # as that of Attention's `o`
                yield Slot("experts_down_bias", self._parts({"expert_down": hidden}, names, bias=True), None)
        if self.shared_size:
            width = shard.share(self.shared_size)
            both = fused(self._both("shared", width), names, "shared_gate_up")
            yield from matrix_slots("shared_gate_up", both, hidden)
            yield from matrix_slots("shared_down", {"shared_down": hidden}, width)
            if self.shared_gate:
                yield from matrix_slots("shared_scale", {"shared_scale": WHOLE.share(1)}, hidden)

    def _both(self, kind: str, inner: Cut) -> dict[str, Cut]:
        return {f"{kind}_gate": inner, f"{kind}_up": inner} if self.gated else {f"{kind}_up": inner}

    def _correction(self) -> Iterator[Slot]:
        row = {"correction": WHOLE.share(1)}
        slots = [vector_slot("correction", self.count)]
        if self.correction_in_row:
            slots = list(matrix_slots("correction", row, WHOLE.share(self.count)))
        yield from (slot._replace(is_wide=True) for slot in slots)

    def _parts(
        self, rows: Mapping[str, Cut], names: Mapping[str, str], *, bias: bool = False
    ) -> tuple[Part, ...]:
        """These rows of every expert. A name without an expert's number is of one tensor with all of them."""

        def part(role: str, cut: Cut, expert: int) -> Part:
            if "{e}" in names[role]:
                return Part(role, bias, cut, expert)
            transposed = TRANSPOSED in names[role] and not bias
            return Part(role, bias, cut.in_stack(expert, self.count), expert, self.count, transposed)

        return tuple(part(role, cut, expert) for expert in range(self.count) for role, cut in rows.items())

    def build(
        self, weights: LayerWeights, norm: Norm | None, operators: Operators
    ) -> tuple[Operator, LinearOperator]:
        """The norm, then everything else."""
        return operators.experts(norm, self.loaded(weights), self.routing, self.activation)

    def loaded(self, weights: LayerWeights) -> ExpertWeights:
        """What `slots` names, as the operators take it."""
        from microvllm.ops.experts import ExpertBiases, ExpertWeights, SharedExpert

        def matrix(name: str) -> Tensor:
            return weights.matrix(name)[0]

        shared = None
        if self.shared_size:
            gate = matrix("shared_scale") if self.shared_gate else None
            shared = SharedExpert(matrix("shared_gate_up"), matrix("shared_down"), gate)
        correction = matrix("correction").float().flatten() if self.correction else None
        router, gate_up, down = (weights.matrix(name) for name in MATRICES)
        biases = ExpertBiases(router[1], gate_up[1], down[1])
        return ExpertWeights(router[0], gate_up[0], down[0], correction, shared, biases, gated=self.gated)
