"""What the mixers that keep a state of fixed size for each request have in common. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, TypeVar

import msgspec

M = TypeVar("M", bound="StatefulMixer")


class StatefulMixer(msgspec.Struct, frozen=True, kw_only=True):
    """A mixer with a state in its backend's rows, and nothing in the paged cache.

    It attends to no other layer's keys and values (`source`), all positions change its state (`window`), and
    the cache has nothing of it (`cache_size`, elements for one token).
    """

    source: ClassVar[None] = None
    window: ClassVar[None] = None
    cache_size: ClassVar[int] = 0

    def at_length(self: M, length: int) -> M:
        """The same: nothing depends on the length of a text."""
        return self
