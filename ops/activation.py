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
# A gated unit that is no activation of the gate times up, and what it is made with.
CLAMPED = "clamped_swiglu"
CLAMP_ALPHA, CLAMP_LIMIT = 1.702, 7.0


def gate_and_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """Gated unit (Shazeer, 2020, arXiv:2002.05202): [n, 2i] -> [n, i], act(first half) * second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate).mul_(up)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU: [n, 2i] -> [n, i]."""
    return gate_and_mul(gate_up, silu)


def clamped_swiglu(gate_up: Tensor) -> Tensor:
    """gpt-oss's gated unit (arXiv:2508.10925): [n, 2i] -> [n, i], g * sigmoid(alpha * g) * (up + 1).

    The gate is cut off above at `CLAMP_LIMIT`, up on both sides.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=CLAMP_LIMIT), up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT)
    return (gate * CLAMP_ALPHA).sigmoid_().mul_(gate).mul_(up + 1)


def gated_unit(gate_up: Tensor, name: str) -> Tensor:
    """`CLAMPED`, or `gate_and_mul` by one of `ACTIVATIONS`."""
    return clamped_swiglu(gate_up) if name == CLAMPED else gate_and_mul(gate_up, ACTIVATIONS[name])


def activated(product: Activation, name: str, *, gated: bool) -> Activation:
    """The product followed by a gated unit of its halves, or by one of `ACTIVATIONS`."""
    if gated:
        return lambda x: gated_unit(product(x), name)
    activation = ACTIVATIONS[name]
    return lambda x: activation(product(x))
