"""What Gemma 4's layers do behind their MLP: a gated input of the token to each layer, and a scale."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from microvllm.ops.activation import ACTIVATIONS
from microvllm.ops.operators import LinearOperator, Operator


class TokenInputs:
    """Embeds tokens, [n] -> [n, h], and makes their inputs to the layers, which take them in the same step.

    An input is (norm(project(embedding) / sqrt(h)) + table row) / sqrt(2), of width `size` in each of
    `num_layers`. embed: [n] -> [n, h]; lookup: [n] -> [n, num_layers * size], as project of embeddings.
    """

    def __init__(
        self,
        embed: Operator,
        lookup: Operator,
        project: Operator,
        norm: Operator,
        num_layers: int,
        size: int,
    ) -> None:
        self._embed, self._lookup, self._project, self._norm = embed, lookup, project, norm
        self._num_layers, self._size = num_layers, size
        self._inputs: Tensor | None = None

    def __call__(self, token_ids: Tensor) -> Tensor:
        embedded = self._embed(token_ids)
        projected = self._project(embedded) * embedded.shape[1] ** -0.5
        rows = self._lookup(token_ids)
        inputs = (self._norm(projected.view(-1, self._size)).view_as(rows) + rows) * 2**-0.5
        self._inputs = inputs.view(-1, self._num_layers, self._size)
        return embedded

    def take(self, layer: int) -> Tensor:
        """The inputs of the step's tokens to a layer, [n, P]; behind the last layer they are dropped.

        Raises RuntimeError if no tokens were embedded.
        """
        inputs = self._inputs
        if inputs is None:
            raise RuntimeError("a layer was computed without an embedding before it")
        if layer == self._num_layers - 1:
            self._inputs = None
        return inputs[:, layer]


class GatedInput(NamedTuple):
    """norm(project(act(gate(hidden)) * input)): [n, h] -> [n, h]."""

    gate: LinearOperator
    project: LinearOperator
    norm: Operator


class Tail:
    """(last(x) + residual + gated input) * scale, behind the last product of a layer; scale: [1]."""

    def __init__(
        self,
        last: LinearOperator,
        scale: Tensor,
        layer: int,
        inputs: TokenInputs | None = None,
        gated: GatedInput | None = None,
        activation: str = "gelu_tanh",
    ) -> None:
        self._last, self._scale, self._layer = last, scale, layer
        self._inputs, self._gated, self._activation = inputs, gated, ACTIVATIONS[activation]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        hidden = self._last(x, residual)
        if self._inputs is not None and self._gated is not None:
            gate, project, norm = self._gated
            inner = self._activation(gate(hidden)).mul_(self._inputs.take(self._layer))
            hidden = hidden.add_(norm(project(inner)))
        return hidden.mul_(self._scale)
