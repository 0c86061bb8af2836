"""Fresh memory from the system, in huge pages where it has them."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor


def map_memory(size: int, huge: bool) -> mmap.mmap:
    """`size` bytes of zeros, which take memory when they are stored to: 4 KiB at a time, 2 MiB if `huge`.

    What is read from end to end, or jumped about in, comes faster from huge pages: an address of memory is
    then translated without a look into memory.
    """
    # Private: pages of memory that could be shared have other rules.
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def lazy_zeros(
    sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, huge: bool = False
) -> Tensor:
    """`torch.zeros`, but on a CPU without writing them: see `map_memory`."""
    if device.type != "cpu":
        return torch.zeros(sizes, dtype=dtype, device=device)
    count = math.prod(sizes)
    memory = map_memory(max(1, count * dtype.itemsize), huge)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(sizes)
