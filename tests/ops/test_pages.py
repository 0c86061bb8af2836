"""Memory that layers of several groups share: what a page holds lies where no other page does."""

from __future__ import annotations

import pytest
import torch

from microvllm.ops.attention.pages import CachePages, LayerPages

BLOCKS, SIZE = 5, 4
CPU = torch.device("cpu")


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("block", [(2, SIZE, 8), (SIZE, 2, 8)])
def test_layers_of_one_shape_share_a_place(block: tuple[int, ...], spare: int) -> None:
    """Those of a group have keys and values of their own; other groups see the same memory."""
    pages = CachePages(BLOCKS, SIZE, 3 * 32, is_uniform=True, dtype=torch.float32, device=CPU)
    cache = LayerPages(pages, 32, (0, 1, 2)).blocks(2, block, spare)
    assert cache.shape == (3, 2, BLOCKS + spare, *block) and cache.is_contiguous() and not cache.any()
    cache.copy_(torch.arange(cache.numel()).view(cache.shape))
    assert torch.equal(pages.blocks(32, 2, block, spare), cache)


def test_a_page_holds_the_layers_of_either_group() -> None:
    """Three layers of heads of 8, or six of heads of 4: a page is the same run of memory for both."""
    pages = CachePages(BLOCKS, SIZE, 96, is_uniform=False, dtype=torch.float32, device=CPU)
    wide, narrow = pages.blocks(32, 4, (SIZE, 8)), pages.blocks(16, 4, (SIZE, 4))
    assert wide.shape == (3, 4, BLOCKS, SIZE, 8) and narrow.shape == (6, 4, BLOCKS, SIZE, 4)
    for page in range(BLOCKS):
        wide[:, :, page] = page + 1
    for page in range(BLOCKS):
        assert (narrow[:, :, page] == page + 1).all(), "no other page has a part of it"
    narrow[3, :, 2] = 9
    assert (wide[1, 2:, 2] == 9).all() and (wide == 9).sum() == 64
    by_heads = pages.blocks(32, 2, (2, SIZE, 8))
    assert by_heads.stride()[2] == 96 * SIZE and (by_heads[:, :, 4] == 5).all()
