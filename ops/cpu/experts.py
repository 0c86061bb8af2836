"""Mixtures of experts by the kernels of this folder."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from microvllm.ops.operators import Norm
from microvllm.ops.routing import Routing

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class _Experts(ctypes.Structure):
    """`Experts` of experts.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("norm", "correction", "router", "gate_up", "down")),
        *((name, _POINTER) for name in ("shared_gate_up", "shared_down", "shared_gate")),
        *((name, _FLOAT) for name in ("eps", "smallest_sum", "scale")),
        *((name, _LONG) for name in ("count", "chosen", "hidden", "width", "groups", "chosen_groups")),
        *((name, _INT) for name in ("is_sigmoid", "is_normalized")),
    ]


class Product(Protocol):
    """A `CpuLinear`: [*, k] -> [*, n], of whose `Linear` struct the address is known."""

    address: int
    n: int
    k: int


class CpuExperts:
    """residual + the weighted sum of what a token's experts give to norm(x), in one call.

    experts: of each `gate_up`, gated, and `down`; shared: of the one that every token goes to, and its gate;
    correction: [E] float32, or None.
    """

    def __init__(
        self,
        kernel: Any,
        pool: Any,
        norm: Norm | None,
        router: Product,
        experts: Sequence[tuple[Product, Product]],
        shared: tuple[Product, Product, Product | None] | None,
        routing: Routing,
        correction: Tensor | None,
    ) -> None:
        self._kernel, self._pool = kernel, pool
        count, (_, down) = len(experts), experts[0]
        pointers = _POINTER * count
        first, last = (pointers(*(pair[i].address for pair in experts)) for i in range(2))
        weight, eps = (None, 0.0) if norm is None else norm
        self._held = (
            weight,
            correction,
            router,
            experts,
            shared,
            first,
            last,
        )  # the struct has their addresses
        width = max(down.k, shared[1].k if shared else 0)
        self._arguments = _Experts(
            None if weight is None else weight.data_ptr(),
            None if correction is None else correction.data_ptr(),
            router.address,
            ctypes.addressof(first),
            ctypes.addressof(last),
            *(one.address if one else None for one in shared or (None, None, None)),
            eps,
            routing.smallest_sum,
            routing.scale,
            count,
            routing.num_chosen,
            down.n,
            width,
            routing.num_groups,
            routing.num_chosen_groups,
            routing.sigmoid,
            routing.normalized,
        )
        self.address = ctypes.addressof(self._arguments)
        self.scratch = 3 * down.n + width + 2 * count + 2 * routing.num_chosen + 2  # floats, for each row

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [n, h] float32 -> [n, h]; the result is put where the residual is, which may be x."""
        n, x = len(x), x.contiguous()
        y = torch.empty_like(x) if residual is None else residual
        scratch = torch.empty(n * self.scratch)
        old = None if residual is None else residual.data_ptr()
        if self._kernel(self._pool, self.address, x.data_ptr(), old, y.data_ptr(), n, scratch.data_ptr()):
            raise MemoryError(f"no memory for the experts of {n} tokens")
        return y
