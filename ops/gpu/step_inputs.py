"""The inputs of a decode step, put together on the GPU from what the host sends of it.

The host knows positions, lengths and new blocks; the newest token of a row may still be on the GPU alone,
and the block tables of all rows stay there. One kernel, inside the captured step, does the rest.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.launch import follow, launch_options

CHUNK = 1024


class Staged(enum.IntEnum):
    """What the host sends for each sequence; behind it comes the new block of each group of layers."""

    ROW = 0
    TOKEN = 1  # -1: the row's newest
    POSITION = 2
    LENGTH = 3  # of the context, with the token; 0: padding
    COLUMN = 4  # of the new blocks in the tables; -1: there are none
    PLACE = 5  # where the next token goes in the host's memory; -1: nowhere


STAGED = len(Staged)


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """The inputs of a decode step on the device.

    rows, ids, positions, lens, places: [batch] int32; slots: [groups, batch] int32, -1 for padding; blocks:
    [groups, batch, width] int32.
    """

    rows: Tensor
    ids: Tensor
    positions: Tensor
    slots: Tensor
    lens: Tensor
    blocks: Tensor
    places: Tensor


def prepare_decode(
    staged: Tensor, tables: Tensor, newest: Tensor, block_size: int, *, pdl: bool = False
) -> DecodeInputs:
    """Return the inputs of a decode step, and add the new blocks to the block tables.

    staged: [STAGED + groups, batch] int32, see `Staged`; tables: [groups, rows, width] int32, updated with
    the new blocks; newest: [rows] int64, the newest token of every row.

    Padding names a row that no request has. Only the blocks that a sequence reads are written.
    """
    batch, (groups, rows, width) = staged.shape[1], tables.shape
    made = torch.empty(3 + groups, batch, dtype=torch.int32, device=staged.device)
    blocks = torch.empty(groups, batch, width, dtype=torch.int32, device=staged.device)
    _prepare_kernel[(batch, groups)](
        *(staged, tables, newest, made, blocks, batch, rows, width), STAGED=STAGED, PAGE=block_size,
        CHUNK=CHUNK, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    ids, positions, lens = made[:3].unbind(0)
    return DecodeInputs(staged[Staged.ROW], ids, positions, made[3:], lens, blocks, staged[Staged.PLACE])


@triton.jit
def _prepare_kernel(
    staged, tables, newest, made, blocks, batch, rows, width,
    STAGED: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: one sequence in one group."""
    follow(PDL)
    i = tl.program_id(0)
    group = tl.program_id(1)
    row = tl.load(staged + i).to(tl.int64)
    token = tl.load(staged + batch + i)
    position = tl.load(staged + 2 * batch + i)
    length = tl.load(staged + 3 * batch + i)
    column = tl.load(staged + 4 * batch + i)
    block = tl.load(staged + (STAGED + group) * batch + i)
    tables += (group * rows + row) * width
    blocks += (group * batch + i).to(tl.int64) * width
    tl.store(tables + column, block, mask=column >= 0)
    token = tl.where(token < 0, tl.load(newest + row).to(tl.int32), token)
    here = position // PAGE
    own = tl.where(here == column, block, tl.load(tables + here))
    slot = tl.where(length > 0, own * PAGE + position % PAGE, -1)
    tl.store(made + i, token)
    tl.store(made + batch + i, position)
    tl.store(made + 2 * batch + i, length)
    tl.store(made + (3 + group) * batch + i, slot)
    used = (length + PAGE - 1) // PAGE
    for first in range(0, used, CHUNK):
        at = first + tl.arange(0, CHUNK)
        inside = at < used
        # The new block was stored above by one thread: others need not see it yet.
        values = tl.where(at == column, block, tl.load(tables + at, inside, 0))
        tl.store(blocks + at, values, inside)
