"""The products of matrices that stay packed on a GPU, by their kind of tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from microvllm.ops.coded import CodedTensor
from microvllm.ops.gpu.coded import CodedProduct
from microvllm.ops.gpu.scaled import ScaledProduct
from microvllm.ops.mxfp4 import Mxfp4Tensor
from microvllm.ops.operators import LinearOperator
from microvllm.ops.scaled import ScaledTensor


class Kind(NamedTuple):
    """What multiplies a kind of tensor, and from which compute capability on.

    `product(weight, bias, arrivals, levers, *, norm, eps, gated, pdl)` is a `product.Product`.
    """

    product: Callable[..., LinearOperator]
    capability: tuple[int, int]


KINDS: Mapping[type[Tensor], Kind] = {
    ScaledTensor: Kind(ScaledProduct, (8, 9)),
    CodedTensor: Kind(CodedProduct, (8, 0)),
}
# Those that only experts are kept in, which `ops.gpu.experts` multiplies: the capability that they need.
OF_EXPERTS: Mapping[type[Tensor], tuple[int, int]] = {Mxfp4Tensor: (8, 0)}


def packed_kinds(device: torch.device) -> tuple[type[Tensor], ...]:
    """The kinds of tensors that this device multiplies; in Triton's interpreter all."""
    needed = {**{tensor: kind.capability for tensor, kind in KINDS.items()}, **OF_EXPERTS}
    if device.type != "cuda":
        return tuple(needed)
    found = torch.cuda.get_device_capability(device)
    return tuple(tensor for tensor, capability in needed.items() if found >= capability)
