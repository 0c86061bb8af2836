"""Plans how a model's layers share the pages of the KV cache. Imports no torch.

Layers with a sliding window need the last tokens only, so how many blocks a sequence needs differs from layer
to layer. Blocks of all layers come from one pool nevertheless: the layers are put into groups of one window
each, whose blocks all have the size of a page, and any page serves any group. What short sequences leave of
the memory serves the full layers of long ones, and the other way round. Groups of equal numbers of layers are
those of vLLM's hybrid memory allocator, pages of a common size those of Jenga (Zhang et al., 2025,
arXiv:2503.18292).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

GROUP_COST = 0.02  # of the memory: what one more group of layers, with its block tables, has to save


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Which layers share a page, and where in it they lie.

    windows: of each group, falling, None first. slots: of each group, the elements of a token that a layer
    has room for. page_size: elements of a token in a page, which a group fills from its beginning. groups,
    places: of each layer, the group that it is in, and how many layers of that lie in front of it; both 0 if
    it has no cache. is_uniform: all layers' keys and values have the same shape.
    """

    windows: tuple[int | None, ...]
    slots: tuple[int, ...]
    page_size: int
    groups: tuple[int, ...]
    places: tuple[int, ...]
    is_uniform: bool

    @classmethod
    def of(cls, layers: Sequence[tuple[int | None, int, int]]) -> CachePlan:
        """Plan for layers of these windows, elements of a token (0: no cache), and elements of a head.

        A page holds the layers of one window, or a part of them: the part with which neither sequences within
        all windows nor ones without an end take much more memory than their keys and values fill.
        """
        cached: dict[int | None, list[int]] = {}
        for window, size, _ in sorted(layers, key=lambda layer: -(layer[0] or math.inf)):
            if size:
                cached.setdefault(window, []).append(size)
        kinds = [_Kind(window, len(each), max(each), sum(each)) for window, each in cached.items()]
        if not kinds:
            return cls((None,), (0,), 0, (0,) * len(layers), (0,) * len(layers), is_uniform=True)
        unit = math.lcm(*(dim for _, size, dim in layers if size))  # a block begins where any head could
        pages = {-(-kind.slot * n // unit) * unit for kind in kinds for n in range(1, kind.layers + 1)}
        largest = max(kind.slot for kind in kinds)
        page = min((size for size in sorted(pages) if size >= largest), key=partial(_cost, kinds))
        order = [kind for kind in kinds for _ in range(kind.groups(page))]
        windows = [kind.window for kind in order]
        groups, places, seen = [], [], Counter[int | None]()
        for window, size, _ in layers:
            group = place = 0
            if size:
                first = windows.index(window)
                group, place = divmod(seen[window], page // order[first].slot)
                group += first
                seen[window] += 1
            groups.append(group)
            places.append(place)
        is_uniform = len({(size, dim) for _, size, dim in layers if size}) == 1
        slots = tuple(kind.slot for kind in order)
        return cls(tuple(windows), slots, page, tuple(groups), tuple(places), is_uniform)


class _Kind(NamedTuple):
    """The layers with one window: their number, the elements of the largest, and those of all."""

    window: int | None
    layers: int
    slot: int
    filled: int

    def groups(self, page: int) -> int:
        """How many groups of layers have room in such pages."""
        return -(-self.layers // (page // self.slot))


def _cost(kinds: Sequence[_Kind], page: int) -> float:
    """The memory that pages of a size take, as a multiple of what is filled."""
    groups = [kind.groups(page) for kind in kinds]
    short = page * sum(groups) / sum(kind.filled for kind in kinds)
    return max(short, page * groups[0] / kinds[0].filled) + GROUP_COST * sum(groups)
