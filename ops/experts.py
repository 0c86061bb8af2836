"""Mixtures of experts: the choice of each token's experts, and their sum, in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from microvllm.ops.activation import sigmoid
from microvllm.ops.quantized import QuantizedTensor
from microvllm.ops.routing import Routing


class SharedExpert(NamedTuple):
    """The expert that every token goes to: gate_up [2 * S, h], down [h, S]; gate: [1, h], or None."""

    gate_up: Tensor
    down: Tensor
    gate: Tensor | None


class ExpertBiases(NamedTuple):
    """What is added to the products: router [E], gate_up [E * 2 * I], down [E * h]; None adds nothing."""

    router: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None


NO_BIASES = ExpertBiases()


class Expert(NamedTuple):
    """The matrices of one expert, gate_up [2 * I, h] and down [h, I], with their biases or None."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


class ExpertWeights(NamedTuple):
    """What the experts of a layer are made of, for E experts of inner width I.

    router: [E, h]; gate_up: [E * 2 * I, h], of each expert gate before up; down: [E * h, I]; correction: [E]
    float32, or None. The matrices are of any kind that the device's products take. router_norm: [h], the
    weight of a norm for the router in place of that of the experts; scales: [E] float32, by which the weights
    of chosen experts are multiplied; or None. If not `gated`, gate_up is up alone, [E * I, h], also of the
    shared one.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    correction: Tensor | None = None
    shared: SharedExpert | None = None
    biases: ExpertBiases = NO_BIASES
    router_norm: Tensor | None = None
    scales: Tensor | None = None
    gated: bool = True

    def split(self) -> Iterator[Expert]:
        """The experts one by one."""
        count = len(self.router)

        def of_each(weight: Tensor | None) -> Sequence[Tensor | None]:
            if weight is None:
                return [None] * count
            if isinstance(weight, QuantizedTensor):
                return weight.split_parts(len(weight.parts) // count)
            return weight.chunk(count)

        tensors = self.gate_up, self.down, self.biases.gate_up, self.biases.down
        return itertools.starmap(Expert, zip(*map(of_each, tensors), strict=True))


def route(
    logits: Tensor, routing: Routing, correction: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits: [n, E] -> the weights of the chosen experts and their numbers, [n, k] float32 and int64.

    Of equal scores, which logits in 16 bits often give, the first is taken, by all devices' kernels too.
    """
    logits = logits.float()
    scores = sigmoid(logits) if routing.sigmoid else logits.softmax(-1)
    ranked = scores if correction is None else scores + correction
    if routing.num_groups > 1:
        groups = ranked.view(len(ranked), routing.num_groups, -1)
        sums = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
        best = _largest(sums, routing.num_chosen_groups)
        outside = torch.ones_like(sums, dtype=torch.bool).scatter_(-1, best, False)
        ranked = groups.masked_fill(outside[..., None], -torch.inf).flatten(-2)
    chosen = _largest(ranked, routing.num_chosen)
    weights = scores.gather(-1, chosen)
    if routing.normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + routing.smallest_sum)
    weights = weights * routing.scale
    return weights if scales is None else weights * scales[chosen], chosen


def _largest(scores: Tensor, count: int) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


Product = Callable[[Tensor], Tensor]
Norm = tuple[Tensor, float]  # as in `ops.operators`


class ResidualProduct(Protocol):
    """See `ops.operators.LinearOperator`."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


class Products(Protocol):
    """What `ops.operators.Operators` has for the matrices of each expert, and for norms."""

    def norm(self, norm: Norm | None) -> Product: ...
    def product(self, weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None) -> Product: ...
    def linear(self, weight: Tensor, bias: Tensor | None = None) -> ResidualProduct: ...
    def mlp_input(
        self, norm: None, weight: Tensor, bias: Tensor | None, activation: str, gated: bool
    ) -> Product: ...


def composed(
    operators: Products, norm: Norm | None, weights: ExpertWeights, routing: Routing, activation: str
) -> tuple[Product, ResidualProduct]:
    """The norm and the experts of a layer from the products of a device; with `router_norm` both in one."""
    products = [
        (
            operators.mlp_input(None, expert.gate_up, expert.gate_up_bias, activation, weights.gated),
            operators.linear(expert.down, expert.down_bias),
        )
        for expert in weights.split()
    ]
    outside, inside, own = norm, None, None
    if norm is not None and weights.router_norm is not None:
        outside, inside, own = None, norm, (weights.router_norm, norm[1])
    router = operators.product(weights.router, weights.biases.router, norm=own)
    chosen = ComposedExperts(router, operators.norm(inside), products, routing, weights)
    return operators.norm(outside), with_shared(operators, chosen, weights, activation)


def with_shared(
    operators: Products, chosen: ResidualProduct, weights: ExpertWeights, activation: str
) -> ResidualProduct:
    """The chosen experts, and the shared one if there is one."""
    shared = weights.shared
    if shared is None:
        return chosen
    inner = operators.mlp_input(None, shared.gate_up, None, activation, weights.gated)
    gate = None if shared.gate is None else operators.linear(shared.gate)
    return WithSharedExpert(chosen, inner, operators.linear(shared.down), gate)


class ComposedExperts:
    """residual + the weighted sum of what a token's experts give, one expert after another.

    router: [n, h] -> [n, E]; norm: what is in front of the experts alone; experts: of each the product up to
    its activation, and the one with `down`.
    """

    def __init__(
        self,
        router: Product,
        norm: Product,
        experts: Sequence[tuple[Product, Product]],
        routing: Routing,
        weights: ExpertWeights,
    ) -> None:
        self._router, self._norm, self._experts, self._routing = router, norm, experts, routing
        self._correction, self._scales = weights.correction, weights.scales

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [n, h] -> [n, h], summed up in float32."""
        weights, chosen = route(self._router(x), self._routing, self._correction, self._scales)
        x = self._norm(x)
        total = torch.zeros_like(x, dtype=torch.float32)
        for number in sorted(set(chosen.flatten().tolist())):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            inner, down = self._experts[number]
            given = down(inner(x[rows])).float() * weights[rows, places, None]
            total.index_add_(0, rows, given)
        y = total.to(x.dtype)
        return y if residual is None else residual.add_(y)


class WithSharedExpert:
    """Adds the expert that every token goes to, times a sigmoid of the token if there is a `gate`."""

    def __init__(
        self, chosen: ResidualProduct, inner: Product, down: ResidualProduct, gate: Product | None
    ) -> None:
        self._chosen, self._inner, self._down, self._gate = chosen, inner, down, gate

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [n, h], normalised -> [n, h]; the residual may be overwritten by the result."""
        if self._gate is None:
            return self._chosen(x, self._down(self._inner(x), residual))
        shared = self._down(self._inner(x)) * sigmoid(self._gate(x))
        return self._chosen(x, shared if residual is None else residual.add_(shared))
