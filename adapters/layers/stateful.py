"""What the mixers that keep a state of fixed size for each request have in common. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, TypeVar

import msgspec

from microvllm.adapters.tensors import WHOLE, Cut, Part, Slot

STATE_BYTES = 4  # of a number of a head's matrix, whatever the activations are
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


def conv_slots(name: str, channels: Cut, size: int, *, bias: bool = False) -> Iterator[Slot]:
    """A causal convolution over `size` tokens: its weight [channels, size], stored as [channels, 1, size]."""
    yield Slot(name, (Part(name, False, channels, stacked=channels.stored),), WHOLE.share(size))
    if bias:
        yield Slot(f"{name}_bias", (Part(name, True, channels),), None)
