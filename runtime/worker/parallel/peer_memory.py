"""Memory of each GPU that the kernels of the others write to."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, _SymmetricMemory


class PeerMemory:
    """A tensor on every rank, zero at first, and where this rank's GPU reaches each of them.

    `own` is this rank's; `addresses` are in the order of the ranks. Raises `RuntimeError` where a GPU does
    not reach another one.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, rank: int, size: int, store: Store
    ) -> None:
        _SymmetricMemory.set_group_info(name, rank, size, PrefixStore(name, store))
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        self.own: Tensor = _SymmetricMemory.empty_strided_p2p(
            shape, strides, dtype, torch.device("cuda", rank)
        )
        self.own.zero_()
        torch.cuda.synchronize()
        self._handle = _SymmetricMemory.rendezvous(self.own, name)
        self.addresses: list[int] = list(self._handle.buffer_ptrs)
