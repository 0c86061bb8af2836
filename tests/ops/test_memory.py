"""Fresh memory: zeros, and huge pages where they are asked for and the system has them."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from microvllm.ops.attention import AttentionConfig, AttentionShape
from microvllm.ops.attention.torch_backend import TorchAttention
from microvllm.ops.memory import lazy_zeros

CPU = torch.device("cpu")
SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> list[str]:
    """What the kernel has noted of the mapping at an address."""
    is_there = False
    for line in SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(number, 16) for number in first.split("-"))
            is_there = begin <= address < end
        elif is_there and first == "VmFlags:":
            return rest
    raise AssertionError("no such mapping")


@pytest.mark.skipif(
    not SMAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists() or
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages",
)  # fmt: skip
def test_huge_pages_are_for_those_who_ask() -> None:
    sizes = 3, 5 << 20
    small, huge = (lazy_zeros(sizes, torch.bfloat16, CPU, huge=huge) for huge in (False, True))
    for zeros, has_advice in ((small, False), (huge, True)):
        assert zeros.shape == sizes and not zeros.any()
        assert ("hg" in flags_at(zeros.data_ptr())) == has_advice


def test_keys_and_values_of_a_block_are_one_run_of_memory() -> None:
    """So a layer's part of a sequence lies in as few huge pages as its tokens fill."""
    config = AttentionConfig(AttentionShape(2, 4, 2, 8), 7, 16, torch.zeros(4), 64, torch.float32)
    cache = TorchAttention(config).cache
    assert cache.shape == (2, 4, 7, 16, 8)
    for layer in range(2):
        for block in range(7):
            run = cache[layer, :, block]
            assert run.is_contiguous() and run.data_ptr() == cache.data_ptr() + 4 * run.numel() * (
                7 * layer + block
            )
