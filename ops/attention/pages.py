"""The memory of a KV cache: pages, each of which is a block of any group of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from microvllm.ops.memory import lazy_zeros


@dataclass(slots=True)
class CachePages:
    """Allocates the pages of a cache, and shows them as a layer's blocks.

    num_blocks: of block_size tokens. page_size: elements of a token in a page. is_uniform: the layers of all
    groups have keys and values of one shape; then those at one place of each group share a tensor, in which
    a page is what block it is for each of them. Otherwise a page is one run of memory, in which groups of
    layers of different shapes can lie.
    """

    num_blocks: int
    block_size: int
    page_size: int
    is_uniform: bool
    dtype: torch.dtype
    device: torch.device
    _memory: Tensor | None = field(default=None, init=False)

    def blocks(self, slot: int, planes: int, block: tuple[int, ...], spare: int = 0) -> Tensor:
        """Zeros at first: [places, planes, num_blocks + spare, *block], by a layer's place in its group.

        slot: elements of a token that each layer of the group has room for. planes: such as those of keys and
        of values, whose parts of a block are this large.
        """
        number, places = self.num_blocks + spare, self.page_size // slot
        if self._memory is None:
            elements = number * self.page_size * self.block_size
            self._memory = lazy_zeros((elements,), self.dtype, self.device, huge=True)
        if self.is_uniform:
            return self._memory.view(places, planes, number, *block)
        plane, page = math.prod(block), self.page_size * self.block_size
        inner = (math.prod(block[i + 1 :]) for i in range(len(block)))
        strides = slot * self.block_size, plane, page, *inner
        return self._memory.as_strided((places, planes, number, *block), strides)


class LayerPages(NamedTuple):
    """Where the layers of a backend lie in pages: places, by layer; slot: see `CachePages.blocks`."""

    pages: CachePages
    slot: int
    places: Sequence[int]

    @classmethod
    def own(
        cls,
        num_layers: int,
        slot: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LayerPages:
        """Pages of these layers alone, one after the other."""
        pages = CachePages(
            num_blocks, block_size, num_layers * slot, is_uniform=True, dtype=dtype, device=device
        )
        return cls(pages, slot, range(num_layers))

    def blocks(self, planes: int, block: tuple[int, ...], spare: int = 0) -> Tensor:
        """See `CachePages.blocks`."""
        return self.pages.blocks(self.slot, planes, block, spare)
