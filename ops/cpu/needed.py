"""Tokens of a step whose last hidden states are needed: the last layer computes these alone."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from microvllm.ops.attention import AttentionBatch
from microvllm.ops.cpu.cache import Step


class Needed(ctypes.Structure):
    """`Needed` of layers.c, with what it points to."""

    _fields_ = [("step", ctypes.POINTER(Step)), ("rows", ctypes.c_void_p)]
    held: tuple[Tensor, ...]

    @classmethod
    def of(cls, whole: Step, batch: AttentionBatch, rows: Tensor) -> Needed:
        """rows: [m] int64, rising, of the tokens of a step and its batch."""
        blocks, lens = _as_decodes(batch, rows)
        step = Step.from_buffer_copy(whole)
        step.blocks, step.lens = blocks.data_ptr(), lens.data_ptr()
        step.n, step.decodes, step.width, step.segments = len(rows), *blocks.shape, 0
        needed = cls(ctypes.pointer(step), rows.data_ptr())
        needed.held = blocks, lens, rows
        return needed


def _as_decodes(batch: AttentionBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of each of these tokens' sequences, [m, width], and how many tokens it sees, [m]."""
    decodes = rows[rows < batch.num_decodes]
    blocks, lens = batch.decode_blocks[decodes].long(), batch.decode_lens[decodes].long()
    if (table := batch.segment_table) is not None:
        tokens = rows[len(decodes) :] - batch.num_decodes
        segments = torch.searchsorted(table.starts.long(), tokens, right=True) - 1
        seen = table.context_lens[segments] - table.starts[segments + 1] + tokens + 1
        others = table.blocks[segments].long()
        width = max(blocks.shape[1], others.shape[1])
        padded = [pad(each, (0, width - each.shape[1])) for each in (blocks, others)]
        blocks, lens = torch.cat(padded), torch.cat((lens, seen.long()))
    return blocks.contiguous(), lens.contiguous()
