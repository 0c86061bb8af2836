"""The activations of feed-forward blocks, gated and plain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from torch.nn.functional import gelu, relu, silu

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "relu2": lambda x: relu(x).square(),  # So et al., 2021, arXiv:2109.08668
}


def gate_and_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """Gated unit (Shazeer, 2020, arXiv:2002.05202): [n, 2i] -> [n, i], act(first half) * second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate).mul_(up)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU: [n, 2i] -> [n, i]."""
    return gate_and_mul(gate_up, silu)


def activated(product: Activation, name: str, *, gated: bool) -> Activation:
    """The product followed by one of `ACTIVATIONS`, gated by its own first half or plain."""
    activation = ACTIVATIONS[name]
    if gated:
        return lambda x: gate_and_mul(product(x), activation)
    return lambda x: activation(product(x))
