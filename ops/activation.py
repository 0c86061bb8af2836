"""The activations of feed-forward blocks, gated and plain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, relu, silu

Activation = Callable[[Tensor], Tensor]

VECTOR = 32  # floats that torch computes at once on a CPU, at most: two vectors of AVX-512


def by_row(function: Activation, *, strided: bool = True) -> Activation:
    """An elementwise function that gives a row the same bits whatever rows are computed with it: [n, w].

    On a CPU torch goes through all rows as one. What its vectors leave at the very end it computes one by
    one, by another approximation of exp: so rows are made as wide as whole vectors. A GPU computes each
    number by itself. strided: whether the function gives what is strided the bits of what is contiguous.
    """

    def padded(x: Tensor) -> Tensor:
        width = x.shape[-1]
        if x.device.type != "cpu":
            return function(x)
        if width % VECTOR:
            return function(pad(x, (0, -width % VECTOR)))[..., :width].contiguous()
        return function(x if strided else x.contiguous())

    return padded


sigmoid, tanh = by_row(torch.sigmoid), by_row(torch.tanh)
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": by_row(silu),
    "gelu": by_row(gelu, strided=False),  # what is contiguous oneDNN computes, by another approximation
    "gelu_tanh": by_row(partial(gelu, approximate="tanh")),
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
    return sigmoid(gate * CLAMP_ALPHA).mul_(gate).mul_(up + 1)


def gated_unit(gate_up: Tensor, name: str) -> Tensor:
    """`CLAMPED`, or `gate_and_mul` by one of `ACTIVATIONS`."""
    return clamped_swiglu(gate_up) if name == CLAMPED else gate_and_mul(gate_up, ACTIVATIONS[name])


def activated(product: Activation, name: str, *, gated: bool) -> Activation:
    """The product followed by a gated unit of its halves, or by one of `ACTIVATIONS`."""
    if gated:
        return lambda x: gated_unit(product(x), name)
    activation = ACTIVATIONS[name]
    return lambda x: activation(product(x))
